"""What a model computes, opened up: pure functions of parameters, prompts and blocks."""

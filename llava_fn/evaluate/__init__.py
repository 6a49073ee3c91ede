"""Evaluation on AI2D, ChartQA, DocVQA and MMMU: reading, prompts, a run that can be stopped, scores and results."""

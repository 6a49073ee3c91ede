"""A training run: its folder, its figures, its progress."""

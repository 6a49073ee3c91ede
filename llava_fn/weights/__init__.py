"""Weights in and out: files of tensors, tables of their names, and the layouts that people publish."""

"""Judging what a model answers and how it speaks."""

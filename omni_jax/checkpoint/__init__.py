"""Checkpoints: the table of names, PyTorch's files, and the Orbax folders that this package runs from."""

"""Qwen2.5-Omni in JAX and Flax for Cloud TPU."""

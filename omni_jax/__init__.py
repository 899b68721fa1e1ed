"""Qwen2.5-Omni in JAX and Flax for Cloud TPU."""

from omni_jax.config import OmniConfig
from omni_jax.generation.model import OmniModel, load

__all__ = ["OmniConfig", "OmniModel", "load"]

"""Qwen2.5-Omni in JAX and Flax for Cloud TPU."""

from omni_jax.config import OmniConfig
from omni_jax.generation.model import OmniModel, load
from omni_jax.processing.chat import SPEECH_SYSTEM_PROMPT

__all__ = ["SPEECH_SYSTEM_PROMPT", "OmniConfig", "OmniModel", "load"]

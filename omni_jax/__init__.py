"""Qwen2.5-Omni in JAX and Flax for Cloud TPU."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from omni_jax.config import OmniConfig
    from omni_jax.generation.cloned_voice import ClonedVoice
    from omni_jax.generation.load_model import load
    from omni_jax.generation.model import OmniModel
    from omni_jax.processing.chat import SPEECH_SYSTEM_PROMPT

__all__ = ["SPEECH_SYSTEM_PROMPT", "ClonedVoice", "OmniConfig", "OmniModel", "load"]

_MODULES = {
    "ClonedVoice": "omni_jax.generation.cloned_voice",
    "OmniConfig": "omni_jax.config",
    "OmniModel": "omni_jax.generation.model",
    "load": "omni_jax.generation.load_model",
    "SPEECH_SYSTEM_PROMPT": "omni_jax.processing.chat",
}


def __getattr__(name: str) -> Any:
    # at first use: a process that decodes media imports parts of the package, and needs no model
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return [*globals(), *_MODULES]

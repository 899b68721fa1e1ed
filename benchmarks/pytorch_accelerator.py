"""PyTorch's reference with random parameters that are made on the accelerator."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
from transformers import (
    Qwen2_5OmniConfig,
    Qwen2_5OmniTalkerForConditionalGeneration,
    Qwen2_5OmniThinkerForConditionalGeneration,
    Qwen2_5OmniToken2WavModel,
)

from benchmarks.pytorch_side import ATTENTION, PyTorchSide
from benchmarks.side import PARAMETER_DEVIATION, VoiceArrays
from omni_jax.config import OmniConfig


class RandomPyTorchSide(PyTorchSide):
    """Thinker and Talker in ``dtype``, Token2Wav in float32; a network is made when it is first timed."""

    def __init__(self, folder: Path, config: OmniConfig, dtype: str):
        super().__init__(folder)
        config.save(self._published)
        self._dtype = getattr(torch, dtype)
        self._device = torch.device("cuda")
        torch.set_default_device(self._device)

    @functools.cached_property
    def _config(self) -> Any:
        return Qwen2_5OmniConfig.from_pretrained(self._published)

    def _make(self, kind: Any, config: Any, dtype: torch.dtype) -> Any:
        """A model on the device, its parameters normal and those of norms around one."""
        torch.set_default_dtype(dtype)
        model = kind._from_config(config, attn_implementation=ATTENTION, dtype=dtype)
        for name, parameter in model.named_parameters():
            is_scale = "norm" in name and name.endswith("weight")
            parameter.data.normal_(1.0 if is_scale else 0.0, PARAMETER_DEVIATION)
        return model.to(self._device).eval()

    @functools.cached_property
    def _thinker(self) -> Any:
        return self._make(Qwen2_5OmniThinkerForConditionalGeneration, self._config.thinker_config, self._dtype)

    @functools.cached_property
    def _talker(self) -> Any:
        return self._make(Qwen2_5OmniTalkerForConditionalGeneration, self._config.talker_config, self._dtype)

    @functools.cached_property
    def _token2wav(self) -> Any:
        return self._make(Qwen2_5OmniToken2WavModel, self._config.token2wav_config, torch.float32)

    def decode_text(self, tokens: Any, batch: int, num_tokens: int) -> float:
        torch.set_default_dtype(self._dtype)
        return super().decode_text(tokens, batch, num_tokens)

    def decode_codes(self, batch: int, prompt_length: int, num_codes: int) -> float:
        torch.set_default_dtype(self._dtype)
        return super().decode_codes(batch, prompt_length, num_codes)

    def solve_mel(self, codes: Any, voice: VoiceArrays) -> float:
        torch.set_default_dtype(torch.float32)
        return super().solve_mel(codes, voice)

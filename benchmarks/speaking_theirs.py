"""PyTorch's Talker and Token2Wav with random weights, float32, as ``bench.py speak`` runs them in a process apart.

Configurations are JSON, for this process imports nothing of omni_jax.
"""

from __future__ import annotations

import functools
import json
import time
from typing import Any

import torch
from transformers import (
    DynamicCache,
    Qwen2_5OmniConfig,
    Qwen2_5OmniTalkerForConditionalGeneration,
    Qwen2_5OmniToken2WavModel,
)

from benchmarks.bench_timing import seconds


@functools.cache
@torch.inference_mode()
def _token2wav(config: str, clip: int) -> tuple[Any, torch.Tensor, torch.Tensor]:
    """The model, warmed up by one code, and a speaker with a clip of so many frames."""
    sizes = Qwen2_5OmniConfig(**json.loads(config)).token2wav_config
    model = Qwen2_5OmniToken2WavModel._from_config(sizes, attn_implementation="sdpa").float().eval()
    torch.manual_seed(0)
    dit = sizes.dit_config
    cond, ref_mel = torch.randn(1, dit.enc_emb_dim), torch.randn(1, clip, dit.mel_dim)
    model(torch.zeros(1, 1, dtype=torch.long), cond, ref_mel)
    return model, cond, ref_mel


@torch.inference_mode()
def dit(config: str, clip: int, codes: int) -> float:
    """From codes to mel: all evaluations of one request."""
    model, cond, ref_mel = _token2wav(config, clip)
    ids = torch.randint(0, model.config.dit_config.num_embeds, (1, codes))
    return seconds(lambda: model.code2wav_dit_model.sample(cond, ref_mel, ids))


@torch.inference_mode()
def vocoder(config: str, clip: int, codes: int) -> float:
    """From mel to samples."""
    model, _, _ = _token2wav(config, clip)
    sizes = model.config.dit_config
    mel = torch.randn(1, sizes.mel_dim, codes * sizes.repeats)
    return seconds(lambda: model.code2wav_bigvgan_model(mel))


@functools.cache
def _talker(config: str) -> Any:
    sizes = Qwen2_5OmniConfig(**json.loads(config)).talker_config
    model = Qwen2_5OmniTalkerForConditionalGeneration._from_config(sizes, attn_implementation="sdpa")
    return model.float().eval()


@functools.cache
def _filled(config: str, rows: int, length: int) -> DynamicCache:
    """The cache after a prompt."""
    cache, width = DynamicCache(), _talker(config).config.embedding_size
    _step(_talker(config), torch.randn(rows, length, width), 0, cache)
    return cache


@torch.inference_mode()
def talker(config: str, rows: int, length: int, steps: int) -> float:
    """Seconds a step after a prompt of ``length``: the likeliest code of each row is taken, nothing else."""
    model, cache = _talker(config), _filled(config, rows, length)
    shares = torch.randn(steps, rows, 1, model.config.embedding_size)
    codes = torch.zeros(rows, 1, dtype=torch.long)
    started = time.perf_counter()
    for i, share in enumerate(shares):
        codes = _step(model, model.get_input_embeddings()(codes) + share, length + i, cache)
    took = time.perf_counter() - started
    cache.crop(length)
    return took / steps


def _step(model: Any, x: torch.Tensor, begin: int, cache: DynamicCache) -> torch.Tensor:
    """The next codes [B, 1] after inputs [B, T, E]; only the last position's scores are made."""
    places = torch.arange(begin, begin + x.shape[1]).expand(3, len(x), -1)
    x = model.thinker_to_talker_proj(x)
    hidden = model.model(inputs_embeds=x, position_ids=places, past_key_values=cache, use_cache=True)[0]
    return model.codec_head(hidden[:, -1:]).argmax(-1)

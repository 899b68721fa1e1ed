"""PyTorch's Qwen2.5-Omni for ``bench.py latency``, in a process apart, which imports nothing of omni_jax."""

from __future__ import annotations

import functools
import time
from typing import Any

import numpy as np
import torch
from transformers import Qwen2_5OmniForConditionalGeneration

from benchmarks.latency_figures import AUDIBLE, SAMPLE_RATE, Length

_WARM_UP = dict(thinker_max_new_tokens=4, talker_max_new_tokens=9)


@functools.cache
def model(folder: str) -> Any:
    """The loaded model."""
    kind: dict[str, Any] = dict(dtype=torch.float32, attn_implementation="sdpa")
    return Qwen2_5OmniForConditionalGeneration.from_pretrained(folder, **kind).eval()


def load(folder: str, prompt: dict[str, np.ndarray], voice: str) -> float:
    """Seconds of loading; then answers in a few words, which is not counted."""
    started = time.perf_counter()
    net = model(folder)
    took = time.perf_counter() - started
    generate(net, prompt, voice, **_WARM_UP)
    return took


def answer(folder: str, prompt: dict[str, np.ndarray], voice: str, length: Length) -> dict[str, float]:
    """Seconds until the sound of a reply, which comes at its end.

    Args:
      folder: the checkpoint.
      prompt: input_ids, attention_mask, input_features and feature_attention_mask; making them is not counted.
      voice: who speaks.
      length: of the reply.

    Raises:
      RuntimeError: if the reply has another length.
    """
    net = model(folder)
    started = time.perf_counter()
    # the last code is taken for the end mark and left out
    limits = dict(thinker_max_new_tokens=length.tokens, talker_max_new_tokens=length.codes + 1)
    ids, sound = generate(net, prompt, voice, **limits)
    took = time.perf_counter() - started
    samples, said = sound.flatten().numpy(), ids.shape[1] - prompt["input_ids"].shape[1]
    if (said, len(samples) / SAMPLE_RATE) != (length.tokens, length.seconds):
        raise RuntimeError(f"PyTorch said {said} tokens and {len(samples)} samples; {length} was asked for")
    heard = took + float(np.argmax(np.abs(samples) >= AUDIBLE)) / SAMPLE_RATE
    return dict(audio_ttfp=took, first_audible=heard, wall=took, audio_rtf=took / length.seconds)


@torch.inference_mode()
def generate(net: Any, prompt: dict[str, np.ndarray], voice: str, **limits: int) -> Any:
    """Token ids and sound, with the published way of drawing codes, and the likeliest words."""
    torch.manual_seed(0)
    c = net.config
    inputs = {name: torch.tensor(value) for name, value in prompt.items()}
    pads = dict(
        thinker_pad_token_id=c.thinker_config.pad_token_id, talker_pad_token_id=c.talker_config.tts_codec_pad_token_id
    )
    return net.generate(**inputs, speaker=voice, return_audio=True, thinker_do_sample=False, **pads, **limits)

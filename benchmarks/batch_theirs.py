"""PyTorch's Qwen2.5-Omni for ``bench.py batch``, in a process apart: one by one with speech, text in batches."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch

from benchmarks.batch_requests import VOICE, Dialogue
from benchmarks.latency_figures import SAMPLE_RATE
from benchmarks.latency_theirs import generate, model

_WARM_UP = dict(thinker_max_new_tokens=4, talker_max_new_tokens=9)


def speak(folder: str, prompts: list[np.ndarray], dialogues: tuple[Dialogue, ...]) -> float:
    """Seconds for all of them, each spoken alone, after a short one that is not counted.

    Raises:
      RuntimeError: if a reply has another length than was asked for.
    """
    net = model(folder)
    generate(net, _padded(net, prompts[:1]), VOICE, **_WARM_UP)
    started = time.perf_counter()
    for prompt, d in zip(prompts, dialogues, strict=True):
        # the last code is taken for the end mark and left out
        limits = dict(thinker_max_new_tokens=d.tokens, talker_max_new_tokens=d.codes + 1)
        ids, sound = generate(net, _padded(net, [prompt]), VOICE, **limits)
        made = ids.shape[1] - len(prompt), 50 * sound.numel() // SAMPLE_RATE
        if made != (d.tokens, d.codes):
            raise RuntimeError(f"{d} was asked for, and {made} tokens and codes came")
    return time.perf_counter() - started


@torch.inference_mode()
def write(folder: str, prompts: list[np.ndarray], dialogues: tuple[Dialogue, ...], batch: int) -> float:
    """Seconds for the text alone, in batches of like lengths; a batch is as long as its longest reply."""
    net, order = model(folder), sorted(range(len(prompts)), key=lambda i: (dialogues[i].tokens, len(prompts[i])))

    def answer(rows: list[int], tokens: int) -> None:
        given = {name: torch.tensor(value) for name, value in _padded(net, [prompts[i] for i in rows]).items()}
        pad = net.config.thinker_config.pad_token_id
        net.thinker.generate(**given, max_new_tokens=tokens, do_sample=False, pad_token_id=pad)

    answer(order[:batch], 4)
    started = time.perf_counter()
    for first in range(0, len(order), batch):
        rows = order[first : first + batch]
        answer(rows, max(dialogues[i].tokens for i in rows))
    return time.perf_counter() - started


def _padded(net: Any, prompts: list[np.ndarray]) -> dict[str, np.ndarray]:
    """Prompts to one length, with padding before them."""
    longest = max(map(len, prompts))
    ids = np.full((len(prompts), longest), net.config.thinker_config.pad_token_id)
    mask = np.zeros_like(ids)
    for i, prompt in enumerate(prompts):
        ids[i, longest - len(prompt) :], mask[i, longest - len(prompt) :] = prompt, 1
    return dict(input_ids=ids, attention_mask=mask)

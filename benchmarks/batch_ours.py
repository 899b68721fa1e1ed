"""omni_jax for ``bench.py batch``, in a process apart: many requests through one scheduler."""

from __future__ import annotations

import functools
import time
from pathlib import Path
from typing import Any

import numpy as np

import omni_jax
from benchmarks.batch_requests import VOICE, Dialogue
from benchmarks.latency_ours import make_model
from omni_jax.engine.outputs import Options, Reply
from omni_jax.engine.request import BLOCK_SIZES, RequestState, SchedulerConfig
from omni_jax.engine.warmup import Compilations

make = make_model  # so that the other side's process need not import JAX


@functools.cache
def _model(folder: Path) -> omni_jax.OmniModel:
    return omni_jax.load(folder)


def messages(dialogue: Dialogue) -> list[dict[str, Any]]:
    system = {"role": "system", "content": omni_jax.SPEECH_SYSTEM_PROMPT}
    return [system, {"role": "user", "content": dialogue.question}]


def prompts(folder: Path, dialogues: tuple[Dialogue, ...]) -> list[np.ndarray]:
    """The token ids of each request, int64 [T], which the other side is given."""
    model = _model(folder)
    return [model.processor(messages(d)).tokens.astype(np.int64) for d in dialogues]


def answer(folder: Path, dialogues: tuple[Dialogue, ...], slots: int, spoken: bool) -> dict[str, Any]:
    """Seconds for all of them with so many slots, after a warm-up that is not counted.

    Raises:
      RuntimeError: if a reply has another length than was asked for.
    """
    model, sizes = _model(folder), SchedulerConfig(slots, slots, BLOCK_SIZES if spoken else ())
    longest = max(len(model.processor(messages(d))) + max(d.tokens, d.codes) for d in dialogues) + 2
    model.warmup(tokens=longest, windows=0, slots=sizes)
    scheduler, replies = model.scheduler(sizes), dict[RequestState, Reply]()
    with Compilations() as compiled:
        started = time.perf_counter()
        tasks = {}
        for d in dialogues:
            options: dict[str, Any] = dict(max_tokens=d.tokens)
            if spoken:
                speech = dict(modalities=("text", "audio"), voice=VOICE, talker=dict(max_tokens=d.codes))
                options |= speech
            tasks[model.request(scheduler, model.processor(messages(d)), Options.create(**options))] = d
        for task, event in scheduler.run():
            if event.reply is not None:
                replies[task] = event.reply
        took = time.perf_counter() - started
    for task, d in tasks.items():
        made = len(replies[task].token_ids), len(replies[task].codec_ids)
        if made != (d.tokens, d.codes if spoken else 0):
            raise RuntimeError(f"{d} was asked for, and {made} tokens and codes came")
    load, times = scheduler.load, scheduler.timings
    shares = {"prompts": load.read, "text": load.think, "speech": load.talk, "sound": load.voice}
    return dict(
        seconds=took,
        compilations=compiled.count,
        padding={name: 1 - s.used / s.computed for name, s in shares.items() if s.computed},
        stages=dict(prompts=times.prefill, text=times.decode, speech=times.talk, sound=times.wave),
    )

"""After a warm-up no request waits for the compiler, in whatever way it is asked."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import omni_jax
from omni_jax.engine.warmup import Compilations
from omni_jax.generation.model import OmniModel
from tests.generation.test_model_speech import ask
from tests.generation.test_stream import QUESTIONS
from tests.generation.test_zero_shot import CountedTokenizer

WAYS = ("generate", "stream", "generate_batch", "listen")
VOICES = ("Chelsie", "Ethan", "long clip")
RATE = 16_000
CLIP_SECONDS = 12.0  # of voices that requests bring along


def load_with_voices(folder: Path) -> OmniModel:
    """With a third voice, whose clip is of another bucket than those of the others."""
    jax.clear_caches()  # what other tests have compiled does not count
    model = omni_jax.load(folder)
    voice = model.voices["Ethan"]
    clip = np.random.default_rng(0).standard_normal((1, 700, voice.ref_mel.shape[2])).astype(np.float32)
    model.voices = {**model.voices, "long clip": dataclasses.replace(voice, name="long clip", ref_mel=clip)}
    return OmniModel(model.config, model.processor, model.engines, model.voices, None, CountedTokenizer())


def make_clip_voice(seconds: float) -> omni_jax.ClonedVoice:
    """Of a short clip, the text too."""
    samples = np.random.default_rng(int(1000 * seconds)).standard_normal(int(seconds * RATE))
    text = None if seconds > CLIP_SECONDS / 3 else "some words " * int(seconds)
    return omni_jax.ClonedVoice(samples, text, sampling_rate=RATE, speaker_vector=np.ones(12))


def answer(
    model: OmniModel, way: str, question: list[dict[str, Any]], batch_size: int, options: dict[str, Any]
) -> None:
    if way == "generate":
        assert model.generate(question, **options).text is not None
    elif way == "generate_batch":
        replies = model.generate_batch([question, ask("hello"), ask("another one")], batch_size=batch_size, **options)
        assert [reply.error for reply in replies] == [None] * 3
    elif way == "stream":
        *_, last = model.stream(question, **options)
        assert last.reply is not None
    else:
        session = model.listen(**options)
        noise = 0.1 * np.random.default_rng(0).standard_normal(5 * RATE)
        for begin in range(0, len(noise), RATE):
            session.audio(noise[begin : begin + RATE], RATE)
        *_, last = session.answer("what was that?")
        assert last.reply is not None


def answer_mixed(model: OmniModel, number: int, *, tokens: int, batch_size: int = 8) -> int:
    """So many requests, spoken and not, with prompts and speech of up to ``tokens``.

    Returns:
      How many programs they compiled.
    """
    rng = np.random.default_rng(0)
    names = list(QUESTIONS)
    with Compilations() as compilations:
        for i in range(number):
            options: dict[str, Any] = dict(
                temperature=float(i % 2), top_p=0.9, seed=i, max_tokens=int(rng.integers(1, 60))
            )
            question = QUESTIONS[names[i % len(names)]]
            if i % 3:
                options |= dict(modalities=("text", "audio"), voice=VOICES[i % 3])
                if i % 2:
                    options["voice"] = make_clip_voice(float(rng.uniform(1, CLIP_SECONDS / (1 + i % 4))))
                options["talker"] = dict(max_tokens=int(rng.integers(1, 120)))
            elif i % 6 == 0:
                # the template and the reply take some tokens too; a word of this takes one or two
                words = int(rng.integers(1, (tokens - 200) // 2))
                question = ask("word " * words)
            answer(model, WAYS[i // 2 % len(WAYS)], question, batch_size, options)
    return compilations.count


def test_nothing_compiles_after_a_warm_up(tiny_model: Path) -> None:
    model = load_with_voices(tiny_model)
    assert model.warmup(tokens=1024, windows=2, batch_size=2, clip_seconds=CLIP_SECONDS).count > 20
    assert answer_mixed(model, 12, tokens=1024, batch_size=2) == 0


@pytest.mark.long
def test_thirty_requests_after_a_warm_up_for_long_prompts(tiny_model: Path) -> None:
    model = load_with_voices(tiny_model)
    model.warmup(tokens=8192, clip_seconds=CLIP_SECONDS)
    assert answer_mixed(model, 30, tokens=8192) == 0

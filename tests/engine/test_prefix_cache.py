"""Prompts of earlier turns are not prefilled again, and nothing of an answer changes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import omni_jax
from omni_jax.engine.outputs import Reply
from omni_jax.engine.prefix_cache import MIN_TOKENS, PrefixCache
from omni_jax.engine.prompt_key import PromptKey
from omni_jax.engine.request import SchedulerConfig
from omni_jax.engine.scheduler import Scheduler
from omni_jax.generation.options import Options

MEDIA = Path(__file__).parents[1] / "media"
MUCH = 1 << 30
TALKER = {"max_tokens": 30, "temperature": 0.0}
SPEECH: dict[str, Any] = {"modalities": ("text", "audio"), "talker": TALKER}
FIRST = {
    "role": "user",
    "content": [
        {"type": "image", "image": str(MEDIA / "picture.jpg")},
        {"type": "video", "video": str(MEDIA / "video.mp4")},
        {"type": "text", "text": "What is this?"},
    ],
}
SECOND = {
    "role": "user",
    "content": [{"type": "audio", "audio": str(MEDIA / "speech.wav")}, {"type": "text", "text": "And this?"}],
}


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> omni_jax.OmniModel:
    return omni_jax.load(tiny_model)


def ask(model: omni_jax.OmniModel, scheduler: Scheduler, messages: list[Any], *, live: bool, **options: Any) -> Reply:
    chosen = Options.create(max_tokens=8, **options)
    prompt = model.processor(messages, max_length=4000)
    key = PromptKey.create(prompt, chosen.adapter, model.config.thinker_config)
    state = model.submit(scheduler, prompt, chosen, live=live, key=key)
    *_, event = scheduler.run_alone(state)
    assert event.reply is not None
    return event.reply


def make_scheduler(model: omni_jax.OmniModel, prefix_bytes: int = MUCH) -> Scheduler:
    return model.scheduler(SchedulerConfig(2, 2, prefix_bytes=prefix_bytes))


def take_turns(model: omni_jax.OmniModel, scheduler: Scheduler, *, live: bool = True, **options: Any) -> list[Reply]:
    """Three turns of one dialogue; the replies."""
    messages: list[Any] = []
    replies = []
    for message in (FIRST, SECOND, {"role": "user", "content": "Thank you."}):
        messages.append(message)
        # the first is streamed in any case, so that there is something to go on from
        replies.append(ask(model, scheduler, messages, live=live or len(messages) == 1, **options))
        messages.append({"role": "assistant", "content": replies[-1].text})
    return replies


@pytest.mark.parametrize("live, options", [(True, {}), (True, SPEECH), (False, {}), (False, SPEECH)])
def test_later_turns_answer_the_same_from_what_was_kept(
    model: omni_jax.OmniModel, live: bool, options: dict[str, Any]
) -> None:
    kept = take_turns(model, make_scheduler(model), live=live, **options)
    anew = take_turns(model, make_scheduler(model, 0), live=live, **options)
    for mine, its in zip(kept, anew, strict=True):
        assert (mine.token_ids, mine.codec_ids) == (its.token_ids, its.codec_ids)
        assert its.usage.cached in (0, mine.usage.cached)
    first, second, third = (reply.usage for reply in kept)
    assert first.cached == 0 and second.cached == first.total and third.cached == second.total


def test_a_prefix_without_the_talker_is_not_gone_on_from_in_speech(model: omni_jax.OmniModel) -> None:
    scheduler = make_scheduler(model)
    reply = ask(model, scheduler, [FIRST], live=True)
    turns = [FIRST, {"role": "assistant", "content": reply.text}, SECOND]
    assert ask(model, scheduler, turns, live=False).usage.cached == reply.usage.total
    assert ask(model, scheduler, turns, live=True, **SPEECH).usage.cached == 0


def test_other_media_and_other_words_are_other_prompts(model: omni_jax.OmniModel) -> None:
    def key(*messages: Any, adapter: str | None = None) -> PromptKey:
        prompt = model.processor(list(messages), max_length=4000)
        return PromptKey.create(prompt, adapter, model.config.thinker_config)

    answer = {"role": "assistant", "content": "A picture."}
    first = key(FIRST)
    assert first.begins(key(FIRST, answer, SECOND)) and not first.begins(first) and first.equals(key(FIRST))
    assert not first.begins(key(FIRST, answer, SECOND, adapter="other"))
    changed = [dict(part) for part in FIRST["content"]]
    pixels = np.asarray(model.processor.read_picture(str(MEDIA / "picture.jpg"))).copy()
    pixels[0, 0] ^= 255
    changed[0]["image"] = pixels
    assert not first.begins(key({"role": "user", "content": changed}, answer, SECOND))
    changed[0] = {**FIRST["content"][0]}
    changed[1] = {**FIRST["content"][1], "fps": 1.0}
    assert not first.begins(key({"role": "user", "content": changed}, answer, SECOND))
    assert not key({"role": "user", "content": "One?"}).begins(key({"role": "user", "content": "Two?"}, answer, SECOND))


def test_memory_is_bounded(model: omni_jax.OmniModel) -> None:
    scheduler = make_scheduler(model)
    words = " and".join(["so on"] * MIN_TOKENS)
    questions = [f"{number} {words}" for number in range(4)]
    for text in questions:
        ask(model, scheduler, [{"role": "user", "content": text}], live=True)
    cache: PrefixCache = scheduler._prefill._cache
    of_one = cache.num_bytes // len(questions)
    assert of_one * len(questions) == cache.num_bytes > 0

    scheduler = make_scheduler(model, 2 * of_one + 1)
    for text in questions:
        ask(model, scheduler, [{"role": "user", "content": text}], live=True)
        assert scheduler._prefill._cache.num_bytes <= 2 * of_one

    def cached(text: str) -> int:
        turns = [{"role": "user", "content": text}, {"role": "assistant", "content": "Yes."}]
        return ask(model, scheduler, [*turns, {"role": "user", "content": "Why?"}], live=False).usage.cached

    # the latest two are there
    assert cached(questions[-1]) and cached(questions[-2])
    assert not cached(questions[0])

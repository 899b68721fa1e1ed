"""OmniModel as its users meet it, on a small random model."""

from __future__ import annotations

import dataclasses
import itertools
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import omni_jax
from omni_jax.checkpoint.convert import to_jax
from omni_jax.config import OmniConfig
from omni_jax.errors import CheckpointError, InputError
from omni_jax.generation.model import OmniModel
from tools.make_checkpoint import write_checkpoint


def ask(*content: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [{"type": "text", "text": c} if isinstance(c, str) else c for c in content]}]


TONE = np.sin(np.arange(16_000) * 0.1).astype(np.float32)
SOUND = {"type": "audio", "audio": TONE, "sampling_rate": 16_000}
PICTURE = {"type": "image", "image": np.arange(56 * 84 * 3, dtype=np.uint8).reshape(56, 84, 3)}


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> OmniModel:
    return omni_jax.load(tiny_model)


def test_the_stream_adds_up_to_the_reply(model: OmniModel) -> None:
    events = list(model.stream(ask("hello world"), max_tokens=30))
    reply = events[-1].reply
    assert reply is not None
    assert all(e.reply is None for e in events[:-1])
    assert "".join(e.text or "" for e in events) == reply.text
    assert reply == model.generate(ask("hello world"), max_tokens=30)
    assert (len(reply.token_ids), reply.finish_reason) == (30, "length")
    assert len(events) > 3  # several steps a call, several calls a reply


def test_a_stream_can_be_left(model: OmniModel) -> None:
    stream = model.stream(ask("hello world"), max_tokens=200)
    next(stream)
    stream.close()
    assert model.generate(ask("hello world"), max_tokens=3).token_ids


def test_usage_counts_by_kind(model: OmniModel) -> None:
    usage = model.generate(ask("see and hear", PICTURE, SOUND), max_tokens=1).usage
    assert (usage.image, usage.audio, usage.video) == (6, 25, 0)
    assert usage.audio_seconds == 1.0


def test_the_same_seed_says_the_same(model: OmniModel) -> None:
    warm = dict(max_tokens=24, temperature=1.0, top_k=50, top_p=0.95)
    one, again, other = (model.generate(ask("hello"), seed=s, **warm).token_ids for s in (1, 1, 2))
    assert one == again != other


@pytest.mark.parametrize("options", [{}, dict(temperature=1.3, repetition_penalty=1.2, seed=5)])
def test_a_row_of_a_batch_equals_its_single_run(model: OmniModel, options: dict[str, Any]) -> None:
    conversations = [ask("hello"), ask("a longer question " * 12), ask(SOUND, "what?"), ask(PICTURE, PICTURE), ask("b")]
    single = [model.generate(c, max_tokens=12, **options).token_ids for c in conversations]
    for size in (2, 8):
        replies = model.generate_batch(conversations, batch_size=size, max_tokens=12, **options)
        assert [r.token_ids for r in replies] == single


def test_a_bad_row_fails_alone(model: OmniModel) -> None:
    bad = ask({"type": "image", "image": "no-such-file.png"})
    replies = model.generate_batch([ask("hello"), bad, ask("world")], max_tokens=4)
    assert [r.finish_reason for r in replies] == ["length", "error", "length"]
    assert replies[1].error is not None
    assert re.search(r"messages\[0\]\.content\[0\].*no-such-file\.png", replies[1].error)
    assert replies[2].token_ids == model.generate(ask("world"), max_tokens=4).token_ids


def test_no_rows(model: OmniModel) -> None:
    assert model.generate_batch([]) == []
    with pytest.raises(InputError, match="batch_size is 0; it must be from 1 to 4096"):
        model.generate_batch([ask("x")], batch_size=0)


def test_stop_id_and_stop_string(model: OmniModel) -> None:
    plain = model.generate(ask("hello"), max_tokens=20)
    third = plain.token_ids[2]
    stopped = model.generate(ask("hello"), max_tokens=20, stop_token_ids=(third,))
    assert stopped.token_ids == plain.token_ids[: plain.token_ids.index(third) + 1]
    assert stopped.finish_reason == "stop"
    word = plain.text[4:6]
    stopped = model.generate(ask("hello"), max_tokens=20, stop=word)
    assert stopped.text == plain.text[: plain.text.index(word)]
    assert stopped.finish_reason == "stop"


def test_a_mistake_is_told_before_any_work(model: OmniModel) -> None:
    with pytest.raises(InputError, match="unknown option max_new_tokens"):
        model.stream(ask("hello"), max_new_tokens=3)
    with pytest.raises(InputError, match="content"):
        model.stream([{"role": "user", "content": [{"type": "smell"}]}])


def test_the_end_of_the_context(tmp_path: Path) -> None:
    config = OmniConfig.tiny()
    text = dataclasses.replace(config.thinker_config.text_config, max_position_embeddings=64)
    config = dataclasses.replace(config, thinker_config=dataclasses.replace(config.thinker_config, text_config=text))
    write_checkpoint(tmp_path / "published", config, dtype="float32")
    to_jax(tmp_path / "published", tmp_path / "ours")
    model = omni_jax.load(tmp_path / "ours")
    reply = model.generate(ask("hello"), max_tokens=1000)
    assert (reply.usage.total + len(reply.token_ids), reply.finish_reason) == (64, "length")
    with pytest.raises(InputError, match=r"the prompt has \d+ tokens, over the limit of 63 \(\d+ text"):
        model.generate(ask("hello " * 40))


def test_bfloat16(tiny_model: Path) -> None:
    model = omni_jax.load(tiny_model, dtype="bfloat16")
    reply = model.generate(ask(PICTURE, SOUND, "hello"), max_tokens=8)
    assert len(reply.token_ids) == 8


def test_a_folder_that_is_no_checkpoint(tmp_path: Path, tiny_checkpoint: Path) -> None:
    for folder in (tmp_path, tiny_checkpoint):
        with pytest.raises(CheckpointError, match=r"is no checkpoint of omni_jax: .*tools/convert\.py to-jax"):
            omni_jax.load(folder)


def test_timings_hold_all_calls(tiny_model: Path) -> None:
    """Also the last call of a reply, and the only one."""
    model = omni_jax.load(tiny_model)
    ticks = itertools.count()
    model.engines = dataclasses.replace(model.engines, clock=lambda: float(next(ticks)))
    timings = model.generate(ask("hello"), max_tokens=1).timings
    assert timings.prepare > 0 and timings.prefill > 0 and timings.decode > 0
    spoken = model.generate(ask("hello"), max_tokens=4, modalities=("text", "audio"), talker=dict(max_tokens=4)).timings
    assert spoken.talker > 0 and spoken.token2wav > 0

"""Replies as they come: the pieces, their order, what is left when a stream is closed, and what is compiled."""

from __future__ import annotations

import gc
import itertools
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import omni_jax
from omni_jax.engine.request import ChunkSizes
from omni_jax.engine.warmup import Compilations
from omni_jax.generation.model import OmniModel
from tests.engine.speaking import suppress_ends
from tests.generation.test_model_speech import PICTURE, SOUND, ask

MEDIA = Path(__file__).parents[1] / "media"
SAMPLES_A_CODE = 480
SPEAK: dict[str, Any] = dict(modalities=("text", "audio"))
# the penalty keeps a random model from repeating one code without end
GREEDY = dict(temperature=0.0, repetition_penalty=2.0)
SMALL = dict(max_pixels=28 * 28 * 16, min_pixels=28 * 28 * 4)
QUESTIONS = {
    "text": ask("hello"),
    "a long text": ask("a longer question " * 12),
    "picture": ask(PICTURE, "what?"),
    "sound": ask(SOUND),
    "silent video": ask({"type": "video", "video": str(MEDIA / "silent.mp4"), **SMALL}, "what?"),
    "video with sound": ask({"type": "video", "video": str(MEDIA / "video.mp4"), **SMALL}, "what?"),
    "all": ask(SOUND, PICTURE, {"type": "video", "video": str(MEDIA / "video.mp4"), **SMALL}, "what?"),
}


def endless(folder: Path, **options: Any) -> OmniModel:
    """A model whose greedy speech goes on to its limit."""
    model = omni_jax.load(folder, **options)
    assert model.engines.talker is not None
    suppress_ends(model.engines.talker, model.config)
    return model


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> OmniModel:
    return endless(tiny_model)


@pytest.mark.parametrize("name", QUESTIONS)
def test_the_stream_gives_what_generate_gives(model: OmniModel, name: str) -> None:
    """Ids of text and codes alike: only the sound is made otherwise, by blocks."""
    options = dict(**SPEAK, max_tokens=30, talker=dict(max_tokens=70, **GREEDY))
    whole = model.generate(QUESTIONS[name], **options)
    events = list(model.stream(QUESTIONS[name], **options))
    reply = events[-1].reply
    assert reply is not None and reply.audio is not None
    assert (reply.token_ids, reply.codec_ids, reply.text) == (whole.token_ids, whole.codec_ids, whole.text)
    assert len(reply.codec_ids) == 70
    assert "".join(e.text or "" for e in events) == reply.text
    assert np.array_equal(np.concatenate([e.audio for e in events if e.audio is not None]), reply.audio)
    assert len(reply.audio) == SAMPLES_A_CODE * len(reply.codec_ids)


def test_sound_comes_before_the_text_has_ended(model: OmniModel) -> None:
    events = list(model.stream(QUESTIONS["text"], **SPEAK, max_tokens=90, talker=dict(max_tokens=120, **GREEDY)))
    kinds = ["text" if e.text else "sound" for e in events if e.reply is None]
    assert kinds.index("sound") < len(kinds) - kinds[::-1].index("text") - 1
    assert kinds[0] == "text"


def test_a_stop_string_ends_speech_where_it_ends_text(model: OmniModel) -> None:
    """What may be the beginning of a stop string is spoken only when it turns out not to be."""
    options = dict(**SPEAK, max_tokens=40, talker=dict(max_tokens=70, **GREEDY))
    text = model.generate(QUESTIONS["sound"], **options).text
    stop = text[len(text) // 2 :][:3]
    whole = model.generate(QUESTIONS["sound"], **options, stop=stop)
    *_, last = model.stream(QUESTIONS["sound"], **options, stop=stop)
    assert whole.finish_reason == "stop" and stop not in whole.text
    assert last.reply == whole


@pytest.mark.long
@pytest.mark.parametrize("sizes", [ChunkSizes(1, 1, 1, 24, 12), ChunkSizes(64, 64, 64, 60, 24)])
def test_chunk_sizes_change_nothing_but_the_pieces(tiny_model: Path, model: OmniModel, sizes: ChunkSizes) -> None:
    options = dict(**SPEAK, max_tokens=20, talker=dict(max_tokens=66, **GREEDY))
    *_, usual = model.stream(QUESTIONS["picture"], **options)
    *_, other = endless(tiny_model, chunk_sizes=sizes).stream(QUESTIONS["picture"], **options)
    assert usual.reply is not None and other.reply is not None
    assert (other.reply.token_ids, other.reply.codec_ids) == (usual.reply.token_ids, usual.reply.codec_ids)
    assert usual.reply.audio is not None and other.reply.audio is not None
    assert np.abs(other.reply.audio - usual.reply.audio).max() < 1e-3  # as for batches, see test_model_speech.py


@pytest.mark.parametrize(("tokens", "codes"), [(1, 0), (2, 1), (2, 5), (3, 12), (3, 13), (2, 36)])
def test_short_replies_are_whole(model: OmniModel, tokens: int, codes: int) -> None:
    options = dict(**SPEAK, max_tokens=tokens, talker=dict(max_tokens=max(codes, 1), **GREEDY))
    events = list(model.stream(QUESTIONS["text"], **options))
    reply = events[-1].reply
    assert reply is not None and reply.audio is not None
    assert (len(reply.codec_ids), len(reply.audio)) == (codes, SAMPLES_A_CODE * codes)
    assert sum(len(e.audio) for e in events if e.audio is not None) == SAMPLES_A_CODE * codes


def held() -> int:
    """Bytes of all arrays that are alive."""
    gc.collect()
    return sum(a.nbytes for a in jax.live_arrays())


def test_a_closed_stream_leaves_nothing(model: OmniModel) -> None:
    options = dict(**SPEAK, max_tokens=60, talker=dict(max_tokens=100, **GREEDY))
    list(model.stream(QUESTIONS["picture"], **options))
    before = held()
    for count in (1, 6):
        stream = model.stream(QUESTIONS["picture"], **options)
        taken = list(itertools.islice(stream, count))
        assert taken and held() > before
        stream.close()
        del stream, taken
        assert held() == before


def test_a_second_model_of_equal_config_compiles_nothing(tiny_model: Path) -> None:
    """Programs belong to the module that computes, not to the object that was loaded."""
    options = dict(**SPEAK, max_tokens=8, talker=dict(max_tokens=40, **GREEDY))
    first = omni_jax.load(tiny_model)
    reply = first.generate(QUESTIONS["all"], **options)
    *_, last = first.stream(QUESTIONS["all"], **options)
    with Compilations() as compiled:
        second = omni_jax.load(tiny_model)
        assert second.generate(QUESTIONS["all"], **options) == reply
        *_, again = second.stream(QUESTIONS["all"], **options)
    assert again.reply == last.reply
    assert compiled.count == 0

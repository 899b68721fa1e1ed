"""The Talker's loop on a small random model: what a row's codes depend on, and its ends."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from omni_jax.config import OmniConfig
from omni_jax.engine import thinker_engine as text
from omni_jax.engine.talker_engine import Said, SpeechRequest, TalkerParams, _shares, suppressed_codes
from omni_jax.engine.thinker_engine import PAD_TOKEN
from omni_jax.errors import CheckpointError, InputError
from omni_jax.processing.layout import Prompt, lay_out
from tests.engine.speaking import SLOTS, Line, Parts, after, said_all
from tests.generation import speaking

SPEAKERS = (603, 604)
CONFIG = OmniConfig.tiny()
GREEDY: dict[str, Any] = dict(temperature=0.0, repetition_penalty=2.0)  # which keeps off one code for ever


@pytest.fixture(scope="module")
def parts(tiny_model: Path) -> Parts:
    return Parts(tiny_model)


@pytest.fixture(scope="module")
def endless(tiny_model: Path) -> Parts:
    parts = Parts(tiny_model)
    parts.silence_ends()
    return parts


def a_prompt(length: int) -> Prompt:
    return lay_out(np.random.default_rng(length).integers(0, 500, length).tolist(), [], CONFIG.thinker_config)


def a_line(length: int, said: int, **talk: Any) -> Line:
    """A prompt of ``length`` tokens, a reply of ``said``, and options of the Talker."""
    return Line(a_prompt(length), said, SPEAKERS[length % 2], TalkerParams.create({"max_tokens": 20, **talk}, CONFIG))


def test_a_row_of_a_batch_equals_its_single_run(endless: Parts) -> None:
    """Unequal prompts, replies, limits and settings; five rows at their own lengths, and one that holds nothing."""
    lines = [a_line(5, 9, seed=1), a_line(70, 2, seed=1), a_line(30, 4, max_tokens=33, temperature=1.5, top_k=0)]
    lines += [a_line(6, 12, temperature=0.0), a_line(64, 1)]
    replies, codes = endless.say(lines)
    for i, line in enumerate(lines):
        assert ([replies[i]], [codes[i]]) == endless.say([line])
    assert [len(c) for c in codes[3:]] == [20, 0]
    assert all(codes[:3])


def test_seed_and_voice(endless: Parts) -> None:
    line = a_line(8, 6, temperature=1.0)
    other_seed = dataclasses.replace(line, talk=dataclasses.replace(line.talk, seed=2**32 - 1))
    other_voice = dataclasses.replace(line, speaker=SPEAKERS[1])
    _, (one, again, seed, voice) = endless.say([line, line, other_seed, other_voice])
    assert one == again
    assert one != seed
    assert one != voice


def test_short_replies(endless: Parts) -> None:
    """One token: nothing was read that could be spoken. Two: the first is."""
    replies, codes = endless.say([a_line(n, said, **GREEDY) for n, said in ((5, 1), (6, 2), (7, 3))])
    assert [len(r) for r in replies] == [1, 2, 3]
    assert [len(c) for c in codes] == [0, 20, 20]
    assert endless.say([a_line(5, 1)])[1] == [[]]


def hearing(parts: Parts, heard: np.ndarray, lines: list[Line], replies: list[int]) -> list[list[int]]:
    """The codes of rows whose Thinker gave ``heard``: the prompt, then the reply."""
    state = parts.speech.empty(len(heard), SLOTS)
    for stretch in parts.plan([line.prompt for line in lines], len(heard)).stretches:
        state = parts.speech.read(state, heard, stretch.chunk)
    return parts.speak(state, heard, lines, replies)


def test_an_empty_reply(endless: Parts) -> None:
    heard = np.ones((2, 64, CONFIG.talker_config.embedding_size), np.float32)
    lines = [
        a_line(4, 0, **GREEDY),
        dataclasses.replace(a_line(4, 4), talk=TalkerParams.create({"max_tokens": 3}, CONFIG)),
    ]
    assert [len(c) for c in hearing(endless, heard, lines, [0, 4])] == [0, 3]


def test_padding_has_no_part_in_the_codes(endless: Parts) -> None:
    """What stands behind the reply, even where it is no number."""
    rng = np.random.default_rng(0)
    plain = rng.standard_normal((1, 64, CONFIG.talker_config.embedding_size)).astype(np.float32)
    speak = functools.partial(hearing, endless, lines=[a_line(20, 6, **GREEDY)], replies=[6])
    padded = plain.copy()
    padded[:, 25:] = np.nan
    assert speak(padded) == speak(plain)
    padded[:, 24] = 1e6
    assert speak(padded) != speak(plain)


def test_the_shares_of_the_text() -> None:
    """Section 7.2: r_1 ... r_{N-2}, the end, then padding for ever; r_0 was read with the prompt."""
    heard = np.array([7, 8, 10, 11, 12, 13, 14, 15], np.float32)[None, :, None]
    marks = np.array([-3, -1, -2], np.float32)[None, :, None]
    for said, shares in ((2, [-1, -2, -2, -2, -2, -2]), (4, [11, 12, -1, -2, -2, -2]), (6, [11, 12, 13, 14, -1, -2])):
        last = said_all([2], [said], 1).last
        made = [_shares(2, heard, np.array([2]), np.array([step]), last, marks)[0, :, 0] for step in (0, 2, 4)]
        assert np.concatenate(made).tolist() == shares


def test_codes_follow_the_text_as_it_comes(endless: Parts) -> None:
    """Rows of the reply as they come, in several pieces and each row at its own pace, give the codes of the whole."""
    lines = [a_line(5, 40, **GREEDY), a_line(70, 30, seed=3), a_line(9, 2)]
    thinker, speech = endless.read([line.prompt for line in lines])
    replies, thinker = endless.reply(thinker, lines)
    heard, lengths = thinker.heard, np.array([*map(len, replies)])
    assert heard is not None
    whole = endless.speak(jax.tree.map(jnp.copy, speech), heard, lines, lengths.tolist())
    prompts, rows = np.array([5, 70, 9]), 3
    requests = {i: SpeechRequest(len(r.prompt), len(r.prompt), r.speaker, r.talk) for i, r in enumerate(lines)}
    spans, made = after([line.prompt for line in lines], rows, CONFIG), []
    speech = endless.speech.begin(speech, heard, requests, spans)
    for known in range(2, 44, 3):
        tokens = np.minimum(lengths, known + np.array([0, 4, 0]))
        said = Said(prompts, tokens, np.full(rows, known > 40))
        assert (endless.speech.ready(speech, said) <= 20).all()
        codes, speech = endless.speech.advance(speech, heard, said, 1 + known % 5)
        made.append(codes)
    while endless.speech.ready(speech, said).any():
        codes, speech = endless.speech.advance(speech, heard, said)
        made.append(codes)
    assert [row[row != PAD_TOKEN].tolist() for row in np.concatenate(made, axis=1)] == whole


def test_the_end_is_cut_off_and_ids_that_are_no_sound_are_never_said(parts: Parts) -> None:
    lines = [a_line(n, 4, seed=n, temperature=50.0, top_k=0, top_p=1.0, max_tokens=500) for n in range(3, 11)]
    _, codes = parts.say(lines)  # as good as uniform over 66 codes and two ends
    assert all(len(c) < 500 for c in codes)
    assert 60 < len({code for row in codes for code in row}) <= 66
    assert max(code for row in codes for code in row) <= CONFIG.token2wav_config.dit_config.num_embeds


def test_barred_codes_of_the_published_models() -> None:
    for config in (OmniConfig.qwen2_5_omni_7b(), OmniConfig.qwen2_5_omni_3b()):
        suppressed = suppressed_codes(config)
        assert np.flatnonzero(~suppressed).tolist() == [*range(8194), 8292, 8294]


def test_a_cache_that_grows_changes_no_code(endless: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [a_line(5, 9, max_tokens=150, **GREEDY), a_line(70, 3, seed=1, max_tokens=150)]
    _, codes = endless.say(lines)
    assert len(codes[0]) == 150
    monkeypatch.setattr(text, "_ROOM", 16)
    monkeypatch.setattr(speaking, "SLOTS", 80)
    assert endless.say(lines)[1] == codes


def test_the_end_of_the_context(tiny_model: Path) -> None:
    parts = Parts(tiny_model)
    parts.silence_ends()
    talker = dataclasses.replace(parts.config.talker_config, max_position_embeddings=32)
    parts.speech._config = dataclasses.replace(parts.config, talker_config=talker)
    assert [len(c) for c in parts.say([a_line(n, 3, **GREEDY) for n in (25, 28, 31)])[1]] == [5, 2, 0]


def test_defaults_are_the_published_ones() -> None:
    assert TalkerParams.create({}, CONFIG) == TalkerParams(0.9, 40, 0.8, 1.05, 4096, 0)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"speed": 2}, "unknown talker option speed; known: temperature, top_k"),
        ({"temperature": -1}, "talker temperature is -1; it must be at least 0"),
        ({"top_p": 0}, "talker top_p is 0; it must be above 0"),
        ({"max_tokens": 0}, "talker max_tokens is 0; it must be at least 1 and at most 16384"),
        ({"max_tokens": 16385}, "talker max_tokens is 16385; .* at most 16384"),
        (0.9, r"talker is 0\.9; it must be a dict"),
    ],
)
def test_a_wrong_option(given: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        TalkerParams.create(given, CONFIG)


def test_a_voice_that_begins_with_no_word(parts: Parts) -> None:
    line = dataclasses.replace(a_line(5, 3), speaker=640)
    with pytest.raises(CheckpointError, match="the voice begins with the text id 640, but the Thinker has 640 ids"):
        parts.say([line])

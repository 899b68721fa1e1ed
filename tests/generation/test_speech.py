"""The Talker's loop on a small random model: what a row's codes depend on, and its ends."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from omni_jax.config import OmniConfig
from omni_jax.errors import CheckpointError, InputError
from omni_jax.generation import speech
from omni_jax.generation.sampling import Sampling
from omni_jax.generation.speech import SpeechRequest, Talk, _shares, barred_codes
from omni_jax.generation.text import Conditioning, TextRequest
from omni_jax.processing.collate import collate
from omni_jax.processing.layout import Prompt, lay_out
from tests.generation.speaking import Line, Parts

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
    return Line(a_prompt(length), said, SPEAKERS[length % 2], Talk.create({"max_tokens": 20, **talk}, CONFIG))


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


def test_an_empty_reply(endless: Parts) -> None:
    width = CONFIG.talker_config.embedding_size
    heard = Conditioning(np.ones((2, 64, width), np.float32), np.ones((2, 8, width), np.float32))
    talk = Talk.create({"max_tokens": 3, **GREEDY}, CONFIG)
    requests = [SpeechRequest(a_prompt(4), reply, SPEAKERS[0], talk) for reply in (0, 4)]
    codes = endless.speech.speak(heard, requests)
    assert [(len(c), c.dtype) for c in codes] == [(0, np.int32), (3, np.int32)]
    assert [len(c) for c in endless.speech.speak(heard, requests[:1])] == [0]


def test_padding_has_no_part_in_the_codes(endless: Parts) -> None:
    """Neither the prompt's padding nor what stands after the reply, even where it is huge."""
    rng, width = np.random.default_rng(0), CONFIG.talker_config.embedding_size
    prompt, reply = (rng.standard_normal((1, n, width)).astype(np.float32) for n in (64, 16))
    request = SpeechRequest(a_prompt(20), 6, SPEAKERS[0], Talk.create({"max_tokens": 24, **GREEDY}, CONFIG))
    speak = functools.partial(endless.speech.speak, requests=[request])
    plain = speak(Conditioning(prompt, reply))[0]
    padded_prompt, padded_reply = prompt.copy(), reply.copy()
    padded_prompt[:, :44], padded_reply[:, 5:] = 1e6, np.nan
    assert np.array_equal(speak(Conditioning(padded_prompt, padded_reply))[0], plain)
    padded_reply[:, 4] = 1e6
    assert not np.array_equal(speak(Conditioning(prompt, padded_reply))[0], plain)


def test_the_shares_of_the_text() -> None:
    """Section 7.2: r_1 ... r_{N-2}, the end, then padding for ever; r_0 was read with the prompt."""
    reply = np.arange(10, 16, dtype=np.float32)[None, :, None]
    for said, shares in ((2, [-1, -2, -2, -2, -2, -2]), (4, [11, 12, -1, -2, -2, -2]), (6, [11, 12, 13, 14, -1, -2])):
        last = np.array([[[said - 1]]])
        assert _shares(reply, np.full((1, 1, 1), -1.0), np.full((1, 1, 1), -2.0), last)[0, :, 0].tolist() == shares


def test_the_end_is_cut_off_and_ids_that_are_no_sound_are_never_said(parts: Parts) -> None:
    lines = [a_line(n, 4, seed=n, temperature=50.0, top_k=0, top_p=1.0, max_tokens=500) for n in range(3, 11)]
    _, codes = parts.say(lines)  # as good as uniform over 66 codes and two ends
    assert all(len(c) < 500 for c in codes)
    assert 60 < len({code for row in codes for code in row}) <= 66
    assert max(code for row in codes for code in row) <= CONFIG.token2wav_config.dit_config.num_embeds


def test_barred_codes_of_the_published_models() -> None:
    for config in (OmniConfig.qwen2_5_omni_7b(), OmniConfig.qwen2_5_omni_3b()):
        barred = barred_codes(config)
        assert np.flatnonzero(~barred).tolist() == [*range(8194), 8292, 8294]


def test_a_cache_that_grows_changes_no_code(endless: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [a_line(5, 9, max_tokens=150, **GREEDY), a_line(70, 3, seed=1, max_tokens=150)]
    _, codes = endless.say(lines)
    assert len(codes[0]) == 150
    monkeypatch.setattr(speech, "_ROOM", 1)
    assert endless.say(lines)[1] == codes


def test_the_end_of_the_context(tiny_model: Path) -> None:
    parts = Parts(tiny_model)
    parts.silence_ends()
    talker = dataclasses.replace(parts.config.talker_config, max_position_embeddings=32)
    parts.speech._config = dataclasses.replace(parts.config, talker_config=talker)
    assert [len(c) for c in parts.say([a_line(n, 3, **GREEDY) for n in (25, 28, 31)])[1]] == [5, 2, 0]


def test_keeping_changes_no_token_and_costs_nothing_if_not_asked_for(endless: Parts) -> None:
    line = a_line(12, 20)
    (reply,), _ = endless.say([line])
    state = endless.text.start(collate([line.prompt], CONFIG), [], [TextRequest(Sampling(), 20, ())])
    assert state.kept is None
    assert [t for made in endless.text.tokens(state) for t in made[0] if t >= 0] == reply


def test_defaults_are_the_published_ones() -> None:
    assert Talk.create({}, CONFIG) == Talk(0.9, 40, 0.8, 1.05, 4096, 0)


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
        Talk.create(given, CONFIG)


def test_a_voice_that_begins_with_no_word(parts: Parts) -> None:
    line = dataclasses.replace(a_line(5, 3), speaker=640)
    with pytest.raises(CheckpointError, match="the voice begins with the text id 640, but the Thinker has 640 ids"):
        parts.say([line])

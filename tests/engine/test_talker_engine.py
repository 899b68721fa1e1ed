"""The Talker's engine on a small random model: what a slot's codes depend on, and its ends."""

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
from omni_jax.engine import decode_state
from omni_jax.engine.request import TalkerParams
from omni_jax.engine.sampling import SamplingParams
from omni_jax.engine.talker_engine import TextProgress
from omni_jax.engine.talker_programs import NO_SLOT, TextCounters, next_text_inputs, suppressed_codes
from omni_jax.errors import CheckpointError, InputError
from omni_jax.processing.layout import Prompt, lay_out
from tests.engine import speaking
from tests.engine.speaking import Dialogue, Parts

VOICE_TOKENS = (603, 604)
CONFIG = OmniConfig.tiny()
GREEDY: dict[str, Any] = dict(temperature=0.0, repetition_penalty=2.0)  # which keeps off one code for ever


@pytest.fixture(scope="module")
def parts(tiny_model: Path) -> Parts:
    return Parts(tiny_model)


@pytest.fixture(scope="module")
def endless(tiny_model: Path) -> Parts:
    parts = Parts(tiny_model)
    parts.suppress_ends()
    return parts


def make_prompt(length: int) -> Prompt:
    return lay_out(np.random.default_rng(length).integers(0, 500, length).tolist(), [], CONFIG.thinker_config)


def make_dialogue(length: int, reply: int, **options: Any) -> Dialogue:
    """A prompt of ``length`` tokens, a reply of ``reply``, and options of the Talker."""
    return Dialogue(
        make_prompt(length),
        reply,
        VOICE_TOKENS[length % 2],
        TalkerParams().override({"max_tokens": 20, **options}, CONFIG),
    )


def test_a_slot_of_a_batch_equals_its_single_run(endless: Parts) -> None:
    """Unequal prompts, replies, limits and settings; five rows at their own lengths, and one that holds nothing."""
    dialogues = [
        make_dialogue(5, 9, seed=1),
        make_dialogue(70, 2, seed=1),
        make_dialogue(30, 4, max_tokens=33, temperature=1.5, top_k=0),
    ]
    dialogues += [make_dialogue(6, 12, temperature=0.0), make_dialogue(64, 1)]
    replies, codes = endless.run(dialogues)
    for i, dialogue in enumerate(dialogues):
        assert ([replies[i]], [codes[i]]) == endless.run([dialogue])
    assert [len(c) for c in codes[3:]] == [20, 0]
    assert all(codes[:3])


def test_seed_and_voice(endless: Parts) -> None:
    dialogue = make_dialogue(8, 6, temperature=1.0)
    seed_params = dataclasses.replace(dialogue.talker.sampling, seed=2**32 - 1)
    other_seed = dataclasses.replace(dialogue, talker=dataclasses.replace(dialogue.talker, sampling=seed_params))
    other_voice = dataclasses.replace(dialogue, voice_token=VOICE_TOKENS[1])
    _, (one, again, seed, voice) = endless.run([dialogue, dialogue, other_seed, other_voice])
    assert one == again
    assert one != seed
    assert one != voice


def test_short_replies(endless: Parts) -> None:
    """One token: nothing was read that could be spoken. Two: the first is."""
    replies, codes = endless.run([make_dialogue(n, reply, **GREEDY) for n, reply in ((5, 1), (6, 2), (7, 3))])
    assert [len(r) for r in replies] == [1, 2, 3]
    assert [len(c) for c in codes] == [0, 20, 20]
    assert endless.run([make_dialogue(5, 1)])[1] == [[]]


def speak_inputs(
    parts: Parts, talker_inputs: np.ndarray, dialogues: list[Dialogue], counts: list[int]
) -> list[list[int]]:
    """The codes of slots whose Thinker gave ``talker_inputs``: the prompt, then the reply."""
    state = parts.talker.init_state(len(dialogues), speaking.CAPACITY)
    for slot, dialogue in enumerate(dialogues):
        context = parts.talker.init_prefix(1, speaking.CAPACITY)
        start = 0
        for chunk in parts.plan(dialogue.prompt).chunks:
            context = parts.prefill_talker(context, talker_inputs[slot : slot + 1], chunk, start)
            start += chunk.num_tokens
        state = parts.talker.insert(state, slot, context)
    return parts.speak(state, talker_inputs, dialogues, counts)


def test_an_empty_reply(endless: Parts) -> None:
    inputs = np.ones((2, 64, CONFIG.talker_config.embedding_size), np.float32)
    dialogues = [make_dialogue(4, 0, **GREEDY), make_dialogue(4, 4, max_tokens=3)]
    assert [len(c) for c in speak_inputs(endless, inputs, dialogues, [0, 4])] == [0, 3]


def test_padding_has_no_part_in_the_codes(endless: Parts) -> None:
    """What stands behind the reply, even where it is no number."""
    rng = np.random.default_rng(0)
    plain = rng.standard_normal((1, 64, CONFIG.talker_config.embedding_size)).astype(np.float32)
    speak = functools.partial(speak_inputs, endless, dialogues=[make_dialogue(20, 6, **GREEDY)], counts=[6])
    padded = plain.copy()
    padded[:, 25:] = np.nan
    assert speak(padded) == speak(plain)
    padded[:, 24] = 1e6
    assert speak(padded) != speak(plain)


def test_the_inputs_of_the_next_codes(endless: Parts) -> None:
    """docs/reference.md, 7.2: r_1 ... r_{N-2}, the end, then padding without end; r_0 was read with the prompt."""
    reply = np.array([10, 11, 12, 13, 14, 15], np.float32)[None, :, None]
    special = np.array([-3, -1, -2], np.float32)[None, :, None]
    state = endless.talker.init_state(1, 256)
    state = dataclasses.replace(state, reply_embeds=reply, special_embeds=special)
    for count, inputs in ((2, [-1, -2, -2, -2, -2, -2]), (4, [11, 12, -1, -2, -2, -2]), (6, [11, 12, 13, 14, -1, -2])):
        made = []
        for step in (0, 2, 4):
            sampling = dataclasses.replace(state.sampling, step=np.array([step]))
            at_step = dataclasses.replace(state, sampling=sampling)
            made += np.asarray(next_text_inputs(at_step, 2, np.array([count - 1])))[0, :, 0].tolist()
        assert made == inputs


def test_codes_follow_the_text_as_it_comes(endless: Parts) -> None:
    """Tokens of the reply as they come, each slot at its own pace, give the codes of the whole.

    Whether the host or the counters on the device say how far the text has come makes no difference.
    """
    dialogues = [make_dialogue(5, 40, **GREEDY), make_dialogue(70, 30, seed=3), make_dialogue(9, 2)]
    prompts = [len(dialogue.prompt) for dialogue in dialogues]
    thinker_state, whole_state = endless.insert_all(dialogues)
    replies, thinker_state = endless.answer(thinker_state, 3)
    inputs, lengths = thinker_state.talker_inputs, np.array([*map(len, replies)])
    assert inputs is not None
    states = [jax.tree.map(jnp.copy, whole_state) for _ in range(2)]
    whole = endless.speak(whole_state, inputs, dialogues, lengths.tolist())
    for by_device, state in zip((False, True), states, strict=True):
        codes: list[list[int]] = [[], [], []]
        for known in range(2, 44, 3):
            tokens = np.minimum(lengths, known + np.array([0, 4, 0]))
            finished = tokens == lengths
            state = endless.append_all(state, inputs, prompts, tokens.tolist())
            if known == 2:
                state = endless.talker.begin(state, endless.requests(dialogues, lengths.tolist()))
            slots = np.arange(3) if by_device else np.full(3, NO_SLOT)
            progress = TextProgress(slots, np.zeros(3, int) if by_device else tokens, finished & (not by_device))
            remaining = np.where(finished, 0, 5)
            counters = TextCounters(tokens.astype(np.int32), remaining.astype(np.int32))
            state, result = endless.talker.decode(endless.talker.resize(state, 512), progress, counters)
            for slot in range(3):
                codes[slot] += result.to_host().at_slot(slot).tolist()
                allowed = 20 if finished[slot] else max(tokens[slot] - 2, 0)
                assert len(codes[slot]) <= allowed
        more, _ = endless.decode_all(state, speaking.finished_text(lengths.tolist(), 3), 3)
        assert [a + b for a, b in zip(codes, more, strict=True)] == whole


def test_the_end_is_cut_off_and_ids_that_are_no_sound_are_never_drawn(parts: Parts) -> None:
    dialogues = [
        make_dialogue(n, 4, seed=n, temperature=50.0, top_k=0, top_p=1.0, max_tokens=500) for n in range(3, 11)
    ]
    _, codes = parts.run(dialogues)  # as good as uniform over 66 codes and two ends
    assert all(len(c) < 500 for c in codes)
    assert 60 < len({code for row in codes for code in row}) <= 66
    assert max(code for row in codes for code in row) <= CONFIG.token2wav_config.dit_config.num_embeds


def test_suppressed_codes_of_the_published_models() -> None:
    for config in (OmniConfig.qwen2_5_omni_7b(), OmniConfig.qwen2_5_omni_3b()):
        suppressed = suppressed_codes(config)
        assert np.flatnonzero(~suppressed).tolist() == [*range(8194), 8292, 8294]


def test_a_cache_that_grows_changes_no_code(endless: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    dialogues = [make_dialogue(5, 9, max_tokens=150, **GREEDY), make_dialogue(70, 3, seed=1, max_tokens=150)]
    _, codes = endless.run(dialogues)
    assert len(codes[0]) == 150
    monkeypatch.setattr(decode_state, "MIN_CAPACITY", 16)
    monkeypatch.setattr(speaking, "CAPACITY", 80)
    assert endless.run(dialogues)[1] == codes


def test_the_end_of_the_context(tiny_model: Path) -> None:
    parts = Parts(tiny_model, max_positions=32)
    parts.suppress_ends()
    dialogues = [make_dialogue(length, 3, **GREEDY) for length in (25, 28, 31)]
    assert [len(codes) for codes in parts.run(dialogues)[1]] == [5, 2, 0]


def test_defaults_are_the_published_ones() -> None:
    assert TalkerParams().override({}, CONFIG) == TalkerParams(SamplingParams(0.9, 40, 0.8, 1.05), 4096)


def test_a_null_of_a_checkpoint_leaves_the_published_default(tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text('{"talker_temperature": 0.5, "talker_top_k": null}')
    assert TalkerParams.load(tmp_path).sampling == SamplingParams(0.5, 40, 0.8, 1.05)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"speed": 2}, "unknown talker option speed; known: temperature, top_k"),
        ({"temperature": -1}, "talker temperature is -1; it must be at least 0"),
        ({"top_p": 0}, "talker top_p is 0; it must be above 0"),
        ({"max_tokens": 0}, "talker max_tokens is 0; it must be from 1 to 16384"),
        ({"max_tokens": 16385}, "talker max_tokens is 16385; it must be from 1 to 16384"),
        (0.9, r"talker is 0\.9; it must be a dict"),
    ],
)
def test_a_wrong_option(given: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        TalkerParams().override(given, CONFIG)


def test_a_voice_that_begins_with_no_token(parts: Parts) -> None:
    dialogue = dataclasses.replace(make_dialogue(5, 3), voice_token=640)
    with pytest.raises(CheckpointError, match="the voice begins with the text id 640, but the Thinker has 640 ids"):
        parts.run([dialogue])

"""Greedy codes against PyTorch, id for id, on real media; and batches against single runs."""

from __future__ import annotations

import dataclasses
from typing import Any
from unittest import mock

import numpy as np
import pytest

from omni_jax.engine.talker_engine import TalkerParams, suppressed_codes
from omni_jax.processing.processor import Processor
from tests.engine.speaking import Line, Parts
from tests.generation.test_text_parity import messages, reference_arguments
from tests.pairs import Whole

STEPS = 60
# the penalty keeps a random model from saying one code for ever
GREEDY = TalkerParams(temperature=0.0, max_tokens=STEPS, repetition_penalty=2.0)
# tokens of the reply to each prompt: unequal, and the shortest that is spoken among them
LENGTHS = {"text": 9, "two sounds": 2, "two pictures": 14, "silent video": 5, "video with sound": 23}
VOICES = ("Chelsie", "Ethan")


class _SpokenError(Exception):
    """Leaves the reference's ``generate`` before Token2Wav."""


def reference_codes(whole: Whole, line: Line, voice: str) -> list[int]:
    """What the reference's Talker says, with the last code, up to its end; our codes are suppressed on its side too."""
    model, c = whole.torch, whole.config.talker_config
    ends = [c.tts_codec_pad_token_id, c.tts_codec_end_token_id]
    speak, spoken = model.talker.generate, []

    def listen(**arguments: Any) -> None:
        arguments["suppress_tokens"] = np.flatnonzero(suppressed_codes(whole.config)).tolist()
        spoken.append(speak(**arguments)[0].tolist())
        raise _SpokenError

    with mock.patch.object(model.talker, "generate", listen), pytest.raises(_SpokenError):
        model.generate(
            **reference_arguments(line.prompt),
            speaker=voice,
            return_audio=True,
            thinker_max_new_tokens=line.max_tokens,
            thinker_do_sample=False,
            thinker_eos_token_id=list(line.stop) or None,
            thinker_pad_token_id=whole.config.thinker_config.pad_token_id,
            talker_max_new_tokens=line.talk.max_tokens,
            talker_do_sample=False,
            talker_repetition_penalty=line.talk.repetition_penalty,
            talker_eos_token_id=ends,
            talker_pad_token_id=ends[0],
        )
    codes = spoken[0][len(line.prompt) + 2 :]
    return codes[: next((i for i, code in enumerate(codes) if code in ends), len(codes))]


@pytest.fixture(scope="module")
def lines(whole: Whole) -> dict[tuple[str, str], Line]:
    processor = Processor.load(whole.folder)
    speakers = {voice: int(whole.torch.speaker_map[voice]["bos_token"]) for voice in VOICES}
    prompts = {name: processor(messages(name)) for name in LENGTHS}
    return {(n, v): Line(prompts[n], LENGTHS[n], speakers[v], GREEDY) for n in LENGTHS for v in VOICES}


@pytest.fixture(scope="module")
def endless(whole: Whole) -> Parts:
    """Ours without ends to its speech."""
    parts = Parts(whole.folder)
    parts.silence_ends()
    return parts


@pytest.fixture(scope="module")
def theirs(whole: Whole, lines: dict[tuple[str, str], Line]) -> dict[tuple[str, str], list[int]]:
    """The reference's codes, one unpadded sample at a time, without ends to its speech."""
    c, head = whole.config.talker_config, whole.torch.talker.codec_head.weight.data
    ends = [c.tts_codec_pad_token_id, c.tts_codec_end_token_id]
    kept = head[ends].clone()
    head[ends] = 0
    codes = {key: reference_codes(whole, line, key[1]) for key, line in lines.items()}
    head[ends] = kept
    return codes


@pytest.mark.parametrize("name", ["text", "video with sound"])
def test_greedy_codes(endless: Parts, lines: Any, theirs: Any, name: str) -> None:
    _, (codes,) = endless.say([lines[name, "Chelsie"]])
    assert codes == theirs[name, "Chelsie"]
    assert len(codes) == STEPS
    assert len(set(codes)) > 9  # the random model does say something


def test_a_batch_equals_the_single_runs(endless: Parts, lines: Any, theirs: Any) -> None:
    """Prompts and replies of all kinds in both voices together; the reference refuses such a batch (7.5 D)."""
    _, codes = endless.say(list(lines.values()))
    assert dict(zip(lines, codes, strict=True)) == theirs
    assert any(theirs[name, VOICES[0]] != theirs[name, VOICES[1]] for name in LENGTHS)


def test_a_reply_that_ends_with_its_mark_and_speech_that_ends(whole: Whole, lines: Any) -> None:
    parts, line = Parts(whole.folder), lines["text", "Chelsie"]
    (reply,), _ = parts.say([line])
    stop = next(t for t in reply[3:] if t not in reply[:3])
    ending = dataclasses.replace(line, talk=TalkerParams(temperature=0.0, max_tokens=STEPS), stop=(stop,))
    (said,), (codes,) = parts.say([ending])
    assert said == reply[: reply.index(stop) + 1]
    assert codes == reference_codes(whole, ending, "Chelsie")

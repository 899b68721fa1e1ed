"""Greedy codes against PyTorch, id for id, on real media; and batches against single runs."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from omni_jax.engine.request import TalkerParams
from omni_jax.engine.sampling import SamplingParams
from omni_jax.processing.processor import Processor
from tests.engine.speaking import Dialogue, Parts
from tests.engine.test_thinker_engine_parity import messages
from tests.pairs import Whole
from tools.reference_speech import speak_reference

STEPS = 60
# the penalty keeps a random model from saying one code for ever
PENALTY = 2.0
GREEDY = TalkerParams(SamplingParams(repetition_penalty=PENALTY), STEPS)
# tokens of the reply to each prompt: unequal, and the shortest that is spoken among them
LENGTHS = {"text": 9, "two sounds": 2, "two pictures": 14, "silent video": 5, "video with sound": 23}
VOICES = ("Chelsie", "Ethan")


def reference_codes(whole: Whole, dialogue: Dialogue, voice: str) -> list[int]:
    """The reference's codes up to the end."""
    return speak_reference(
        whole.torch,
        whole.config,
        dialogue.prompt,
        voice=voice,
        max_tokens=dialogue.max_tokens,
        stop_ids=dialogue.stop_ids,
        max_codes=dialogue.talker.max_tokens,
        repetition_penalty=dialogue.talker.sampling.repetition_penalty,
    ).codes


@pytest.fixture(scope="module")
def dialogues(whole: Whole) -> dict[tuple[str, str], Dialogue]:
    processor = Processor.load(whole.folder)
    speakers = {voice: int(whole.torch.speaker_map[voice]["bos_token"]) for voice in VOICES}
    prompts = {name: processor(messages(name)) for name in LENGTHS}
    return {(n, v): Dialogue(prompts[n], LENGTHS[n], speakers[v], GREEDY) for n in LENGTHS for v in VOICES}


@pytest.fixture(scope="module")
def endless(whole: Whole) -> Parts:
    """Ours without ends to its speech."""
    parts = Parts(whole.folder)
    parts.suppress_ends()
    return parts


@pytest.fixture(scope="module")
def theirs(whole: Whole, dialogues: dict[tuple[str, str], Dialogue]) -> dict[tuple[str, str], list[int]]:
    """The reference's codes, one unpadded sample at a time, without ends to its speech."""
    c, head = whole.config.talker_config, whole.torch.talker.codec_head.weight.data
    ends = [c.tts_codec_pad_token_id, c.tts_codec_end_token_id]
    kept = head[ends].clone()
    head[ends] = 0
    codes = {key: reference_codes(whole, dialogue, key[1]) for key, dialogue in dialogues.items()}
    head[ends] = kept
    return codes


@pytest.mark.parametrize("name", ["text", "video with sound"])
def test_greedy_codes(endless: Parts, dialogues: Any, theirs: Any, name: str) -> None:
    _, (codes,) = endless.run([dialogues[name, "Chelsie"]])
    assert codes == theirs[name, "Chelsie"]
    assert len(codes) == STEPS
    assert len(set(codes)) > 9  # the random model does say something


def test_a_batch_equals_the_single_runs(endless: Parts, dialogues: Any, theirs: Any) -> None:
    """Prompts and replies of all kinds in both voices together.

    The reference refuses such a batch (docs/reference.md, 7.5 D).
    """
    _, codes = endless.run(list(dialogues.values()))
    assert dict(zip(dialogues, codes, strict=True)) == theirs
    assert any(theirs[name, VOICES[0]] != theirs[name, VOICES[1]] for name in LENGTHS)


def test_a_reply_that_ends_with_its_mark_and_speech_that_ends(whole: Whole, dialogues: Any) -> None:
    parts, dialogue = Parts(whole.folder), dialogues["text", "Chelsie"]
    (reply,), _ = parts.run([dialogue])
    stop = next(t for t in reply[3:] if t not in reply[:3])
    ending = dataclasses.replace(dialogue, talker=TalkerParams(SamplingParams(), STEPS), stop_ids=(stop,))
    (text,), (codes,) = parts.run([ending])
    assert text == reply[: reply.index(stop) + 1]
    assert codes == reference_codes(whole, ending, "Chelsie")

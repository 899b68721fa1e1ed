"""Rows of spoken dialogues: what is read of them, what is refused, and where it lies in a batch."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from omni_jax.batch import PADDING
from omni_jax.config import OmniConfig
from omni_jax.data.examples import Reject
from omni_jax.data.packing import Budget
from omni_jax.data.sources import Row
from omni_jax.data.spoken_examples import PrepareSpoken, SpokenExample
from omni_jax.data.spoken_packing import SpokenBudget, SpokenPacking, SpokenPart
from omni_jax.models.talker import NO_CODE
from omni_jax.models.talker_conditioning import TEXT_END, TEXT_PAD, TEXT_ROW, TEXT_VOICE, lay_out_stream
from omni_jax.processing.chat import SPEECH_SYSTEM_PROMPT
from omni_jax.processing.processor import Processor
from tests.data.conftest import MEDIA, PICTURE

CONFIG = OmniConfig.tiny()
BUDGET = SpokenBudget(Budget(2, 320, 12, blocks=2, canvases=2, windows=8), positions=200, utterances=3)
QUESTION = {"role": "user", "content": "What is one?"}
ANSWER = {"role": "assistant", "content": "It is one."}


def make_row(speech: Any = None, **changes: Any) -> dict[str, Any]:
    if speech is None:
        speech = {"codec_ids": [1, 2, 65, 0]}
    return {"messages": [QUESTION, ANSWER], "speech": speech, **changes}


@pytest.fixture(scope="module")
def prepare(processor: Processor) -> PrepareSpoken:
    processor = processor.with_pixels(max_pixels=112 * 112)
    return PrepareSpoken(processor, 320, BUDGET.check, {"Ada": 603, "Ben": 604}, media_root=str(MEDIA))


def read(prepare: PrepareSpoken, values: Any) -> SpokenExample | Reject:
    found = prepare(Row("rows.jsonl", 1, json.dumps(values).encode()))
    return found if isinstance(found, Reject) else found[0]


def read_example(prepare: PrepareSpoken, values: Any) -> SpokenExample:
    found = read(prepare, values)
    assert isinstance(found, SpokenExample), found
    return found


def test_a_row_is_read(prepare: PrepareSpoken) -> None:
    """The prompt is what inference reads, and the reply has a row for each of its tokens but the last."""
    messages = [QUESTION, {**ANSWER, "loss": False}, QUESTION, ANSWER]
    example = read_example(prepare, {"messages": messages, "speech": {"codec_ids": [1, 2, 65], "voice": "Ben"}})
    prompt = prepare.processor(messages_without_weights(messages[:3])).tokens
    assert example.prompt_length == len(prompt)
    np.testing.assert_array_equal(example.dialogue.tokens[: len(prompt)], prompt)
    reply = prepare.processor.tokenizer.encode([("It is one.", False), ("<|im_end|>", True)])
    assert example.num_reply_rows == len(reply) - 1
    behind = example.dialogue.tokens[len(prompt) :]
    assert behind[: len(reply)].tolist() == reply
    # the loss of the text is that of the row when the Thinker trains alone: the first answer has none here
    assert example.dialogue.weights[: len(prompt)].sum() == 0
    assert example.dialogue.weights[len(prompt) :].sum() == len(reply)
    assert [codes.tolist() for codes in example.answers] == [[1, 2, 65]]
    assert (example.voice_token, example.clip, example.num_clip_rows) == (604, None, 0)
    assert example.num_positions == len(prompt) + 2 + 3


def messages_without_weights(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: message[key] for key in ("role", "content")} for message in messages]


def test_a_clip_is_read(prepare: PrepareSpoken) -> None:
    """In a dialogue of its own, whose last tokens are its text."""
    row = make_row({"codec_ids": [1, 2], "ref": {"codec_ids": [3, 4, 5], "text": "hello world"}})
    example = read_example(prepare, row)
    assert example.clip is not None
    text = prepare.processor.tokenizer.encode([("hello world", False)])
    assert example.clip.tokens[-example.num_clip_rows :].tolist() == text
    system = {"role": "system", "content": SPEECH_SYSTEM_PROMPT}
    before = prepare.processor([system]).tokens
    np.testing.assert_array_equal(example.clip.tokens[: -example.num_clip_rows], before)
    assert not example.clip.weights.any()
    assert example.clip_codes.tolist() == [3, 4, 5] and example.num_positions == example.prompt_length + 2 + 3 + 2
    # without a name it is nobody's voice
    assert example.voice_token == CONFIG.talker_config.tts_text_start_token_id


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"messages": [QUESTION, ANSWER]}, "speech is None; it must be an object with codec_ids, voice, codec, ref"),
        (make_row({}), "speech.codec_ids is None; it must be a list of codes, 50 a second"),
        (make_row({"codec_ids": []}), r"speech.codec_ids is \[\]; it must be a list of codes"),
        (make_row({"codec_ids": [66]}), "a code of speech.codec_ids is 66; it must be from 0 to 65"),
        (make_row({"codec_ids": [-1]}), "a code of speech.codec_ids is -1; it must be from 0 to 65"),
        (
            make_row({"codec_ids": [1], "speaker": "x"}),
            "speech has the unknown keys 'speaker'; it has codec_ids",
        ),
        (make_row({"codec_ids": [1], "voice": 3}), "speech.voice is 3; it must be the name of a voice"),
        (make_row({"codec_ids": [1], "voice": "Eve"}), "speech.voice 'Eve' is unknown; there are Ada, Ben; .*voices"),
        (make_row({"codec_ids": [1], "ref": "x.wav"}), "speech.ref is 'x.wav'; it must be an object with codec_ids"),
        (make_row({"codec_ids": [1], "ref": {"codec_ids": [1]}}), "speech.ref.text is None; it must be what is said"),
        (make_row({"codec_ids": [1], "ref": {"codec_ids": [1], "text": " "}}), "the text of the clip is empty"),
        (
            make_row({"codec_ids": [1], "ref": {"codec_ids": [99], "text": "a"}}),
            "a code of speech.ref.codec_ids is 99",
        ),
        (make_row(messages=[QUESTION]), "speech is of the last message, which must be the assistant's"),
        ({"text": "x", "speech": {"codec_ids": [1]}}, "speech is of the last message"),
        (make_row(messages=[QUESTION, {**ANSWER, "content": ""}]), "its last message has no text that could be spoken"),
        (make_row(messages=[QUESTION, {**ANSWER, "content": "<image>"}], images=[PICTURE]), "holds media"),
        (
            make_row({"codec_ids": [1] * 170}),
            r"it takes \d+ positions of the Talker, over the 200 of a row \(objective.pos",
        ),
        (
            make_row({"codec_ids": [1], "ref": {"codec_ids": [1], "text": "zyx " * 40}}),
            r"it takes \d+ tokens, over the 320 of a row \(data.tokens\)",
        ),
    ],
)
def test_what_is_wrong_with_a_row(prepare: PrepareSpoken, row: dict[str, Any], reason: str) -> None:
    found = read(prepare, row)
    assert isinstance(found, Reject) and not found.is_fatal
    assert re.search(reason, found.reason), found.reason


def test_codes_of_another_codec_end_the_run(processor: Processor) -> None:
    strict = PrepareSpoken(processor, 320, BUDGET.check, {}, codec="abc")
    for codec in (None, "abd"):
        found = read(strict, make_row({"codec_ids": [1], "codec": codec}))
        assert isinstance(found, Reject) and found.is_fatal
        assert "and the codec of this run is 'abc'" in found.reason
    assert read_example(strict, make_row({"codec_ids": [1], "codec": "abc"})).answers[0].tolist() == [1]


def test_the_layout_of_a_stream() -> None:
    """docs/reference.md, 7.2: one row of the text for each code, those of a clip first."""
    c = CONFIG.talker_config
    pad = c.tts_codec_pad_token_id
    begin = c.tts_codec_start_token_id
    end = c.tts_codec_end_token_id
    stream = lay_out_stream(c, np.array([10, 11]), np.array([20, 21, 22]), np.array([1, 2, 3]), np.array([7, 8]))
    assert stream.part.tolist() == [*[TEXT_ROW] * 2, TEXT_VOICE, *[TEXT_ROW] * 3, TEXT_END, TEXT_PAD, TEXT_PAD]
    assert stream.row.tolist() == [10, 11, 0, 20, 21, 22, 0, 0, 0]
    assert stream.codes.tolist() == [NO_CODE, NO_CODE, pad, begin, 7, 8, 1, 2, 3]
    assert stream.targets[3:].tolist() == [7, 8, 1, 2, 3, end]
    assert stream.weights.tolist() == [0, 0, 0, 0, 0, 1, 1, 1, 1]


def test_each_example_has_one_place(prepare: PrepareSpoken) -> None:
    """In the same row for both models, and no two share a position."""
    rng = np.random.default_rng(0)
    rows = []
    for i in range(12):
        speech: dict[str, Any] = {"codec_ids": rng.integers(0, 66, int(rng.integers(1, 40))).tolist()}
        if i % 3 == 0:
            speech["ref"] = {"codec_ids": [1] * int(rng.integers(1, 20)), "text": "a" * int(rng.integers(1, 9))}
        images = [PICTURE] if i % 4 == 1 else []
        question = {**QUESTION, "content": "<image>" * len(images) + "What?"}
        rows.append(make_row(speech, messages=[question, ANSWER], images=images))
    packing = SpokenPacking(prepare, BUDGET, CONFIG)
    parts: list[SpokenPart] = [packing.new_part()]
    examples = [read_example(prepare, row) for row in rows]
    for example in examples:
        if not parts[-1].place(example):
            parts.append(packing.new_part())
            assert parts[-1].place(example)
    batch = packing.assemble(parts, first=0, streams=len(parts))
    assert len(parts) > 1 and sum(len(part.placed) for part in parts) == len(rows)
    assert packing.measure_fill(batch)["utterances"] == len(rows)
    assert (batch.segment_ids != PADDING).sum() == sum(example.num_positions for example in examples)
    assert batch.weights.sum() == sum(len(example.answers[0]) + 1 for example in examples)
    for number, part in enumerate(parts):
        for placed in part.placed:
            example = placed.example
            row = number * BUDGET.dialogues.rows + placed.row
            own = batch.segment_ids[row] == placed.utterance + 1
            # the rows that the Talker takes are of the tokens of the prompt, of the clip's text, and of the reply
            taken = batch.text_row[row][own & (batch.part[row] == TEXT_ROW)]
            tokens = np.asarray(batch.dialogues.inputs.tokens)[row][taken]
            first = example.prompt_length
            spoken = example.dialogue.tokens[: first + example.num_reply_rows]
            of_clip = [] if example.clip is None else example.clip.tokens[-example.num_clip_rows :]
            expected = [*spoken[:first], *of_clip, *spoken[first:]]
            # fewer where the codes are, for the text may be longer
            assert tokens.tolist() == expected[: len(tokens)] and len(tokens) > first
            assert batch.special[row, placed.utterance, TEXT_VOICE] == example.voice_token


def test_the_folder_of_media(prepare: PrepareSpoken, tmp_path: Path) -> None:
    row = make_row(messages=[{**QUESTION, "content": "<image>What?"}, ANSWER], images=[str(tmp_path / "x.png")])
    found = read(prepare, row)
    assert isinstance(found, Reject) and "data.media_root" in found.reason

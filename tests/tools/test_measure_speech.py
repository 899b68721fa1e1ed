"""The rows that speech is measured on."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.io import wavfile

from omni_jax.errors import InputError
from omni_jax.processing.chat import SPEECH_SYSTEM_PROMPT
from tools.measure_speech import read_sentences

SYSTEM = {"role": "system", "content": SPEECH_SYSTEM_PROMPT}


def write_rows(folder: Path, *rows: dict[str, Any]) -> str:
    wavfile.write(folder / "a.wav", 16_000, np.arange(1_600, dtype=np.int16))
    wavfile.write(folder / "b.wav", 16_000, np.arange(3_200, dtype=np.int16))
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(values) + "\n" for values in rows))
    return str(path)


def test_texts_and_dialogues(tmp_path: Path) -> None:
    text = {"audio": "a.wav", "text": "The cat is red.", "voice": "slt", "codec_ids": [1, 2]}
    messages = [
        {"role": "user", "content": "<image>Which colour?"},
        {"role": "assistant", "content": "It is red."},
        {"role": "user", "content": "And whose?"},
        {"role": "assistant", "content": "The cat's."},
    ]
    # the voice of the row is that in which it is asked
    reply = {"audio": "b.wav", "voice": "awb"}
    dialogue = {"messages": messages, "images": ["missing.png"], "voice": "slt", "reply": reply}
    prompted = {**dialogue, "messages": [SYSTEM, *messages]}
    rows = write_rows(tmp_path, text, dialogue, prompted, dialogue)
    read, spoken, other = read_sentences(rows, tmp_path, 2)  # two of each voice
    assert (read.text, read.voice, len(read.samples)) == ("The cat is red.", "slt", 1_600)
    assert read.codes is not None and read.codes.tolist() == [1, 2]
    assert (spoken.text, spoken.voice, spoken.codes) == ("The cat's.", "awb", None)
    assert len(spoken.samples) == 3_200
    # all that comes before the reply, under the system prompt of speech
    assert [message["role"] for message in spoken.spoken.prompt] == ["system", "user", "assistant", "user"]
    assert spoken.spoken.prompt == other.spoken.prompt
    assert spoken.spoken.prompt[0]["content"] == SPEECH_SYSTEM_PROMPT


@pytest.mark.parametrize(
    "values",
    [
        {"audio": "a.wav", "text": "No voice."},
        {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}], "voice": "slt"},
    ],
)
def test_a_row_that_nobody_speaks(values: dict[str, Any], tmp_path: Path) -> None:
    rows = write_rows(tmp_path, values)
    with pytest.raises(InputError, match=r"rows\.jsonl:1: it has no voice, or no reply that is spoken"):
        read_sentences(rows, tmp_path, 2)

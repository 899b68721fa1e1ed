"""Tokenizers of strangers' checkpoints: what the library that reads them does not check, and what makes it panic."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from omni_jax.errors import CheckpointError, InputError
from omni_jax.processing.processor import Processor
from omni_jax.processing.tokenizer import TextTokenizer
from tests.security.folders import edit_json


@pytest.mark.parametrize(
    "change", [{"content": ""}, {"content": 5}, {"id": [7]}, {"id": -1}, {"id": 2**31}, {"id": True}, {"special": None}]
)
def test_added_tokens_are_texts_with_ids(published: Path, change: dict[str, Any]) -> None:
    values = json.loads((published / "tokenizer.json").read_text())
    values["added_tokens"][-1] |= change
    edit_json(published / "tokenizer.json", added_tokens=values["added_tokens"])
    with pytest.raises(CheckpointError, match=r"tokenizer\.json is not a tokenizer: added_tokens has"):
        Processor.load(published)


def test_tokens_outside_of_the_vocabulary(published: Path) -> None:
    values = json.loads((published / "tokenizer.json").read_text())
    values["model"]["vocab"]["a"] = 5_000
    edit_json(published / "tokenizer.json", model=values["model"])
    with pytest.raises(InputError, match="the tokenizer gives token 5000, but the model's vocabulary has 640"):
        Processor.load(published)([{"role": "user", "content": "a"}])


def test_a_tokenizer_that_makes_its_library_panic_when_it_is_read(published: Path) -> None:
    values = json.loads((published / "tokenizer.json").read_text())
    edit_json(published / "tokenizer.json", model={**values["model"], "continuing_subword_prefix": "long prefix"})
    with pytest.raises(CheckpointError, match=r"tokenizer\.json is not a tokenizer: it cannot be read: PanicException"):
        TextTokenizer.load(published)


class Panic(BaseException):
    pass


Panic.__name__ = "PanicException"


@pytest.mark.parametrize("error", [Panic("index out of bounds"), Exception("no unknown token"), OverflowError("id")])
def test_a_tokenizer_that_fails_at_a_text(processor: Processor, monkeypatch: pytest.MonkeyPatch, error: Any) -> None:
    class Failing:
        def encode(self, *_: object, **__: object) -> None:
            raise error

    monkeypatch.setattr(processor.tokenizer, "_plain", Failing())
    with pytest.raises(InputError, match="the tokenizer cannot split this text"):
        processor([{"role": "user", "content": "a"}])

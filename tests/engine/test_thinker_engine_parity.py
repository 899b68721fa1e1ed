"""Greedy replies against PyTorch, token for token, on real media; and batches against single runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import omni_jax
from omni_jax.generation.model import OmniModel
from tests.pairs import Pair
from tools.reference_inputs import reference_arguments

MEDIA = Path(__file__).parents[1] / "media"
LENGTH = 32  # tokens of a reply


def part(kind: str, name: str, **options: Any) -> dict[str, Any]:
    return {"type": kind, kind: str(MEDIA / name), **options}


def text(words: str) -> dict[str, Any]:
    return {"type": "text", "text": words}


# Prompts by what is in them. Videos are kept small and short, for the reference's sake.
SMALL = dict(max_pixels=28 * 28 * 16, min_pixels=28 * 28 * 4)
PROMPTS: dict[str, list[dict[str, Any]]] = {
    "text": [text("Say one, two, three.")],
    "two sounds": [part("audio", "speech.wav"), text("and"), part("audio", "speech2.mp3"), text("What do you hear?")],
    "two pictures": [part("image", "picture.jpg", **SMALL), part("image", "picture.png", **SMALL), text("Compare.")],
    "silent video": [text("Describe the video."), part("video", "silent.mp4", **SMALL)],
    "video with sound": [part("video", "video.mp4", **SMALL), text("What is said?")],
    "all": [
        text("Here is a picture"),
        part("image", "picture.jpg", **SMALL),
        part("video", "video.mp4", **SMALL),
        text("and a sound:"),
        part("audio", "speech2.mp3"),
        text("Describe them."),
    ],
}


def messages(name: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": PROMPTS[name]}]


@pytest.fixture(scope="module")
def model(pair: Pair) -> OmniModel:
    return omni_jax.load(pair.folder)


@pytest.fixture(scope="module")
def theirs(pair: Pair, model: OmniModel) -> dict[str, list[int]]:
    """The reference's reply to each prompt, one unpadded sample at a time."""
    replies = {}
    for name in PROMPTS:
        prompt = model.processor(messages(name))
        with torch.no_grad():
            out = pair.torch.generate(
                **reference_arguments(prompt),
                max_new_tokens=LENGTH,
                do_sample=False,
                eos_token_id=list(model.processor.stop_ids),
                pad_token_id=model.config.thinker_config.pad_token_id,
            )
        replies[name] = out[0, len(prompt) :].tolist()
    return replies


@pytest.mark.parametrize("name", PROMPTS)
def test_greedy_reply(model: OmniModel, theirs: dict[str, list[int]], name: str) -> None:
    reply = model.generate(messages(name), max_tokens=LENGTH)
    assert list(reply.token_ids) == theirs[name]
    assert len(set(reply.token_ids)) > 2  # the random model does say something


def test_a_batch_equals_the_single_replies(model: OmniModel, theirs: dict[str, list[int]]) -> None:
    """Against the reference's single runs: its own batches shift positions (docs/reference.md, 7.5 D)."""
    replies = model.generate_batch([messages(name) for name in PROMPTS], max_tokens=LENGTH)
    assert {name: list(r.token_ids) for name, r in zip(PROMPTS, replies, strict=True)} == theirs

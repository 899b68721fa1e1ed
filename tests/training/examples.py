"""Random examples of every kind, and batches of them; and the reference's arguments for one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from omni_jax.batch import TrainBatch
from omni_jax.config import OmniConfig
from omni_jax.data.examples import Example, make_example
from omni_jax.data.packing import Budget, Part, assemble
from omni_jax.processing.layout import AudioInput, Prompt, VisionInput, lay_out

BUDGET = Budget(rows=2, tokens=128, spans=24, blocks=3, canvases=3, windows=16)
KINDS = ("text", "audio", "image", "video")


def make_prompt(kind: str, config: OmniConfig, rng: np.random.Generator) -> Prompt:
    """A few words, a medium of the kind, and a few words."""
    c = config.thinker_config
    before, after = ([int(i) for i in rng.integers(1, 500, n)] for n in rng.integers(3, 9, 2))
    if kind == "text":
        return lay_out([*before, *after], [], c)
    if kind == "audio":
        mel = rng.standard_normal((int(rng.integers(60, 240)), c.audio_config.num_mel_bins)).astype(np.float32)
        marked = [c.audio_start_token_id, c.audio_token_index, c.audio_end_token_id]
        return lay_out([*before, *marked, *after], [AudioInput(mel)], c)
    grid = (1, 4 + 2 * int(rng.integers(3)), 8) if kind == "image" else (2, 4, 6)
    patches = rng.standard_normal((np.prod(grid), c.vision_config.patch_dim)).astype(np.float32)
    token = c.image_token_index if kind == "image" else c.video_token_index
    marked = [c.vision_start_token_id, token, c.vision_end_token_id]
    return lay_out([*before, *marked, *after], [VisionInput(patches, grid, kind)], c)


def weights_of(prompt: Prompt, rng: np.random.Generator) -> np.ndarray:
    """Some tokens are learnt and others not; never the first, which nothing predicts."""
    weights = (rng.random(len(prompt)) < 0.6).astype(np.float32)
    weights[0], weights[-1] = 0, 1
    return weights


def make_examples(kinds: Sequence[str], config: OmniConfig, seed: int = 0) -> list[Example]:
    rng = np.random.default_rng(seed)
    prompts = [make_prompt(kind, config, rng) for kind in kinds]
    return [make_example(p, weights_of(p, rng), f"row {i}", config) for i, p in enumerate(prompts)]


def make_batch(examples: Sequence[Example], config: OmniConfig) -> TrainBatch:
    part = Part(BUDGET)
    assert all(part.place(example) for example in examples)
    return assemble([part], BUDGET, config, first=0, streams=1)


def torch_arguments(prompt: Prompt, weights: np.ndarray) -> dict[str, Any]:
    """For the reference's Thinker: inputs and labels."""
    import torch

    ids = torch.tensor(prompt.tokens[None].astype(np.int64))
    labels = torch.where(torch.tensor(weights[None] > 0), ids, -100)
    found = dict(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels)
    for medium in prompt.media:
        if isinstance(medium, AudioInput):
            found["input_features"] = torch.tensor(medium.mel.T[None])
            found["feature_attention_mask"] = torch.ones(1, len(medium.mel), dtype=torch.bool)
        elif medium.kind == "image":
            found |= dict(pixel_values=torch.tensor(medium.patches), image_grid_thw=torch.tensor([medium.grid]))
        else:
            found |= dict(pixel_values_videos=torch.tensor(medium.patches), video_grid_thw=torch.tensor([medium.grid]))
            found["video_second_per_grid"] = torch.tensor([1.0])
    return found

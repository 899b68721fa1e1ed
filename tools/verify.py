"""Compares a converted Thinker with PyTorch's, number by number, on a text, a sound and a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from transformers import Qwen2_5OmniThinkerForConditionalGeneration

from omni_jax.checkpoint import store
from omni_jax.models.thinker import Thinker
from omni_jax.processing.collate import collate
from omni_jax.processing.layout import AudioInput, Prompt, VisionInput
from omni_jax.processing.processor import Processor

# Both compute in float32 and add in another order: some 1e-6 a layer, against the largest score.
TOLERANCE = 1e-3


def verify(source: Path, converted: Path) -> None:
    """Prints how far the scores are apart; PyTorch's model is let go of before ours is loaded.

    Args:
      source: the PyTorch folder.
      converted: what was made of it.

    Raises:
      SystemExit: if the scores differ by more than TOLERANCE of the largest.
    """
    processor = Processor.load(converted)
    prompts = {name: processor(messages) for name, messages in _requests().items()}
    (kind,) = store.components(converted)["thinker"]
    theirs = _torch_scores(source, prompts, getattr(torch, kind))
    ours = _jax_scores(converted, prompts, processor)
    worst = 0.0
    for name in prompts:
        difference = float(np.abs(ours[name] - theirs[name]).max() / np.abs(theirs[name]).max())
        same = float((ours[name].argmax(-1) == theirs[name].argmax(-1)).mean())
        print(f"{name}: scores differ by {difference:.1e} of the largest; the best word is the same at {same:.1%}")
        worst = max(worst, difference)
    if not worst <= TOLERANCE:  # not a number is no agreement either
        raise SystemExit(f"error: {converted} differs from PyTorch by {worst:.1e}; at most {TOLERANCE:.0e} is expected")
    print(f"{converted} agrees with PyTorch")


def _requests() -> dict[str, list[dict[str, Any]]]:
    rng = np.random.default_rng(0)
    time = np.arange(5 * 16000) / 16000
    chirp = 0.3 * np.sin(2 * np.pi * (200 + 150 * time) * time) + 0.01 * rng.standard_normal(len(time))
    picture = rng.integers(0, 256, (7, 9, 3), dtype=np.uint8).repeat(28, 0).repeat(28, 1)
    parts = {
        "text": {"type": "text", "text": "Why is the sky blue?"},
        "sound": {"type": "audio", "audio": chirp.astype(np.float32), "sampling_rate": 16000},
        "picture": {"type": "image", "image": picture},
    }
    question = {"type": "text", "text": "What is this?"}
    return {name: [{"role": "user", "content": [part, question]}] for name, part in parts.items()}


def _torch_scores(source: Path, prompts: dict[str, Prompt], kind: torch.dtype) -> dict[str, np.ndarray]:
    """Rounded to what the conversion was rounded to, computed in float32."""
    model = Qwen2_5OmniThinkerForConditionalGeneration.from_pretrained(source, dtype=kind).float().eval()
    with torch.no_grad():
        return {name: model(**_arguments(prompt)).logits[0].numpy() for name, prompt in prompts.items()}


def _arguments(prompt: Prompt) -> dict[str, torch.Tensor]:
    tokens = torch.from_numpy(prompt.tokens.astype(np.int64))[None]
    arguments = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    for item in prompt.media:
        if isinstance(item, AudioInput):
            arguments["input_features"] = torch.from_numpy(item.mel.T[None])
            arguments["feature_attention_mask"] = torch.ones(1, len(item.mel), dtype=torch.long)
        elif isinstance(item, VisionInput):
            arguments["pixel_values"] = torch.from_numpy(item.patches)
            arguments["image_grid_thw"] = torch.tensor([item.grid])
    return arguments


def _jax_scores(converted: Path, prompts: dict[str, Prompt], processor: Processor) -> dict[str, np.ndarray]:
    model = Thinker(processor.config.thinker_config, dtype=jnp.float32)
    params = store.load(converted, ["thinker"], dtype=jnp.float32)["thinker"]
    scores = {}
    with jax.default_matmul_precision("highest"):
        for name, prompt in prompts.items():
            batch = collate([prompt], processor.config)
            scores[name] = np.asarray(jax.jit(model.apply)({"params": params}, batch))[np.asarray(batch.mask)]
    return scores

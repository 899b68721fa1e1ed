"""Compares the logits of a converted Thinker with those of PyTorch's, on a text, a sound and a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from transformers import Qwen2_5OmniThinkerConfig, Qwen2_5OmniThinkerForConditionalGeneration

from omni_jax.checkpoint import store
from omni_jax.config import ThinkerConfig
from omni_jax.models.thinker import Thinker
from omni_jax.processing.collate import collate
from omni_jax.processing.layout import Prompt
from omni_jax.processing.processor import Processor
from tools.reference_inputs import reference_arguments

# Both compute in float32 and add in different orders, which makes some 1e-6 a layer of the largest logit.
TOLERANCE = 1e-3


def verify(source: Path, converted: Path) -> None:
    """Prints how far the logits differ; PyTorch's model is freed before ours is loaded.

    Args:
      source: the PyTorch folder.
      converted: what was made of it.

    Raises:
      SystemExit: if logits differ by more than TOLERANCE of the largest.
    """
    # one processor for both, so that nothing but the models can differ
    processor = Processor.load(converted)
    prompts = {name: processor(messages) for name, messages in _make_requests().items()}
    # PyTorch's parameters are rounded to what was stored; then both compute in float32
    (dtype,) = store.components(converted)["thinker"]
    expected = _torch_logits(source, prompts, processor.config.thinker_config, getattr(torch, dtype))
    found = _jax_logits(converted, prompts, processor)
    largest_difference = 0.0
    for name in prompts:
        difference = float(np.abs(found[name] - expected[name]).max() / np.abs(expected[name]).max())
        agreement = float((found[name].argmax(-1) == expected[name].argmax(-1)).mean())
        print(f"{name}: logits differ by {difference:.1e} of the largest; the best tokens agree at {agreement:.1%}")
        largest_difference = max(largest_difference, difference)
    if not largest_difference <= TOLERANCE:  # NaN is no agreement either
        raise SystemExit(
            f"error: {converted} differs from PyTorch by {largest_difference:.1e}; at most {TOLERANCE:.0e} is expected"
        )
    print(f"{converted} agrees with PyTorch")


def _make_requests() -> dict[str, list[dict[str, Any]]]:
    rng = np.random.default_rng(0)
    # five seconds of sound: two full blocks of the audio encoder, and a part of one
    rate = 16_000  # Hz
    time = np.arange(5 * rate) / rate
    chirp = 0.3 * np.sin(2 * np.pi * (200 + 150 * time) * time)
    chirp += 0.01 * rng.standard_normal(len(time))
    # 7 x 9 cells, so that windows at the right and at the bottom are smaller ones
    picture = rng.integers(0, 256, (7, 9, 3), dtype=np.uint8).repeat(28, 0).repeat(28, 1)
    parts = {
        "text": {"type": "text", "text": "Why is the sky blue?"},
        "sound": {"type": "audio", "audio": chirp.astype(np.float32), "sampling_rate": rate},
        "picture": {"type": "image", "image": picture},
    }
    question = {"type": "text", "text": "What is this?"}
    return {name: [{"role": "user", "content": [part, question]}] for name, part in parts.items()}


def _torch_logits(
    source: Path, prompts: dict[str, Prompt], config: ThinkerConfig, dtype: torch.dtype
) -> dict[str, np.ndarray]:
    """Each prompt's logits, float32 [S, vocab_size]: of the parameters in ``dtype``, computed in float32."""
    # our configuration, for the folder's may be spelt for a release of transformers other than the installed
    torch_config = Qwen2_5OmniThinkerConfig(**config.to_dict())
    model = Qwen2_5OmniThinkerForConditionalGeneration.from_pretrained(source, config=torch_config, dtype=dtype)
    # rounded when it was loaded, widened here
    model = model.float().eval()
    logits = {}
    with torch.no_grad():
        for name, prompt in prompts.items():
            logits[name] = model(**reference_arguments(prompt)).logits[0].numpy()
    return logits


def _jax_logits(converted: Path, prompts: dict[str, Prompt], processor: Processor) -> dict[str, np.ndarray]:
    """Each prompt's logits, float32 [S, vocab_size]."""
    model = Thinker(processor.config.thinker_config, dtype=jnp.float32)
    params = store.load(converted, ["thinker"], dtype=jnp.float32)["thinker"]
    apply = jax.jit(model.apply)
    logits = {}
    with jax.default_matmul_precision("highest"):
        for name, prompt in prompts.items():
            batch = collate([prompt], processor.config)
            padded = np.asarray(apply({"params": params}, batch))  # [1, padded S, vocab_size]
            logits[name] = padded[np.asarray(batch.mask)]
    return logits

"""Model FLOPs of a step: what its arithmetic needs, whatever is computed again or for padding (docs/training.md)."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from omni_jax.config import ThinkerConfig

# dense bfloat16 FLOPs a second of a device, as the makers state them; by what jax calls the device
_PEAKS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "TPU7x": 2307e12 / 2,  # jax counts two devices a chip
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H200": 989e12,
}

# where a gradient comes to on its way back: modules in the order of computation, the decoder's after both encoders'
_AUDIO = ("conv1", "conv2", "layers", "norm", "proj")
_VISION = ("patch_embed", "layers", "merger")
_DECODER = ("embed", "layers", "norm", "head")


def peak_flops(device: Any) -> float | None:
    """Of a device, in bfloat16; None where it is not known, as of a CPU."""
    return _PEAKS.get(device.device_kind)


def step_flops(
    config: ThinkerConfig,
    sizes: Mapping[str, int],
    trained: Collection[str],
    counts: Mapping[str, float],
) -> float:
    """FLOPs of a step, forward and back.

    A product of n positions with p weights takes 2np, as much again for the gradient of the positions where anything
    before it trains, and as much again for that of the weights where they train. Attention takes 4 per pair, layer and
    number of the heads, and twice as much on the way back.

    Args:
      config: of the Thinker.
      sizes: of all parameters, by path.
      trained: paths of those that train.
      counts: of the step, see ``omni_jax.training.step.counts``.
    """
    passed = _passed(trained)
    total = 0.0
    for pattern, positions in _positions(config, counts).items():
        for path, size in sizes.items():
            if re.fullmatch(pattern, path):
                total += 2.0 * size * positions * (1 + passed[_stage(path)] + (path in trained))
    for stage, forward in _attention(config, counts).items():
        total += forward * (1 + 2 * passed[stage])
    return total


def _positions(config: ThinkerConfig, counts: Mapping[str, float]) -> dict[str, float]:
    """How many positions are multiplied with each kernel."""
    audio, merged = config.audio_config, config.vision_config.spatial_merge_size**2
    blocks, patches = counts.get("blocks", 0), counts.get("patches", 0)
    return {
        "decoder/(layers/.*|head/)kernel": counts["tokens"],
        "audio_encoder/conv1/kernel": blocks * audio.block_frames,
        "audio_encoder/(conv2|layers/.*)/kernel": blocks * audio.n_window,
        "audio_encoder/proj/kernel": blocks * audio.block_tokens,
        "vision_encoder/(patch_embed|layers/.*)/kernel": patches,
        "vision_encoder/merger/.*/kernel": patches / merged,
    }


def _attention(config: ThinkerConfig, counts: Mapping[str, float]) -> dict[str, float]:
    """The forward FLOPs of the three attentions."""
    text, audio, vision = config.text_config, config.audio_config, config.vision_config
    whole = len(vision.fullatt_block_indexes)
    in_window = (vision.window_cells * vision.spatial_merge_size) ** 2
    pairs = whole * counts.get("frame_pairs", 0) + (vision.depth - whole) * counts.get("patches", 0) * in_window
    return {
        "decoder/layers": 4.0 * text.num_hidden_layers * text.num_attention_heads * text.head_dim * counts["pairs"],
        "audio_encoder/layers": 4.0
        * audio.encoder_layers
        * audio.d_model
        * counts.get("blocks", 0)
        * audio.n_window**2,
        "vision_encoder/layers": 4.0 * vision.hidden_size * pairs,
    }


def _stage(path: str) -> str:
    return "/".join(path.split("/")[:2])


def _passed(trained: Collection[str]) -> dict[str, bool]:
    """Of each module whether gradients pass through it, to what trains before it or, in a stack of layers, in it."""
    modules = {_stage(path) for path in trained}
    passed: dict[str, bool] = {}
    reached = {}
    for tower, names in {"audio_encoder": _AUDIO, "vision_encoder": _VISION, "decoder": _DECODER}.items():
        before = tower == "decoder" and any(reached.values())
        for name in names:
            here = f"{tower}/{name}" in modules
            passed[f"{tower}/{name}"] = before or (here and name == "layers")
            before = before or here
        reached[tower] = before
    return passed


def sizes_of(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
    """Numbers in each parameter."""
    return {path: int(np.prod(shape, dtype=np.int64)) for path, shape in shapes.items()}

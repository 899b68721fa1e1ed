"""Model FLOPs of a step of the Thinker: what its arithmetic needs, whatever is computed again or for padding."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

from omni_jax.config import ThinkerConfig

# the modules that a gradient passes, in the order of computation; the decoder's come after both encoders'
_MODULES = {
    "audio_encoder": ("conv1", "conv2", "layers", "norm", "proj"),
    "vision_encoder": ("patch_embed", "layers", "merger"),
    "decoder": ("embed", "layers", "norm", "head"),
}


def count_step_flops(
    config: ThinkerConfig,
    sizes: Mapping[str, int],
    trained: Collection[str],
    counts: Mapping[str, float],
) -> float:
    """FLOPs of a step, forward and backward.

    A product of n positions with p weights takes 2np, as much again for the gradient of the positions where anything
    before it trains, and as much again for that of the weights where they train. Attention takes 4 per pair of
    positions, layer and element of the heads, and twice as much backward (PaLM, https://arxiv.org/abs/2204.02311,
    appendix B).

    Args:
      config: of the Thinker.
      sizes: of the Thinker's parameters, by path.
      trained: paths of those that train.
      counts: of the step, see ``training.objectives.next_token.count_work``.
    """
    has_gradient = _gradient_passes(trained)
    total = 0.0
    # products with weights: 2np forward, and again for each of the two gradients that there is
    for pattern, positions in _kernel_positions(config, counts).items():
        for path, size in sizes.items():
            if re.fullmatch(pattern, path):
                products = 1 + has_gradient[_module(path)] + (path in trained)
                total += 2.0 * size * positions * products
    # the products of attention have no weights, but a backward pass has two of them for each one forward
    for module, forward in _attention_flops(config, counts).items():
        total += forward * (1 + 2 * has_gradient[module])
    return total


def _kernel_positions(config: ThinkerConfig, counts: Mapping[str, float]) -> dict[str, float]:
    """How many positions are multiplied with each kernel, by a regular expression of its path."""
    audio = config.audio_config
    patches_per_cell = config.vision_config.spatial_merge_size**2
    # a batch without a budget for sound or pictures has no such count
    blocks = counts.get("blocks", 0)
    patches = counts.get("patches", 0)
    # a block has 200 mel frames, 100 positions after the strided conv2 and 50 tokens after the pooling
    return {
        "decoder/(layers/.*|head/)kernel": counts["tokens"],
        "audio_encoder/conv1/kernel": blocks * audio.block_frames,
        "audio_encoder/(conv2|layers/.*)/kernel": blocks * audio.n_window,
        "audio_encoder/proj/kernel": blocks * audio.block_tokens,
        "vision_encoder/(patch_embed|layers/.*)/kernel": patches,
        "vision_encoder/merger/.*/kernel": patches / patches_per_cell,
    }


def _attention_flops(config: ThinkerConfig, counts: Mapping[str, float]) -> dict[str, float]:
    """The forward FLOPs of attention, by module."""
    text = config.text_config
    audio = config.audio_config
    vision = config.vision_config
    text_width = text.num_attention_heads * text.head_dim
    # in a block of audio every position attends to all of the block
    audio_pairs = counts.get("blocks", 0) * audio.n_window**2
    # some layers see the whole frame, the others a window of it
    full_layers = len(vision.fullatt_block_indexes)
    window_layers = vision.depth - full_layers
    window_patches = (vision.window_cells * vision.spatial_merge_size) ** 2
    full_pairs = full_layers * counts.get("frame_pairs", 0)
    window_pairs = window_layers * counts.get("patches", 0) * window_patches
    # 4: two products, of queries with keys and of weights with values, each of 2 FLOPs a pair and element of the heads
    return {
        "decoder/layers": 4.0 * text.num_hidden_layers * text_width * counts["pairs"],
        "audio_encoder/layers": 4.0 * audio.encoder_layers * audio.d_model * audio_pairs,
        "vision_encoder/layers": 4.0 * vision.hidden_size * (full_pairs + window_pairs),
    }


def _module(path: str) -> str:
    """The first two parts of a parameter's path, like ``decoder/layers``."""
    return "/".join(path.split("/")[:2])


def _gradient_passes(trained: Collection[str]) -> dict[str, bool]:
    """Of each module whether gradients pass through it, to what trains before it or, in a stack of layers, in it."""
    trained_modules = {_module(path) for path in trained}
    passes: dict[str, bool] = {}
    encoders_train = False
    for tower, names in _MODULES.items():
        # the encoders do not see each other, the decoder sees both
        trains_before = encoders_train if tower == "decoder" else False
        for name in names:
            module = f"{tower}/{name}"
            trains = module in trained_modules
            # in a stack that trains, all layers but the first have one before them that needs a gradient
            passes[module] = trains_before or (trains and name == "layers")
            trains_before = trains_before or trains
        encoders_train = encoders_train or trains_before
    return passes

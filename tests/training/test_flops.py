"""Model FLOPs against the closed formula of a decoder, and what passes back through frozen parts."""

from __future__ import annotations

import pytest

from configs import RECIPES
from omni_jax.checkpoint.name_map import make_name_table
from omni_jax.training.objectives import make_objective
from omni_jax.training.optimizer import learning_rate_scales

RECIPE = RECIPES["thinker-sft-7b"]
SIZES = {"/".join(entry.path): entry.size for entry in make_name_table(RECIPE.model, ["thinker"])}
LENGTH = 8192
TEXT = {"tokens": LENGTH, "pairs": LENGTH * (LENGTH + 1) / 2}
MEDIA = {"blocks": 10, "patches": 6400, "frame_pairs": 10 * 640**2}


def flops(trained, counts):
    return make_objective(RECIPE).count_flops(SIZES, trained, counts)


def test_a_row_of_text_of_the_7b() -> None:
    """As others count it: 6 a weight and token without the embeddings, and causal attention."""
    weights = 7_615_616_512 - 152_064 * 3584
    attention = 6 * 28 * 28 * 128 * LENGTH * (LENGTH + 1)
    assert flops(SIZES, TEXT) == pytest.approx(6 * weights * LENGTH + attention, rel=1e-3)


def test_frozen_parts_cost_less() -> None:
    adapters, encoders = (learning_rate_scales(phase, SIZES) for phase in RECIPES["pretrain1-7b"].phases)
    everything = flops(SIZES, TEXT | MEDIA)
    forward = flops((), TEXT | MEDIA)
    assert everything == pytest.approx(3 * forward, rel=1e-2)
    assert forward < flops(adapters, TEXT | MEDIA) < flops(encoders, TEXT | MEDIA) < everything
    # a frozen decoder hands gradients on to the adapters, but has none of its own
    assert flops(adapters, TEXT) == pytest.approx(2 * flops((), TEXT), rel=0.1)
    # frozen encoders only read
    tuned = flops([path for path in SIZES if path.startswith("thinker/decoder/")], TEXT | MEDIA)
    assert tuned - flops(SIZES, TEXT) == pytest.approx(forward - flops((), TEXT))

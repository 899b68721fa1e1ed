"""Objectives by the options that a recipe has for them."""

from __future__ import annotations

from omni_jax.training.objective import Objective
from omni_jax.training.objectives.next_token import make_next_token
from omni_jax.training.recipe import Recipe


def make_objective(recipe: Recipe) -> Objective:
    """What the recipe trains.

    Raises:
      ConfigError: if its fields do not go together.
    """
    recipe.check()
    return make_next_token(recipe)

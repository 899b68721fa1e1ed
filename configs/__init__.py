"""Recipes by name. Each module makes those of one stage, for every size."""

from configs import thinker_sft

RECIPES = {**thinker_sft.RECIPES}

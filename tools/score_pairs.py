"""Scores preference pairs with the model that preference training is to begin from (docs/speech-training.md).

    python tools/score_pairs.py talker-dpo-7b --init runs/talker1 --data.train pairs.jsonl --out scored.jsonl

The options are those of the training run. Run again, it goes on where it was stopped.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it also runs as a file


def main() -> int:
    # here and not above: processes that decode media import this file when they start, and need no JAX
    from configs import RECIPES
    from omni_jax.training.options import TalkerDPOOptions
    from omni_jax.training.pair_scores import run_scoring

    recipes = {name: recipe for name, recipe in RECIPES.items() if isinstance(recipe.objective, TalkerDPOOptions)}
    return run_scoring(recipes, description=__doc__)


if __name__ == "__main__":
    sys.exit(main())

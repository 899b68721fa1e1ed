"""Shows what a recipe trains: every parameter, how the mesh spreads it, and the memory of a device.

python train.py thinker-sft-7b --mesh.fsdp 16 --mesh.tensor 4
"""

from __future__ import annotations

import sys

import tyro

from configs import RECIPES
from omni_jax.errors import ConfigError
from omni_jax.training.plan import plan, show


def main() -> int:
    commands = {name: (recipe.about, recipe) for name, recipe in RECIPES.items()}
    recipe = tyro.extras.overridable_config_cli(commands, description=__doc__)
    try:
        show(plan(recipe))
    except ConfigError as e:
        print(f"error: {e}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

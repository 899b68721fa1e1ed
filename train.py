"""Trains: every stage of pretraining, instruction tuning, and what speaks.

python train.py thinker-sft-7b --init CHECKPOINT --data.train rows.jsonl --workdir runs/sft --steps 1000

Run it again with the same folder, and it goes on where it was. Told to stop by SIGTERM it saves itself and exits with
75. --dry-run shows what would train, with what memory, and trains nothing.
"""

from __future__ import annotations

import os
import sys

# arrays of a row are small; threads for them only wait for each other, beside those that read other rows
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")


def main() -> int:
    # here and not above: processes that decode media import this file when they start, and need no JAX
    from configs import RECIPES
    from omni_jax.training.command_line import run_command

    return run_command(RECIPES, description=__doc__)


if __name__ == "__main__":
    sys.exit(main())

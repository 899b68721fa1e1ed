"""Times omni_jax beside the PyTorch reference, in one run, on random parameters; and any server of OpenAI's API.

Both do the same work on the same inputs in float32 with all cores, in turns; a figure is the median of several. Quote
the ratios: the seconds belong to the machine.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path

import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it also runs as a file


def main(args: Sequence[str] | None = None) -> None:
    """Runs what the command line asks for; ``args`` stand for it where they are given."""
    command = list(sys.argv[1:] if args is None else args)[:1]
    # found without importing them: this process uses neither; a server is measured without them
    if command != ["serve"] and not all(map(importlib.util.find_spec, ("torch", "transformers"))):
        sys.exit("the benchmark runs beside PyTorch: pip install -e '.[test]'")
    # not at the top: the processes of the sides import this file and must not hold what they do not use
    from benchmarks.accelerator import accelerator
    from benchmarks.batch import batch
    from benchmarks.data import data
    from benchmarks.first_packet import first_packet
    from benchmarks.latency import latency
    from benchmarks.serve import serve
    from benchmarks.speak import speak
    from benchmarks.understand import understand

    commands = {
        "understand": understand,
        "speak": speak,
        "latency": latency,
        "first-packet": first_packet,
        "data": data,
        "batch": batch,
        "serve": serve,
        "accelerator": accelerator,
    }
    tyro.extras.subcommand_cli_from_dict(commands, description=__doc__, args=args)


if __name__ == "__main__":
    main()

"""``bench.py data``: files to what a model takes, beside the reference processor."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import track

from benchmarks import data_ours
from benchmarks.bench_timing import Case, Side, measure, one_core, show, write
from benchmarks.data_files import NAMES, write_media


def data(json_out: Path | None = None, repeats: int = 5) -> None:
    """The input pipeline on one core: decode, resample, log-mel, resize, patches, tokens; then packing into a batch.

    The reference has no decoders of its own; its side takes omni_jax's, and the processor of transformers. Each side
    has a process that is held to one core.

    Example: python tools/bench.py data --json-out out/data.json

    Args:
      json_out: write the figures here as well.
      repeats: counted rounds of each case, after one that is not.
    """
    ours, theirs = Side(), Side()
    try:
        for side in (ours, theirs):
            side(one_core)
        with tempfile.TemporaryDirectory() as folder:
            write_media(Path(folder))
            steps = track(cases(ours, theirs, Path(folder)), "timing", console=Console(stderr=True))
            results = [measure(case, repeats) for case in steps]
    finally:
        ours.close()
        theirs.close()
    show(results)
    write(json_out, results)


def cases(ours: Side, theirs: Side, folder: Path) -> Sequence[Case]:
    """Each kind of file by itself, then one of each, packed on our side."""
    from benchmarks import data_theirs  # here, for it has this process, and those it starts, look for torchvision

    files = {name: (folder / file,) for name, file in NAMES.items()}
    every = tuple(file for one in files.values() for file in one)
    made = [
        Case(
            name,
            functools.partial(ours, data_ours.apart, one),
            functools.partial(theirs, data_theirs.make, one),
            1.0,
            "files/s",
        )
        for name, one in files.items()
    ]
    together = functools.partial(ours, data_ours.packed, every), functools.partial(theirs, data_theirs.make, every)
    return [*made, Case("one of each, ours packed too", *together, float(len(every)), "files/s")]

"""``bench.py data``: from files to what a model takes, beside the reference processor."""

from __future__ import annotations

import tempfile
from pathlib import Path

from benchmarks.media import FILES, write_media
from benchmarks.models import make_middle_config, write_processor
from benchmarks.ours import OmniJaxSide
from benchmarks.pytorch_side import PyTorchSide
from benchmarks.report import case_records, check_at_least_one, print_cases, write_json
from benchmarks.runner import Case, run_cases
from benchmarks.side import Side, SideProcess


def data(json_out: Path | None = None, repeats: int = 5) -> None:
    """The input pipeline on one core: decode, resample, log-mel, resize, patches, tokens; then packing into a batch.

    The reference has no decoders of its own; its side takes omni_jax's, and the processor of transformers. Each side
    has a process that is held to one core.

    Example: python tools/bench.py data --json-out out/data.json

    Args:
      json_out: write the figures here as well.
      repeats: counted rounds of each case, after one that is not.
    """
    check_at_least_one(repeats=repeats)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        # no model: only what a processor is loaded from
        write_processor(folder, make_middle_config())
        write_media(folder)
        with (
            SideProcess(OmniJaxSide, folder, one_core=True) as ours,
            SideProcess(PyTorchSide, folder, one_core=True) as pytorch,
        ):
            results = run_cases(make_cases(folder), ours, pytorch, repeats)
    print_cases(results)
    write_json(json_out, case_records(results))


def make_cases(folder: Path) -> list[Case]:
    """Each kind of file by itself, then one of each, packed on our side."""
    files = {name: folder / file for name, file in FILES.items()}
    cases = []
    for name, file in files.items():
        cases.append(Case(name, Side.prepare_files, ((file,), False), work=1, unit="files/s"))
    # the last argument: whether our side packs them into a batch, too
    together = (tuple(files.values()), True)
    cases.append(Case("one of each, ours packed too", Side.prepare_files, together, work=len(files), unit="files/s"))
    return cases

"""omni_jax's side of ``bench.py data``: rows to examples, and examples into a batch."""

from __future__ import annotations

import functools
import tempfile
import time
from pathlib import Path

from benchmarks.bench_sizes import middle_config
from omni_jax.config import OmniConfig
from omni_jax.data.config import DataConfig
from omni_jax.data.examples import Prepare
from omni_jax.data.packing import Budget, Part, assemble
from omni_jax.data.sources import Row
from omni_jax.processing.processor import Processor
from tools.tokenizer_files import write_tokenizer

BUDGET = Budget.of(DataConfig(tokens=16_384, windows=128))  # holds one of each file; the picture has 108 windows


@functools.cache
def _prepare() -> Prepare:
    """The published settings of sound and pictures."""
    with tempfile.TemporaryDirectory() as folder:
        write_processor(Path(folder), middle_config())
        return Prepare(Processor.load(folder), BUDGET.tokens, BUDGET.check)


def write_processor(folder: Path, config: OmniConfig) -> None:
    """What both sides' processors are loaded from."""
    write_tokenizer(folder, config)
    config.save(folder)


def apart(files: tuple[Path, ...]) -> float:
    """Seconds from files to examples, one of each."""
    prepare, rows = _prepare(), _rows(files)
    started = time.perf_counter()
    for row in rows:
        prepare.example(row)
    return time.perf_counter() - started


def packed(files: tuple[Path, ...]) -> float:
    """Seconds from files to one batch that holds all of them.

    Raises:
      RuntimeError: if the budgets do not hold them.
    """
    prepare, rows, part = _prepare(), _rows(files), Part(BUDGET)
    started = time.perf_counter()
    for row in rows:
        if not part.place(prepare.example(row)):
            raise RuntimeError(f"{row.contents} does not fit into the batch")
    assemble([part], BUDGET, prepare.processor.config, first=0, streams=1)
    return time.perf_counter() - started


def _rows(files: tuple[Path, ...]) -> list[Row]:
    tags = {".wav": ("<audio>", "audios"), ".jpg": ("<image>", "images"), ".mp4": ("<video>", "videos")}
    rows = []
    for i, file in enumerate(files):
        tag, medium = tags[file.suffix]
        said = [{"role": "user", "content": f"{tag}What is it?"}, {"role": "assistant", "content": "It is noise."}]
        rows.append(Row("rows.jsonl", i + 1, {"messages": said, medium: [str(file)]}))
    return rows

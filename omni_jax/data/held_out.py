"""Rows that a run is measured on: each of them once, in batches of the same shapes as those it trains on."""

from __future__ import annotations

from typing import Any

import grain

from omni_jax.data.config import DataConfig
from omni_jax.data.example_reader import ExampleReader
from omni_jax.data.examples import Reject
from omni_jax.data.mixture import NumberedRows
from omni_jax.data.packing_protocol import Packing, PartLike
from omni_jax.data.sources import Files, open_rows
from omni_jax.distributed import gather
from omni_jax.errors import InputError


def read_held_out(config: DataConfig, packing: Packing, *, process_index: int = 0, process_count: int = 1) -> list[Any]:
    """The batches of a process; every process has as many, the last of them maybe of padding alone.

    They stay in memory, for they are read again and again.

    Args:
      config: names the rows (``valid``) and has the budgets.
      packing: from rows to batches.
      process_index: of this process, from 0.
      process_count: how many processes make up a batch.

    Raises:
      InputError: if a file of rows cannot be read, or a row of them cannot be used.
    """
    rows = Files([NumberedRows(open_rows(path), i) for i, path in enumerate(config.valid)])
    streams_per_process = config.streams // process_count
    first = process_index * streams_per_process
    parts = [_pack_all(rows, i, config, packing) for i in range(first, first + streams_per_process)]
    num_batches = max(gather(max(map(len, parts))))
    for stream in parts:
        stream += [packing.new_part() for _ in range(num_batches - len(stream))]
    return [packing.assemble(batch, first=first, streams=config.streams) for batch in zip(*parts, strict=True)]


def _pack_all(rows: Files, stream: int, config: DataConfig, packing: Packing) -> list[PartLike]:
    """The parts of a stream, which reads every ``streams``-th row."""
    own = grain.MapDataset.source(rows).slice(slice(stream, None, config.streams))
    reader = ExampleReader(own.map(packing.prepare), config.workers, in_threads=config.isolate_media)
    parts: list[PartLike] = []
    try:
        for number in range(len(own)):
            element = reader.read(number)
            # what a loss is taken of must not change with what happens to be readable
            if isinstance(element, Reject):
                raise InputError(f"data.valid: {element}; mend the row, or leave it out")
            for example in element:
                # into one of the last parts with room: all of them would be tried ever longer
                if not any(part.place(example) for part in parts[-config.lookahead :]):
                    parts.append(packing.new_part())
                    parts[-1].place(example)
    finally:
        reader.close()
    return parts

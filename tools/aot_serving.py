"""Every kind of program that serving runs, compiled for TPUs that are not there, in one table.

A program of another size of chunk, cache or list than those here differs in its shapes alone.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from omni_jax.config import OmniConfig
from omni_jax.engine.token2wav_engine import WINDOW_NEW_FRAMES
from omni_jax.sharding import MeshConfig
from tools.aot_programs import PROGRAMS, Program, Shapes

MB = 1e6
# one request at a time, where latency counts; a whole batch, where throughput does
_ONE = Shapes(batch=1, cache=2048)
_MANY = Shapes(batch=32, cache=8192)


@dataclass(frozen=True)
class ServingProgram:
    """A row of the table.

    Attributes:
      label: what a reader calls it.
      name: of ``PROGRAMS``.
      shapes: of the program.
      by_rows: whether all chips are on the batch; else they share out heads.
    """

    label: str
    name: str
    shapes: Shapes
    by_rows: bool = False

    def make(self, config: OmniConfig, devices: list[Any]) -> tuple[Program, Any]:
        """The program with abstract arguments, and its mesh."""
        sizes = MeshConfig(data=len(devices)) if self.by_rows else MeshConfig(tensor=len(devices))
        mesh = sizes.make(devices)
        return PROGRAMS[self.name](config, mesh, self.shapes), mesh


SERVING = (
    ServingProgram("audio encoder, 4 blocks", "audio-encoder", _ONE),
    ServingProgram("vision encoder, 32 windows", "vision-encoder", _ONE),
    ServingProgram("Thinker, prefill of 64 tokens, 1 row", "thinker-prefill", dataclasses.replace(_ONE, tokens=64)),
    ServingProgram("Thinker, prefill of 256 tokens, 1 row", "thinker-prefill", _ONE),
    ServingProgram("Thinker, 8 blocks of 32 tokens into 32 slots", "thinker-blocks", _MANY),
    ServingProgram("Thinker, a token, 1 row", "thinker-decode", _ONE),
    ServingProgram("Thinker, a token, 32 rows", "thinker-decode", _MANY),
    ServingProgram("Talker, prefill of 64 tokens, 1 row", "talker-prefill", dataclasses.replace(_ONE, tokens=64)),
    ServingProgram("Talker, a code, 1 row", "talker-decode", _ONE),
    ServingProgram("Talker, a code, 32 rows", "talker-decode", _MANY),
    ServingProgram("sampler, 32 rows", "sampler", _MANY),
    ServingProgram("speaker encoder, clip to 512 frames", "speaker-encoder", _ONE),
    ServingProgram("DiT, first chunk of 3 blocks, 1 row", "dit-first", dataclasses.replace(_ONE, blocks=3)),
    ServingProgram("DiT, chunk of 2 blocks, 1 row", "dit-block", _ONE),
    ServingProgram("DiT, list of 64 blocks", "dit-list", dataclasses.replace(_ONE, blocks=64)),
    ServingProgram("DiT, chunk of 2 blocks, 32 rows", "dit-block", _MANY, by_rows=True),
    ServingProgram("vocoder, first chunk of 2 blocks, 1 row", "vocoder-first", _ONE),
    ServingProgram("vocoder, chunk of 2 blocks, 1 row", "vocoder-block", _ONE),
    *(
        ServingProgram(f"vocoder, window of {frames} frames", f"vocoder-window-{frames}", _ONE)
        for frames in WINDOW_NEW_FRAMES
    ),
)


def select(part: str | None) -> list[ServingProgram]:
    """The programs whose label contains ``part``; all of them where it is None."""
    return [program for program in SERVING if part is None or part.lower() in program.label.lower()]


def show_table(topology: str, rows: list[tuple[str, Any]]) -> None:
    """Prints a row for each report (``aot_compile.Report``)."""
    table = Table(
        "program",
        "compile, CPU s",
        "peak, GiB",
        "traffic, GB",
        "over floor",
        "Mcyc",
        "largest copy, MB",
        "collectives",
        "moved, MB",
        title=f"{topology}, one chip, one run",
        box=None,
    )
    for label, report in rows:
        ratio = "" if report.traffic_ratio is None else f"{report.traffic_ratio:.2f}"
        table.add_row(
            label,
            f"{report.compile_cpu_seconds:.0f}",
            f"{report.peak_bytes_per_chip / 2**30:.2f}",
            f"{report.traffic_bytes / 1e9:.2f}",
            ratio,
            f"{report.estimated_cycles / 1e6:.1f}",
            f"{report.largest_copy_bytes / MB:.1f}",
            str(sum(report.collective_counts.values())),
            f"{sum(report.collective_bytes.values()) / MB:.0f}",
        )
    Console(width=160, markup=False).print(table)

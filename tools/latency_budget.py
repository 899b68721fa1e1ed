"""What leads to the first packet of speech on a TPU, and how far a player must hold back: arithmetic.

python tools/latency_budget.py --topology v6e:2x2

compiles each program that a streamed reply of the 7B runs, over all chips of the topology, and multiplies its estimated
time by how often it runs. Nothing runs on a TPU, and none is needed. Of each program the time is what takes longest of
the compiler's cycles and the bytes that move to and from memory, and what moves between chips on top. The compiler
overestimates cycles of elementwise work, and what the host does is left out.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console
from rich.progress import track
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it also runs as a file

from tools.aot_compile import MODELS, Report, compile_for, describe  # isort: skip  (sets the environment of jax)
from omni_jax.checks import printable
from omni_jax.engine.request import ChunkSizes
from omni_jax.errors import ConfigError, InputError
from omni_jax.models.bigvgan_streaming import reach
from omni_jax.sharding import MeshConfig
from tools.aot_programs import PROGRAMS, Shapes

COLLECTIVE_SECONDS = 1e-6  # that starting a transfer between neighbours takes, beside its bytes
REPLY_TOKENS = 120  # of a long reply: 30 seconds, so that its text does not end before the first packet
CODE_SECONDS = 0.02


@dataclass(frozen=True)
class Chip:
    """Published figures of a chip.

    Attributes:
      clock: cycles a second: peak products a second over those of a cycle.
      memory: bytes a second to and from HBM.
      links: bytes a second to other chips, all links together.
    """

    clock: float
    memory: float
    links: float


CHIPS = {
    "v5e": Chip(1.5e9, 819e9, 200e9),
    "v5p": Chip(1.75e9, 2765e9, 600e9),
    "v6e": Chip(1.75e9, 1640e9, 448e9),
}


@dataclass(frozen=True)
class Line:
    """A part of the budget.

    Attributes:
      label: what a reader calls it.
      program: of ``PROGRAMS``.
      shapes: of it.
      first: how often it runs until the first packet.
      second: how often between the first packet and the second.
    """

    label: str
    program: str
    shapes: Shapes
    first: int
    second: int


def make_lines(sizes: ChunkSizes, num_codes_a_block: int) -> list[Line]:
    """The parts of a long reply, whose input was heard while it came."""
    one = Shapes(batch=1, cache=2048)
    tokens = sizes.first_tokens
    # two codes fewer than tokens can be decoded; a call makes a fixed number of tokens
    while tokens - 2 < sizes.first_chunk_codes:
        tokens += sizes.tokens
    later_tokens = 0
    while tokens + later_tokens - 2 < sizes.first_chunk_codes + sizes.chunk_codes:
        later_tokens += sizes.tokens
    first_blocks = sizes.first_chunk_codes // num_codes_a_block
    later_blocks = sizes.chunk_codes // num_codes_a_block
    vocoder = "vocoder-block" if sizes.first_look_ahead is None else "vocoder-first"
    first_frames = dataclasses.replace(one, blocks=first_blocks - 1)
    return [
        Line("audio encoder, the last block", "audio-encoder", one, 1, 0),
        Line("Thinker, prefill of 64", "thinker-prefill", dataclasses.replace(one, tokens=64), 1, 0),
        Line("Talker, prefill of 64", "talker-prefill", dataclasses.replace(one, tokens=64), 1, 0),
        Line("Thinker, a token", "thinker-decode", one, tokens, later_tokens),
        Line("Talker, a code", "talker-decode", one, sizes.first_chunk_codes, sizes.chunk_codes),
        Line("DiT, the first chunk", "dit-first", dataclasses.replace(one, blocks=first_blocks), 1, 0),
        Line("DiT, a later chunk", "dit-block", dataclasses.replace(one, blocks=later_blocks), 0, 1),
        Line("vocoder, the first chunk", vocoder, first_frames, 1, 0),
        Line("vocoder, a later chunk", "vocoder-block", dataclasses.replace(one, blocks=later_blocks), 0, 1),
    ]


def estimate_seconds(report: Report, chip: Chip) -> float:
    """Of one run of a program on each chip."""
    on_chip = max(report.estimated_cycles / chip.clock, report.traffic_bytes / chip.memory)
    between = sum(report.collective_bytes.values()) / chip.links
    return on_chip + between + COLLECTIVE_SECONDS * sum(report.collective_counts.values())


@dataclass(frozen=True)
class Budget:
    """Prints the budget of the first packet of a long spoken reply.

    For instance:

        python tools/latency_budget.py --topology v6e:2x2

        python tools/latency_budget.py --topology v5e:2x2 --first-chunk-codes 24 --first-look-ahead 10
    """

    topology: Annotated[str, tyro.conf.arg(metavar="GEN:AxB[xC]")]
    """Chips: v5e:2x2, v6e:2x2 and so on; all of them share out the heads of one model."""
    model: Annotated[str, tyro.conf.arg(metavar="7b|3b|tiny")] = "7b"
    """Size of the model."""
    first_chunk_codes: int = ChunkSizes.first_chunk_codes
    """Codes that the first packet is made from."""
    first_look_ahead: int | None = ChunkSizes.first_look_ahead
    """Mel frames that the vocoder looks ahead to in the first packet; without it, all that it depends on."""
    json: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """Write the figures here as well."""

    def run(self) -> None:
        """Compiles and prints.

        Raises:
          ConfigError: for a topology or a model that there is not.
          InputError: for a chunk that cannot be used.
        """
        if self.model not in MODELS:
            raise ConfigError(f"--model is {self.model!r}; there are {', '.join(MODELS)}")
        config = MODELS[self.model]()
        sizes = ChunkSizes(first_chunk_codes=self.first_chunk_codes, first_look_ahead=self.first_look_ahead)
        dit = config.token2wav_config.dit_config
        needed = reach(config.token2wav_config.bigvgan_config).ahead
        look_ahead = needed if self.first_look_ahead is None else self.first_look_ahead
        block_codes = dit.block_size // dit.repeats
        frames = self.first_chunk_codes * dit.repeats - dit.block_size - look_ahead
        if frames <= 0 or self.first_chunk_codes % block_codes:
            raise ConfigError(
                f"--first-chunk-codes {self.first_chunk_codes} gives no sound: the vocoder looks {look_ahead} frames "
                f"ahead; take a larger multiple of {block_codes}"
            )
        devices = describe(self.topology)
        chip = CHIPS[self.topology.partition(":")[0]]
        mesh = MeshConfig(tensor=len(devices)).make(devices)
        milliseconds = []
        lines = make_lines(sizes, block_codes)
        for line in track(lines, description="compiling", console=Console(stderr=True)):
            wanted = PROGRAMS[line.program](config, mesh, line.shapes)
            report, _ = compile_for(wanted, mesh, name=line.program, topology=self.topology)
            milliseconds.append(1000 * estimate_seconds(report, chip))
        self._show(lines, milliseconds, frames / 100)

    def _show(self, lines: list[Line], milliseconds: list[float], sound: float) -> None:
        table = Table(title=f"Qwen2.5-Omni {self.model.upper()} on {self.topology}, a long reply alone", box=None)
        for name in ("part", "one run, ms", "to the first packet", "ms", "to the second", "ms"):
            table.add_column(name, justify="left" if name == "part" else "right")
        first = 0.0
        second = 0.0
        for line, each in zip(lines, milliseconds, strict=True):
            first += line.first * each
            second += line.second * each
            cells = [line.label, f"{each:.2f}"]
            for number in (line.first, line.second):
                cells += [str(number), f"{number * each:.0f}"] if number else ["", ""]
            table.add_row(*cells)
        table.add_row("together", "", "", f"{first:.0f}", "", f"{second:.0f}")
        hold_back = max(second / 1000 - sound, 0.0)
        console = Console(width=120, markup=False)
        console.print(table)
        console.print(
            f"sound in the first packet: {sound:.2f} s; the second comes {second / 1000:.2f} s later; "
            f"a player that holds back {hold_back:.2f} s does not run dry",
            highlight=False,
            soft_wrap=True,
        )
        if self.json is not None:
            self.json.parent.mkdir(parents=True, exist_ok=True)
            figures = dict(first_packet_ms=first, second_packet_ms=second, sound_seconds=sound, hold_back=hold_back)
            rows: list[dict[str, Any]] = []
            for line, each in zip(lines, milliseconds, strict=True):
                rows.append({"part": line.label, "ms": each, "first": line.first, "second": line.second})
            self.json.write_text(json.dumps({**figures, "parts": rows}, indent=2) + "\n", encoding="utf-8")


def main() -> int:
    try:
        tyro.cli(Budget, description=__doc__).run()
    except (ConfigError, InputError) as e:
        print(f"error: {printable(str(e))}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

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

from tools.aot_compile import GIB, MODELS, ROOM, Report, compile_for, describe  # isort: skip  (sets the environment of jax)
import jax

from omni_jax.checks import printable
from omni_jax.config import OmniConfig
from omni_jax.engine.request import ChunkSizes
from omni_jax.errors import ConfigError, InputError
from omni_jax.generation.quantization import CacheDtype, Quantization
from omni_jax.models.bigvgan_streaming import reach
from omni_jax.models.ode_solver import Solver
from omni_jax.sharding import MeshConfig
from tools.aot_programs import PROGRAMS, Program, Shapes, on_chip, serving_params

COLLECTIVE_SECONDS = 1e-6  # that starting a transfer between neighbours takes, beside its bytes
MEL_FRAMES_A_SECOND = 100


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


def make_lines(sizes: ChunkSizes, num_codes_a_block: int, one: Shapes) -> list[Line]:
    """The parts of a long reply, whose input was heard while it came; ``one`` has the shapes of one row."""
    tokens = sizes.first_tokens
    # two codes fewer than tokens can be decoded; a call makes a fixed number of tokens
    while tokens - 2 < sizes.first_chunk_codes:
        tokens += sizes.tokens
    later_tokens = 0
    while tokens + later_tokens - 2 < sizes.first_chunk_codes + sizes.chunk_codes:
        later_tokens += sizes.tokens
    first_blocks = sizes.first_chunk_codes // num_codes_a_block
    later_blocks = sizes.chunk_codes // num_codes_a_block
    first_frames = dataclasses.replace(one, blocks=first_blocks - 1)
    return [
        Line("audio encoder, the last block", "audio-encoder", one, 1, 0),
        Line("Thinker, prefill of 64", "thinker-prefill", dataclasses.replace(one, tokens=64), 1, 0),
        Line("Talker, prefill of 64", "talker-prefill", dataclasses.replace(one, tokens=64), 1, 0),
        Line("Thinker, a token", "thinker-decode", one, tokens, later_tokens),
        Line("Talker, a code", "talker-decode", one, sizes.first_chunk_codes, sizes.chunk_codes),
        Line("DiT, the first chunk", "dit-first", dataclasses.replace(one, blocks=first_blocks), 1, 0),
        Line("DiT, a later chunk", "dit-block", dataclasses.replace(one, blocks=later_blocks), 0, 1),
        Line("vocoder, the first chunk", "vocoder-first", first_frames, 1, 0),
        Line("vocoder, a later chunk", "vocoder-block", dataclasses.replace(one, blocks=later_blocks), 0, 1),
    ]


def estimate_seconds(report: Report, chip: Chip) -> float:
    """Of one run of a program on each chip."""
    on_chip = max(report.estimated_cycles / chip.clock, report.traffic_bytes / chip.memory)
    between = sum(report.collective_bytes.values()) / chip.links
    return on_chip + between + COLLECTIVE_SECONDS * sum(report.collective_counts.values())


@dataclass(frozen=True)
class Part:
    """A line with its time.

    Attributes:
      label, first, second: as of ``Line``.
      milliseconds: of one run.
    """

    label: str
    first: int
    second: int
    milliseconds: float


@dataclass(frozen=True)
class Budget:
    """What a long reply takes.

    Attributes:
      parts: in the order in which they run.
      first_packet_ms: from the end of the question.
      second_packet_ms: from the first packet.
      sound_seconds: in the first packet.
      hold_back_seconds: that a player waits, so that it does not run dry before the second packet.
    """

    parts: list[Part]
    first_packet_ms: float
    second_packet_ms: float
    sound_seconds: float
    hold_back_seconds: float


def make_budget(lines: list[Line], reports: list[Report], chip: Chip, sound_seconds: float) -> Budget:
    """The budget of compiled programs, a report for each line."""
    parts = []
    for line, report in zip(lines, reports, strict=True):
        parts.append(Part(line.label, line.first, line.second, 1000 * estimate_seconds(report, chip)))
    first_ms = sum(part.first * part.milliseconds for part in parts)
    second_ms = sum(part.second * part.milliseconds for part in parts)
    return Budget(parts, first_ms, second_ms, sound_seconds, max(second_ms / 1000 - sound_seconds, 0.0))


def count_memory(params: Any, programs: list[Program], reports: list[Report]) -> float:
    """Bytes of a chip, at most: the parameters, all programs' states and inputs, and what the largest needs on top."""
    held = sum(map(on_chip, jax.tree.leaves(params)))
    for program in programs:
        # the parameters come first
        held += sum(map(on_chip, jax.tree.leaves(program.arguments[1:])))
    return held + max(report.peak_bytes_per_chip - report.argument_bytes for report in reports)


def count_first_frames(config: OmniConfig, sizes: ChunkSizes) -> int:
    """Mel frames whose sound is in the first packet.

    Raises:
      ConfigError: if there are none.
    """
    dit = config.token2wav_config.dit_config
    needed = reach(config.token2wav_config.bigvgan_config).ahead
    look_ahead = needed if sizes.first_look_ahead is None else sizes.first_look_ahead
    block_codes = dit.block_size // dit.repeats
    frames = sizes.first_chunk_codes * dit.repeats - dit.block_size - look_ahead
    if frames <= 0 or sizes.first_chunk_codes % block_codes:
        raise ConfigError(
            f"--first-chunk-codes {sizes.first_chunk_codes} gives no sound: the vocoder looks {look_ahead} frames "
            f"ahead; take a larger multiple of {block_codes}"
        )
    return frames


@dataclass(frozen=True)
class BudgetCommand:
    """Prints the budget of the first packet of a long spoken reply.

    For instance:

        python tools/latency_budget.py --topology v6e:2x2

        python tools/latency_budget.py --topology v5e:2x2 --first-chunk-codes 24 --first-look-ahead 10

        python tools/latency_budget.py --topology v5e:2x2 --solver.method euler --solver.steps 4 --solver.no-guidance
    """

    topology: Annotated[str, tyro.conf.arg(metavar="GEN:AxB[xC]")]
    """Chips: v5e:2x2, v6e:2x2 and so on; all of them share out the heads of one model."""
    model: Annotated[str, tyro.conf.arg(metavar="7b|3b|tiny")] = "7b"
    """Size of the model."""
    first_chunk_codes: int = ChunkSizes.first_chunk_codes
    """Codes that the first packet is made from."""
    first_look_ahead: int | None = ChunkSizes.first_look_ahead
    """Mel frames that the vocoder looks ahead to in the first packet; without it, all that it depends on."""
    chips: int | None = None
    """Use only the first so many of them."""
    quantization: Quantization | None = None
    """Of the linear maps of Thinker and Talker; without it, they are in bfloat16."""
    kv_cache_dtype: CacheDtype | None = None
    """Of their keys and values; without it, they are in bfloat16."""
    solver: Solver = Solver()  # noqa: RUF009, frozen
    """Of Token2Wav's flow; that of a distilled DiT has no guidance."""
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
        frames = count_first_frames(config, sizes)
        devices = describe(self.topology, self.chips)
        mesh = MeshConfig(tensor=len(devices)).make(devices)
        dit = config.token2wav_config.dit_config
        formats: dict[str, Any] = dict(quantization=self.quantization, kv_cache_dtype=self.kv_cache_dtype)
        one = Shapes(batch=1, cache=2048, solver=self.solver, **formats)
        lines = make_lines(sizes, dit.block_size // dit.repeats, one)
        programs = [PROGRAMS[line.program](config, mesh, line.shapes) for line in lines]
        reports = []
        for program, line in zip(track(programs, "compiling", console=Console(stderr=True)), lines, strict=True):
            report, _ = compile_for(program, mesh, name=line.program, topology=self.topology)
            reports.append(report)
        budget = make_budget(lines, reports, CHIPS[self.topology.partition(":")[0]], frames / MEL_FRAMES_A_SECOND)
        self._show(budget, reports, count_memory(serving_params(config, mesh, one), programs, reports))
        if self.json is not None:
            self.json.parent.mkdir(parents=True, exist_ok=True)
            self.json.write_text(json.dumps(dataclasses.asdict(budget), indent=2) + "\n", encoding="utf-8")

    def _show(self, budget: Budget, reports: list[Report], memory: float) -> None:
        table = Table(title=f"Qwen2.5-Omni {self.model.upper()} on {self.topology}, a long reply alone", box=None)
        for name in ("part", "over floor", "one run, ms", "to the first packet", "ms", "to the second", "ms"):
            table.add_column(name, justify="left" if name == "part" else "right")
        for part, report in zip(budget.parts, reports, strict=True):
            ratio = "" if report.traffic_ratio is None else f"{report.traffic_ratio:.2f}"
            cells = [part.label, ratio, f"{part.milliseconds:.2f}"]
            for number in (part.first, part.second):
                cells += [str(number), f"{number * part.milliseconds:.0f}"] if number else ["", ""]
            table.add_row(*cells)
        table.add_row("together", "", "", "", f"{budget.first_packet_ms:.0f}", "", f"{budget.second_packet_ms:.0f}")
        limit = ROOM * reports[0].hbm_bytes
        console = Console(width=120, markup=False, highlight=False, soft_wrap=True)
        console.print(table)
        console.print(
            f"sound in the first packet: {budget.sound_seconds:.2f} s; the second comes "
            f"{budget.second_packet_ms / 1000:.2f} s later; a player that holds back {budget.hold_back_seconds:.2f} s "
            "does not run dry"
        )
        console.print(
            f"memory of each chip, with every part and the states of one reply: at most {memory / GIB:.2f} GiB, which "
            f"{'fits' if memory <= limit else 'does not fit'} in {limit / GIB:.2f}"
        )


def main() -> int:
    try:
        tyro.cli(BudgetCommand, description=__doc__).run()
    except (ConfigError, InputError) as e:
        print(f"error: {printable(str(e))}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

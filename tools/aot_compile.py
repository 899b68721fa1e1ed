"""Compiles a program for TPUs that are not there, with the real compiler, and says whether it fits and what it costs.

Figures are the compiler's, or counted from the compiler's output (docs/tpu.md says how far to trust them). No TPU is
needed: pip install -e '.[aot]' brings the compiler. The status is 1 where the program does not fit.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import time
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

# before jax is imported, which reads them once
os.environ["JAX_PLATFORMS"] = "cpu"  # the compiler is asked for by name
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # there is no metadata server to ask
os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # or a second compilation on this machine is refused

import jax
import tyro
from jax.experimental import topologies
from rich.console import Console
from rich.progress import track
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it also runs as a file

from configs import RECIPES
from omni_jax.checks import printable
from omni_jax.config import OmniConfig
from omni_jax.errors import ConfigError
from omni_jax.sharding import MESH_AXES, MeshConfig
from omni_jax.training.objectives import make_objective
from omni_jax.training.recipe import Recipe
from omni_jax.training.step import abstract_program
from tools.aot_hlo import Program as Text
from tools.aot_programs import PROGRAMS, Program, Shapes, on_chip
from tools.aot_serving import SERVING, select, show_table

GIB = 2**30
SERVING_NAME = "serving"
# of a chip, as the compiler counts it
HBM = {"v5e": 15.75 * GIB, "v5p": 95.74 * GIB, "v6e": 31.25 * GIB}
ROOM = 0.95  # share of it that a program may fill; nearer the limit the compiler changes the program
MODELS = {"7b": OmniConfig.qwen2_5_omni_7b, "3b": OmniConfig.qwen2_5_omni_3b, "tiny": OmniConfig.tiny}


@dataclass(frozen=True)
class Report:
    """What is known of a compiled program; bytes are those of one chip, and of one run."""

    program: str
    topology: str
    mesh: dict[str, int]
    # memory
    fits: bool
    peak_bytes_per_chip: int
    hbm_bytes: int  # that a chip has
    argument_bytes: int
    state_bytes: int  # of the arguments, from their shapes: more in ``argument_bytes`` is padding, or lost sharding
    donated_bytes: int  # of the arguments, in whose memory results are written
    # what moves
    collective_bytes: dict[str, int]  # by kind, between chips
    collective_counts: dict[str, int]  # how many run
    synchronous_all_gather_bytes: int  # those of them that nothing runs beside
    pallas_calls: int  # in the text
    traffic_bytes: int  # between HBM and the cores, at least
    traffic_ratio: float | None  # over weights and cache read once
    largest_copy_bytes: int  # if it is as large as the next, the cache is copied instead of written in place
    cache_shard_bytes: int  # of the largest array of the cache on a chip
    estimated_cycles: int  # of the compiler, without Pallas calls and collectives
    unknown_loops: int  # how often they turn depends on the data; counted once, in all figures
    compile_seconds: float
    compile_cpu_seconds: float  # of all threads
    libtpu: str
    error: str | None = None


@dataclass(frozen=True)
class Compile:
    """Compiles one program for one topology.

    Programs are the recipes of train.py, and those of generation (thinker-decode, dit-block and so on; a wrong name
    lists them), each with -7b, -3b or -tiny. serving compiles every kind that serving runs, and prints a table.

    For instance:

        python tools/aot_compile.py thinker-sft-7b --topology v5p:4x4x4

        python tools/aot_compile.py thinker-decode-7b --topology v5e:2x2 --mesh.tensor 4 --json decode.json

        python tools/aot_compile.py serving-7b --topology v5e:2x2
    """

    program: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="PROGRAM")]
    topology: Annotated[str, tyro.conf.arg(metavar="GEN:AxB[xC]")]
    """Chips: v5e:2x2, v5p:4x4x4, v6e:16x16 and so on."""
    chips: int | None = None
    """Use only the first so many of them."""
    slices: int = 1
    """So many of the topology, which a data centre's network connects."""
    mesh: MeshConfig = field(default_factory=MeshConfig)
    """How they are laid out. Without it, for a recipe those of a slice are on fsdp and slices on data; for a program of
    generation all are on tensor."""
    shapes: Shapes = field(default_factory=Shapes)
    """Of a program of generation; serving takes their quantization and kv_cache_dtype alone."""
    tokens: int | None = None
    """Positions in a row of a recipe's batch, if not the recipe's own."""
    rows: int | None = None
    """Rows of a recipe's batch, if not one for each part of the mesh that holds rows."""
    text_alone: bool = False
    """A recipe's batch has neither sound nor pictures."""
    only: str | None = None
    """Of serving, compile the programs whose name in the table contains this."""
    json: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """Write the report here as well; of serving a list of them."""
    keep_text: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """Write the compiled program's text here."""

    def run(self) -> bool:
        """Compiles and prints.

        Returns:
          Whether all fits.

        Raises:
          ConfigError: for a program, a topology or a mesh that there is not.
        """
        name, _, size = self.program.rpartition("-")
        if name == SERVING_NAME and size in MODELS:
            return self._run_serving(MODELS[size]())
        report = self._run_one()
        self._write_json(dataclasses.asdict(report))
        show(report)
        return report.fits

    def _run_serving(self, config: OmniConfig) -> bool:
        formats: dict[str, Any] = dict(quantization=self.shapes.quantization, kv_cache_dtype=self.shapes.kv_cache_dtype)
        if self.mesh != MeshConfig() or self.shapes != Shapes(**formats) or self.keep_text is not None:
            raise ConfigError(
                "serving has meshes, sizes and texts of its own: --mesh, --keep-text and the sizes of --shapes go with "
                "one program"
            )
        programs = select(self.only)
        if not programs:
            labels = "; ".join(program.label for program in SERVING)
            raise ConfigError(f"--only is {self.only!r}; no program of serving has that in its name: {labels}")
        devices = describe(self.topology, self.chips, self.slices)
        rows = []
        for program in track(programs, description="compiling", console=Console(stderr=True)):
            shapes = dataclasses.replace(program.shapes, **formats)
            wanted, mesh = dataclasses.replace(program, shapes=shapes).make(config, devices)
            report, _ = compile_for(wanted, mesh, name=program.name, topology=self.topology)
            rows.append((program.label, report))
        self._write_json([{"label": label, **dataclasses.asdict(report)} for label, report in rows])
        show_table(self.topology, rows)
        return all(report.fits for _, report in rows)

    def _write_json(self, values: Any) -> None:
        if self.json is not None:
            self.json.parent.mkdir(parents=True, exist_ok=True)
            self.json.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")

    def _run_one(self) -> Report:
        if self.only is not None:
            raise ConfigError(
                f"--only goes with {SERVING_NAME}, of which it chooses some programs; this is {self.program}"
            )
        devices = describe(self.topology, self.chips, self.slices)
        # a step of training, or a program of generation
        if self.program in RECIPES:
            recipe = self._recipe(RECIPES[self.program], len(devices))
            mesh = recipe.mesh.make(devices)
            function, arguments = abstract_program(recipe, make_objective(recipe), mesh)
            wanted = Program(function, arguments)
        else:
            name, _, size = self.program.rpartition("-")
            if name not in PROGRAMS or size not in MODELS:
                known = [*RECIPES, *(f"{SERVING_NAME}-{model}" for model in MODELS)]
                for program in PROGRAMS:
                    known += [f"{program}-{model}" for model in MODELS]
                raise ConfigError(f"there is no program {self.program!r}; there are {', '.join(known)}")
            mesh = self._laid(MeshConfig(tensor=len(devices))).make(devices)
            wanted = PROGRAMS[name](MODELS[size](), mesh, self.shapes)
        report, text = compile_for(wanted, mesh, name=self.program, topology=self.topology)
        if self.keep_text is not None and text is not None:
            self.keep_text.write_text(text, encoding="utf-8")
        return report

    def _laid(self, usual: MeshConfig) -> MeshConfig:
        return usual if self.mesh == MeshConfig() else self.mesh

    def _recipe(self, recipe: Recipe, chips: int) -> Recipe:
        mesh = self._laid(MeshConfig(data=self.slices, fsdp=chips // self.slices))
        # a row for each part of the mesh that holds rows, as the smallest batch that can be sharded
        rows = mesh.data * mesh.fsdp if self.rows is None else self.rows
        data = dataclasses.replace(recipe.data, rows=rows, streams=rows, tokens=self.tokens or recipe.data.tokens)
        if self.text_alone:
            data = dataclasses.replace(data, audio_blocks=0, canvases=0)
        return dataclasses.replace(recipe, mesh=mesh, data=data)


def describe(topology: str, chips: int | None = None, slices: int = 1) -> list[Any]:
    """The chips of so many slices of a topology, which are not there; only the first so many if ``chips`` is given.

    A whole cube of v5p, and a whole pod of v5e or v6e, is a torus; compiled as a mere grid, a v5p's all-gathers would
    become all-reduces of twice the bytes.

    Raises:
      ConfigError: for a name that the compiler does not know.
    """
    generation, _, sizes = topology.partition(":")
    if generation not in HBM:
        raise ConfigError(f"topology is {topology!r}; it must begin with one of {', '.join(HBM)}")
    try:
        grid = tuple(map(int, sizes.split("x")))
        # whether each axis of the grid closes into a ring
        if generation == "v5p":
            wrap = tuple(n >= 4 for n in grid) if min(grid) >= 4 else (False,) * len(grid)
        else:
            wrap = (*(n == 16 for n in grid), False) if grid == (16, 16) else (False,) * 3
        devices = list(topologies.get_topology_desc(topology, platform="tpu", wrap=wrap, num_slices=slices).devices)
    # libtpu raises what it likes, in many lines
    except Exception as e:
        raise ConfigError(f"topology {topology!r}: {str(e).splitlines()[0]}") from e
    if chips is not None and not 1 <= chips <= len(devices):
        raise ConfigError(f"--chips is {chips}; {topology} has {len(devices)}")
    return devices[:chips]


def compile_for(wanted: Program, mesh: Any, *, name: str, topology: str) -> tuple[Report, str | None]:
    """Compiles; returns the report and the text, which there is not where the program does not fit."""
    started = time.perf_counter()
    started_cpu = time.process_time()
    hbm = int(HBM[topology.partition(":")[0]])
    # what is known before compiling, and so also of a program that does not fit
    known: dict[str, Any] = dict(
        program=name,
        topology=topology,
        mesh={axis: int(mesh.shape[axis]) for axis in MESH_AXES},
        hbm_bytes=hbm,
        state_bytes=int(sum(map(on_chip, jax.tree.leaves(wanted.arguments)))),
        cache_shard_bytes=int(wanted.shard),
        libtpu=version("libtpu"),
    )
    try:
        with jax.set_mesh(mesh):
            compiled = wanted.function.lower(*wanted.static, *wanted.arguments).compile()
    except jax.errors.JaxRuntimeError as e:
        if "RESOURCE_EXHAUSTED" not in str(e):
            raise
        # the compiler gives up where memory does not suffice, and gives no figures but those in its message
        unknown: dict[str, Any] = {f.name: 0 for f in dataclasses.fields(Report) if f.name not in known}
        unknown |= dict(fits=False, collective_bytes={}, collective_counts={}, traffic_ratio=None)
        unknown |= dict(error=str(e).splitlines()[0], compile_seconds=time.perf_counter() - started)
        unknown["compile_cpu_seconds"] = time.process_time() - started_cpu
        return Report(**known, **unknown), None
    seconds = time.perf_counter() - started
    cpu_seconds = time.process_time() - started_cpu
    text = compiled.as_text()
    memory = compiled.memory_analysis()
    counts = Text(text).count()
    return Report(
        **known,
        fits=memory.peak_memory_in_bytes <= ROOM * hbm,
        peak_bytes_per_chip=memory.peak_memory_in_bytes,
        argument_bytes=memory.argument_size_in_bytes,
        donated_bytes=memory.alias_size_in_bytes,
        collective_bytes={kind: int(size) for kind, size in counts.collectives.items()},
        collective_counts={kind: int(number) for kind, number in counts.operations.items()},
        synchronous_all_gather_bytes=int(counts.synchronous["all-gather"]),
        pallas_calls=counts.pallas,
        traffic_bytes=int(counts.traffic),
        traffic_ratio=counts.traffic / wanted.floor if wanted.floor else None,
        largest_copy_bytes=int(counts.largest_copy),
        estimated_cycles=int(counts.cycles),
        unknown_loops=counts.unknown_loops,
        compile_seconds=seconds,
        compile_cpu_seconds=cpu_seconds,
    ), text


def show(report: Report) -> None:
    """Prints the report, and what to do where the program does not fit."""
    table = Table("", "one chip, one run", box=None)
    # bytes first, then what has other units
    sizes = {
        "memory at its peak": report.peak_bytes_per_chip,
        "memory of the chip": report.hbm_bytes,
        "arguments": report.argument_bytes,
        "arguments, from their shapes": report.state_bytes,
        "donated": report.donated_bytes,
        **{f"{kind}, moved": n for kind, n in sorted(report.collective_bytes.items())},
        "all-gather that nothing runs beside": report.synchronous_all_gather_bytes,
        "HBM traffic, a floor": report.traffic_bytes,
        "largest copy": report.largest_copy_bytes,
    }
    for name, size in sizes.items():
        table.add_row(name, f"{size / GIB:.3f} GiB")
    if report.traffic_ratio is not None:
        table.add_row("HBM traffic over weights and cache", f"{report.traffic_ratio:.3f}")
    table.add_row("Pallas calls in the text", str(report.pallas_calls))
    table.add_row("estimated cycles", f"{report.estimated_cycles / 1e9:.3f} G")
    if report.unknown_loops:
        table.add_row("loops of unknown length, counted once", str(report.unknown_loops))
    table.add_row("compiling", f"{report.compile_seconds:.0f} s with libtpu {report.libtpu}")
    console = Console(width=120, markup=False)
    console.print(f"{report.program} on {report.topology}", highlight=False)
    console.print(table)
    if report.fits:
        return
    if report.error:
        console.print(report.error, highlight=False, soft_wrap=True)
    console.print(
        f"it does not fit in {ROOM:.0%} of {report.hbm_bytes / GIB:.2f} GiB: take more chips, or of a recipe a larger "
        "mesh.fsdp, fewer data.tokens or rows, or mesh.sequence or mesh.tensor over 1; of a decoding step a smaller "
        "batch or cache",
        highlight=False,
    )


def main() -> int:
    try:
        fits = tyro.cli(Compile, description=__doc__).run()
    except ConfigError as e:
        print(f"error: {printable(str(e))}", file=sys.stderr)
        return 2
    return 0 if fits else 1


if __name__ == "__main__":
    sys.exit(main())

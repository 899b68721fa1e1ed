"""Offline inference from the command line: a file of requests to a file of results."""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import tyro
from jax.sharding import Mesh
from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from omni_jax.distributed import gather, is_main_process, join_processes
from omni_jax.engine.request import SchedulerConfig, Utilization
from omni_jax.engine.warmup import Compilations
from omni_jax.errors import ConfigError, InputError
from omni_jax.generation.model import OmniModel, load
from omni_jax.processing.files import folder_of, is_file, is_remote, open_file, resolve_path
from omni_jax.serving.batch_lines import Line, Seen, read_lines
from omni_jax.serving.batch_ray import RayOptions, answer
from omni_jax.serving.batch_results import NoResults, Results, open_results
from omni_jax.serving.batch_run import Places, Result, Runner, State, failed
from omni_jax.serving.media_workers import Limits, MediaWorkers
from omni_jax.sharding import MESH_AXES, make_mesh

BLOCKS = (16, 32, 64, 128)  # of 0.24 seconds, in the lists that speech is voiced in

_DIR = tyro.conf.arg(metavar="DIR")


@dataclass(frozen=True)
class Batch:
    """Answers a file of requests, as many at once as there are slots.

    A request is a line as OpenAI's batches have them: custom_id, method "POST", url "/v1/chat/completions", and a body
    as of a chat completion, with media as paths, data: URLs or addresses. A result is a line with the custom_id and a
    response or an error, in the order in which they are done. What is wrong with a line costs that line alone.

    Results are written as they are made. A run that was killed goes on when it is started again in the same way: what
    has a result is not done again. Progress and the summary go to stderr, the summary as JSON to stdout.

    For instance:

        python serve.py batch --model out/model -i requests.jsonl -o results.jsonl --audio-dir speech
    """

    model: Annotated[Path, _DIR]
    """Folder that tools/convert.py to-jax wrote."""
    input: Annotated[str, tyro.conf.arg(metavar="FILE.jsonl", aliases=["-i"])]
    """The requests; this, the results and the speech may be in a bucket (gs://)."""
    output: Annotated[str, tyro.conf.arg(metavar="FILE.jsonl", aliases=["-o"])]
    """The results; a run that was killed is continued in it."""
    audio_dir: Annotated[str | None, _DIR] = None
    """Write speech into files here, with their paths in the results; without it, it is in the results, in base64."""
    media_root: Annotated[str | None, _DIR] = None
    """Media must lie within this folder; without it, within that of the requests, from which relative paths start."""
    allow_urls: bool = False
    """Fetch media that are on the web or in a bucket."""
    slots: int = 16
    """Requests that are answered at once, and as many that are spoken at once."""
    workers: int = field(default_factory=lambda: max(1, min(8, (os.cpu_count() or 2) // 2)))
    """Processes that decode media."""
    media: Limits = field(default_factory=Limits)
    """What the media of one request may cost."""
    mesh: str = ""
    """Spread the model over devices, for instance tensor=4, or data=2,tensor=2; without it, it lies on one."""
    dtype: Literal["bfloat16", "float32"] | None = None
    """What to compute in; without it, what the checkpoint holds."""
    warmup_tokens: int = 2048
    """Compile at first for prompts with replies of so many tokens; for longer ones when they come. 0: for none."""
    warmup_windows: int = 32
    """The same for pictures of so many windows of 112 x 112 pixels."""
    engine: Literal["local", "ray"] = "local"
    """ray: --ray.actors processes over the machines of a Ray cluster, which all see the files at the same paths."""
    ray: RayOptions = field(default_factory=RayOptions)
    """The actors of --engine ray."""
    distributed: bool = False
    """The same command on every host of a slice, over which --mesh spreads the model; the first one writes. On a pod
    of TPUs, under Slurm and on Kubernetes they find each other."""
    coordinator: str | None = None
    """host:port of process 0, where they do not."""
    processes: int | None = None
    """How many there are, where they do not find each other."""
    process: int | None = None
    """Which one this is, from 0."""
    compile_cache: Annotated[Path | None, _DIR] = None
    """Keep compiled programs here, so that the next start is fast."""

    def run(self) -> None:
        """Raises InputError, CheckpointError or ConfigError where no request can be answered."""
        self.check()
        first = True
        if self.distributed:
            join_processes(self.coordinator, self.processes, self.process)
            first = is_main_process()
        terminal, state = Console(stderr=True, quiet=not first), State()
        with self._results(first) as results, _Watch(terminal, _count(self.input), state, results) as watch:
            for result in self._answered(_Left(self.input, results, watch), state, watch):
                watch.add(result)
                results.add(result.text)
        _tell(terminal, watch.summary(), state, self.output)
        if first:
            print(json.dumps(watch.summary()))

    def _results(self, first: bool) -> Results:
        """Where results go; of several processes only the first has them, and tells the others what is done."""
        if not self.distributed:
            return open_results(self.output)
        results = open_results(self.output) if first else NoResults({})
        done = gather(list(results.done.items()))[0]
        return results if first else NoResults(dict(done))

    def _answered(self, lines: Iterable[Line], state: State, watch: _Watch) -> Iterator[Result]:
        if self.engine == "ray":
            yield from answer(self, lines)
            return
        watch.says(f"loading {self.model}")
        with self.workers_of() as workers:
            model = self.load()
            watch.says("compiling")
            self.warm_up(model)
            runner = Runner(model, self.model.name, workers, self.sizes, self.places, state)
            watch.begins()
            with Compilations() as state.compiled:
                yield from runner.run(lines)

    def check(self) -> None:
        """Raises InputError for what is wrong with the options, before anything is loaded."""
        for name in ("slots", "workers"):
            if getattr(self, name) < 1:
                raise InputError(f"--{name} is {getattr(self, name)}; it must be at least 1")
        if not is_file(self.input):
            raise InputError(f"-i {self.input}: no such file")
        if self.distributed and (self.engine == "ray" or not self.mesh):
            raise InputError("--distributed is of one model over several hosts: give --mesh, and not --engine ray")
        if resolve_path(self.input) == resolve_path(self.output):
            raise InputError(f"-o {self.output} is the file of requests; name another")
        for name, folder in (("-o", folder_of(self.output)), ("--media-root", self.media_root)):
            if folder is not None and not is_remote(folder) and not Path(folder).is_dir():
                raise InputError(f"{name}: the folder {folder} does not exist")
        if self.audio_dir is not None and not is_remote(self.audio_dir):
            Path(self.audio_dir).mkdir(parents=True, exist_ok=True)

    @property
    def sizes(self) -> SchedulerConfig:
        return SchedulerConfig(self.slots, self.slots, BLOCKS)

    @property
    def places(self) -> Places:
        folder = folder_of(self.input)
        return Places(folder, self.media_root or folder, self.audio_dir)

    def load(self) -> OmniModel:
        """The model, over its mesh."""
        if self.compile_cache is not None:
            jax.config.update("jax_compilation_cache_dir", str(self.compile_cache))
        return load(self.model, dtype=self.dtype, mesh=self.make_mesh())

    def workers_of(self) -> MediaWorkers:
        return MediaWorkers(self.model, self.workers, self.media, allow_urls=self.allow_urls)

    def warm_up(self, model: OmniModel) -> None:
        if self.warmup_tokens:
            model.warmup(tokens=self.warmup_tokens, windows=self.warmup_windows, slots=self.sizes)

    def make_mesh(self) -> Mesh | None:
        """Raises ConfigError for a mesh that there is not."""
        if not self.mesh:
            return None
        sizes = {}
        for part in self.mesh.split(","):
            match = re.fullmatch(r"(\w+)=([1-9]\d*)", part.strip())
            if not match or match[1] not in MESH_AXES:
                raise ConfigError(
                    f"--mesh {self.mesh!r}: {part!r} is not AXIS=NUMBER with one of {', '.join(MESH_AXES)}"
                )
            sizes[match[1]] = int(match[2])
        return make_mesh(**sizes)


def _count(name: str) -> int:
    """Requests in a file, roughly: it is only for the progress bar, and read in big pieces."""
    count, last = 0, b"\n"
    with open_file(name) as file:
        while piece := file.read(1 << 24):
            count, last = count + piece.count(b"\n"), piece[-1:]
    return count + (last != b"\n")


@dataclass(frozen=True)
class _Left:
    """The lines that have no result yet; one whose custom_id was there before gets its result here."""

    name: str
    results: Results
    watch: _Watch

    def __iter__(self) -> Iterator[Line]:
        seen = Seen()
        for line in read_lines(self.name):
            custom_id, done = _custom_id(line), line.number in self.results.done
            known = self.results.done.get(line.number)
            if known is not None and known != custom_id:
                raise InputError(
                    f"the results are of another file of requests: line {line.number} of {self.name} has custom_id "
                    f"{custom_id!r}, its result {known!r}; name another file with -o"
                )
            new = not isinstance(custom_id, str) or seen.add(custom_id)
            if not new and not done:
                error = InputError(f"custom_id {custom_id!r} was there before; each must be another")
                result = failed(line, custom_id, error, "invalid_line")
                self.watch.add(result)
                self.results.add(result.text)
            elif not done:
                yield line


def _custom_id(line: Line) -> str | None:
    with contextlib.suppress(ValueError, AttributeError, RecursionError):
        return json.loads(line.data or b"").get("custom_id")
    return None


class _TwoLines(Progress):
    """A bar, and under it a line of figures."""

    below = ""

    def get_renderables(self) -> Iterator[RenderableType]:
        yield from super().get_renderables()
        yield Text(self.below)


class _Watch:
    """What a person sees while it runs."""

    def __init__(self, terminal: Console, total: int, state: State, results: Results):
        done = len(results.done)
        self._state, self._before = state, done
        self._begun = time.perf_counter()
        self._done = self._tokens = 0
        self._failed = results.failed
        self._failed_before = results.failed
        self._seconds = 0.0
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        self._progress = _TwoLines(*columns, console=terminal)
        self._bar = self._progress.add_task("requests", total=max(total, done), completed=done)
        if done:
            terminal.print(f"going on after {done} requests that have their results", highlight=False)

    def __enter__(self) -> _Watch:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def says(self, what: str) -> None:
        """What is done before the first request."""
        self._progress.update(self._bar, description=what)

    def begins(self) -> None:
        """From now on time counts."""
        self._begun = time.perf_counter()
        self.says("requests")

    def add(self, result: Result) -> None:
        self._done += 1
        self._failed += result.failed
        self._tokens += result.tokens
        self._seconds += result.seconds
        took = time.perf_counter() - self._begun
        rates = f"{self._tokens / took:.1f} tokens/s, {self._seconds / took:.2f} s of speech/s"
        work = f", {self._state.answering} in slots, {_padding(self._state.load):.0%} padding"
        self._progress.below = f"{self._failed} failed, {rates}" + work * bool(self._state.load.read.computed)
        self._progress.update(self._bar, advance=1)

    def summary(self) -> dict[str, Any]:
        """Of this run, and of the runs before it that it goes on from."""
        seconds = time.perf_counter() - self._begun
        wrong, load = self._failed - self._failed_before, self._state.load
        stages = {"prompts": load.read, "text": load.think, "speech": load.talk, "sound": load.voice}
        padding = {name: round(1 - s.used / s.computed, 3) for name, s in stages.items() if s.computed}
        here = (
            {"padding": padding, "compilations": self._state.compiled.count} if padding else {}
        )  # not known of actors
        return {
            "answered": self._done - wrong,
            "failed": wrong,
            "before": {"answered": self._before - self._failed_before, "failed": self._failed_before},
            "seconds": round(seconds, 2),
            "requests_per_second": round(self._done / seconds, 3),
            "tokens": self._tokens,
            "tokens_per_second": round(self._tokens / seconds, 2),
            "speech_seconds": round(self._seconds, 2),
            "speech_seconds_per_second": round(self._seconds / seconds, 3),
            **here,
        }


def _padding(load: Utilization) -> float:
    """The share of positions, steps and blocks that held nothing, the stages counted alike."""
    shares = [1 - s.used / s.computed for s in (load.read, load.think, load.talk, load.voice) if s.computed]
    return sum(shares) / len(shares) if shares else 0.0


def _tell(terminal: Console, summary: dict[str, Any], state: State, output: str) -> None:
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column("what")
    table.add_column("value", justify="right")
    for name, value in summary.items():
        if isinstance(value, dict):
            said = "{0} {1:.1%}" if name == "padding" else "{1} {0}"
            value = ", ".join(said.format(part, share) for part, share in value.items())
        table.add_row(name.replace("_", " "), str(value))
    terminal.print(table)
    if state.untrained:
        terminal.print(
            f"{state.untrained} requests were spoken under another system prompt than the one that speech was trained "
            "with (omni_jax.SPEECH_SYSTEM_PROMPT); the model may have spoken badly",
            highlight=False,
            soft_wrap=True,
        )
    terminal.print(f"results in {output}", highlight=False, soft_wrap=True)
    sys.stderr.flush()

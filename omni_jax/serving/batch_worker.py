"""What answers lines of requests: a model with the processes that decode its media, made from a picklable description.

The run on one machine and the actors of a Ray cluster make theirs from the same ``WorkerSpec``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omni_jax.compile_cache import keep_compiled_programs
from omni_jax.engine.request import SchedulerConfig
from omni_jax.engine.warmup import Compilations
from omni_jax.generation.model import OmniModel, load
from omni_jax.generation.quantization import NumberFormat
from omni_jax.processing.fetch import RemoteAccess
from omni_jax.processing.media_workers import MediaWorkers
from omni_jax.processing.worker_pool import MediaLimits
from omni_jax.serving.batch_lines import Line, Result
from omni_jax.serving.batch_runner import BatchRunner, FileLocations, RunStatus
from omni_jax.sharding import MeshConfig


@dataclass(frozen=True)
class WorkerSpec:
    """A worker before it is made.

    Attributes:
      model: folder of the checkpoint.
      locations: of the files that requests name and of those that are written.
      scheduler: how many requests are worked on at once.
      number_format: what numbers are kept in.
      token2wav: how codes become sound, as ``load`` takes it.
      adapters: folders of those that requests may choose, by name.
      mesh: devices that the model is spread over; of one device, no mesh is made.
      media_processes: that decode media.
      media_limits: of each request.
      access: from which hosts and buckets media may be fetched.
      warmup_tokens: of a prompt with its reply that is compiled for at first; 0 for nothing.
      warmup_windows: the same for pictures, in windows of 112 x 112 pixels.
      warmup_clip_seconds: the same for clips that requests bring along as their voice.
      speaker_model: that makes speaker vectors of clips, as ``load`` takes it.
      speech_tokenizer: that makes codes of them, as ``load`` takes it.
      compile_cache: folder of compiled programs; that of ``compile_cache.default_folder`` if None.
    """

    model: Path
    locations: FileLocations
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    number_format: NumberFormat = field(default_factory=NumberFormat)
    token2wav: Mapping[str, Any] = field(default_factory=dict)
    adapters: Mapping[str, Path] = field(default_factory=dict)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    media_processes: int = 1
    media_limits: MediaLimits = field(default_factory=MediaLimits)
    access: RemoteAccess = field(default_factory=RemoteAccess)
    warmup_tokens: int = 0
    warmup_windows: int = 0
    warmup_clip_seconds: float = 0.0
    speaker_model: Path | None = None
    speech_tokenizer: Path | None = None
    compile_cache: Path | None = None


class Worker:
    """A loaded model that answers lines; a context manager that ends its media processes.

    Attributes:
      status: how the run stands.
    """

    def __init__(self, spec: WorkerSpec, set_phase: Callable[[str], None] = lambda phase: None):
        """Loads the model and compiles.

        Args:
          spec: what to load.
          set_phase: called with what is being done, for those who wait.

        Raises:
          CheckpointError, ConfigError: where ``omni_jax.load`` does.
        """
        self.status = RunStatus()
        set_phase(f"loading {spec.model}")
        model = _load_model(spec)
        # programs for the usual lengths; others are compiled when a request needs them
        set_phase("compiling")
        if spec.warmup_tokens:
            model.warmup(
                tokens=spec.warmup_tokens,
                windows=spec.warmup_windows,
                clip_seconds=spec.warmup_clip_seconds,
                scheduler=spec.scheduler,
                progress=lambda done, total: set_phase(f"compiling, {done} of {total} jobs"),
            )
        # last, so that a model that cannot be loaded leaves no processes behind
        processor = model.processor.with_access(spec.access)
        self._media = MediaWorkers(processor, spec.media_processes, spec.media_limits)
        self._runner = BatchRunner(model, spec.model.name, self._media, spec.scheduler, spec.locations, self.status)

    def answer(self, lines: Iterable[Line]) -> Iterator[Result]:
        """The results of lines, in the order in which they are done; see ``BatchRunner.run``."""
        # counts from here on, so that what the warm-up has compiled is left out
        with Compilations() as self.status.compilations:
            yield from self._runner.run(lines)

    def close(self) -> None:
        """Ends the media processes."""
        self._media.close()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _load_model(spec: WorkerSpec) -> OmniModel:
    # before anything is compiled, or the first programs would not be kept
    keep_compiled_programs(spec.compile_cache)
    # a mesh of one device would only make every program a sharded one
    mesh = spec.mesh.make() if spec.mesh.num_devices > 1 else None
    number_format = dataclasses.asdict(spec.number_format)
    return load(
        spec.model,
        mesh=mesh,
        token2wav=spec.token2wav,
        adapters=spec.adapters,
        speaker_model=spec.speaker_model,
        speech_tokenizer=spec.speech_tokenizer,
        **number_format,
    )

"""A model before it is loaded: a picklable description, from which every process that answers makes its own."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omni_jax.checks import check_float, check_int
from omni_jax.compile_cache import keep_compiled_programs
from omni_jax.engine.request import BLOCK_SIZES, SchedulerConfig
from omni_jax.generation.load_model import load
from omni_jax.generation.model import OmniModel
from omni_jax.generation.quantization import NumberFormat
from omni_jax.processing.fetch import RemoteAccess
from omni_jax.processing.media_workers import MediaWorkers
from omni_jax.processing.voice_clip import MAX_SECONDS
from omni_jax.processing.worker_pool import MediaLimits
from omni_jax.serving.commands import ModelOptions
from omni_jax.sharding import MeshConfig

SetPhase = Callable[[str], None]  # is told what is being done, for those who wait

_MAX_MEDIA_SECONDS = 86_400.0  # a day: what takes longer has hung
_MAX_MEDIA_GIGABYTES = 1e6


@dataclass(frozen=True)
class ModelSpec:
    """What to load, and what requests may cost.

    Attributes:
      folder: of the checkpoint.
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

    folder: Path
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

    @property
    def name(self) -> str:
        """What answers call the model."""
        return self.folder.name

    def load(self, set_phase: SetPhase = lambda phase: None, *, live: bool = False) -> OmniModel:
        """Loads the model, and compiles programs for the usual lengths.

        Args:
          set_phase: is told what is being done.
          live: whether replies are also to be streamed.

        Raises:
          CheckpointError, ConfigError, InputError: where ``omni_jax.load`` does.
        """
        set_phase(f"loading {self.folder}")
        # before anything is compiled, or the first programs would not be kept
        keep_compiled_programs(self.compile_cache)
        # a mesh of one device would only make every program a sharded one
        mesh = self.mesh.make() if self.mesh.num_devices > 1 else None
        model = load(
            self.folder,
            mesh=mesh,
            token2wav=self.token2wav,
            adapters=self.adapters,
            speaker_model=self.speaker_model,
            speech_tokenizer=self.speech_tokenizer,
            **dataclasses.asdict(self.number_format),
        )
        set_phase("compiling")
        if self.warmup_tokens:
            model.warmup(
                tokens=self.warmup_tokens,
                windows=self.warmup_windows,
                clip_seconds=self.warmup_clip_seconds,
                scheduler=self.scheduler,
                live=live,
                progress=lambda done, total: set_phase(f"compiling, {done} of {total} jobs"),
            )
        return model

    def start_media_workers(self, model: OmniModel) -> MediaWorkers:
        """The processes that decode media for a model."""
        return MediaWorkers(model.processor.with_access(self.access), self.media_processes, self.media_limits)


def check_model_options(options: ModelOptions) -> None:
    """Finds what is wrong with the options before anything is loaded.

    Raises:
      InputError: naming the option.
    """
    check_int("--slots", options.slots, 1)
    check_int("--workers", options.workers, 1)
    check_int("--warmup-tokens", options.warmup_tokens, 0)
    check_int("--warmup-windows", options.warmup_windows, 0)
    check_float("--warmup-clip-seconds", options.warmup_clip_seconds, 0, MAX_SECONDS)
    check_float("--media.seconds", options.media.seconds, 0, _MAX_MEDIA_SECONDS, above=True)
    check_float("--media.gigabytes", options.media.gigabytes, 0, _MAX_MEDIA_GIGABYTES, above=True)
    RemoteAccess(options.allow_web, options.allow_buckets)  # for its errors alone


def make_model_spec(options: ModelOptions, prefix_bytes: int = 0) -> ModelSpec:
    """What the options say of the model.

    Args:
      options: of the command.
      prefix_bytes: as of ``SchedulerConfig``.
    """
    return ModelSpec(
        folder=options.model,
        scheduler=SchedulerConfig(options.slots, options.slots, BLOCK_SIZES, prefix_bytes),
        number_format=NumberFormat(options.dtype, options.quantization, options.kv_cache_dtype),
        token2wav=dataclasses.asdict(options.token2wav),
        adapters=options.adapters,
        mesh=options.mesh,
        media_processes=options.workers,
        media_limits=options.media,
        access=RemoteAccess(options.allow_web, options.allow_buckets),
        warmup_tokens=options.warmup_tokens,
        warmup_windows=options.warmup_windows,
        warmup_clip_seconds=options.warmup_clip_seconds,
        speaker_model=options.speaker_model,
        speech_tokenizer=options.speech_tokenizer,
        compile_cache=options.compile_cache,
    )

"""What a run trains, from what, on what and over which devices: the value that a module of ``configs/`` makes."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from omni_jax.config import OmniConfig
from omni_jax.data.config import DataConfig
from omni_jax.errors import ConfigError
from omni_jax.layers.stack import Remat
from omni_jax.sharding import MeshConfig
from omni_jax.training.tpu import COMPILER_OPTIONS


@dataclass(frozen=True)
class Group:
    """Parameters that train alike."""

    paths: str
    """Regular expression that the whole path of a parameter matches, like decoder/layers/.* or .*/bias."""
    rate: float = 1.0
    """Times the learning rate of the schedule."""


@dataclass(frozen=True)
class Phase:
    """A stretch of a run in which the same parameters train. Each begins with a fresh optimizer and schedule."""

    name: str
    train: tuple[Group, ...]
    """What trains. Of several groups that a parameter is in, the first counts; in none, it is frozen."""
    steps: int | None = None
    """How many; to the end of the run if none is given."""


@dataclass(frozen=True)
class Optimizer:
    """AdamW with a linear warm-up and a cosine down to a share of the peak."""

    learning_rate: float = 1e-5
    """At the peak."""
    warmup: int = 100
    """Steps from 0 to the peak, in each phase."""
    final_share: float = 0.1
    """Of the peak, at the end of the phase."""
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    no_decay: str = r".*/(bias|scale)"
    """Regular expression of the paths of parameters that do not decay."""
    clip: float = 1.0
    """Gradients of a larger norm, over all that trains, are scaled down to it."""
    accumulate: int = 1
    """Batches of a step; their gradients are added up, so that it is one step over all of their tokens."""


@dataclass(frozen=True)
class Checkpoints:
    """When a run saves itself, beside its end and when it is told to stop."""

    every: int = 1000
    """Steps from one to the next."""
    keep: int = 3
    """How many of the latest are kept."""


@dataclass(frozen=True)
class Parts:
    """Published folders to begin from, in place of a checkpoint; what none of them holds begins at random."""

    llm: Path | None = None
    """Qwen2.5 of the same size: the language model."""
    vision: Path | None = None
    """Qwen2.5-VL of the same size: the vision encoder with its adapter."""
    audio: Path | None = None
    """Whisper-large-v3: the audio encoder, without the adapter, which Whisper has not."""

    @property
    def given(self) -> bool:
        return any((self.llm, self.vision, self.audio))


@dataclass(frozen=True)
class Recipe:
    """One run; ``about`` says in a line what it does."""

    about: str
    model: OmniConfig
    phases: tuple[Phase, ...]
    data: DataConfig = field(default_factory=DataConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    optimizer: Optimizer = field(default_factory=Optimizer)
    checkpoint: Checkpoints = field(default_factory=Checkpoints)
    steps: int = 10_000
    """Of the whole run, all phases together."""
    init: Path | None = None
    """Checkpoint to begin from, or the folder of an earlier run, whose last one it is. With --parts.* a folder that has
    at least the tokenizer and config.json of the model."""
    parts: Parts = field(default_factory=Parts)
    seed: int = 0
    """Of parameters that begin at random."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """What is computed in. What trains is kept in float32, what is frozen in the dtype of the checkpoint."""
    remat: Remat = "full"
    """What is kept of a layer for the way back: everything (none), nothing but its input (full), or the products with
    its weights (dots)."""
    loss_chunk: int = 1024
    """Positions of a row whose scores exist at a time."""
    z_loss: float = 0.0
    """Times the square of the logarithm of the sum of exponentials of the scores, added to the loss."""
    tpu_options: dict[str, str] = field(default_factory=lambda: dict(COMPILER_OPTIONS))
    """For the compiler of TPUs: by default what lets it gather parameters while it computes."""
    log_every: int = 10
    """Steps from one line of progress to the next where there is no terminal."""

    def check(self) -> None:
        """Raises ConfigError if the fields do not go together."""
        rows = self.mesh.data * self.mesh.fsdp
        if self.data.rows % rows:
            raise ConfigError(
                f"data.rows is {self.data.rows}, which must be a multiple of mesh.data x mesh.fsdp = {rows}"
            )
        if self.data.streams % rows:
            raise ConfigError(
                f"data.streams is {self.data.streams}, which must be a multiple of mesh.data x mesh.fsdp = {rows}, so "
                "that every device has the media of its own rows"
            )
        if self.data.tokens % self.mesh.sequence:
            raise ConfigError(f"mesh.sequence {self.mesh.sequence} does not divide data.tokens {self.data.tokens}")
        least = {"steps": 1, "loss_chunk": 1, "log_every": 1, "z_loss": 0}
        for name, value in least.items():
            if getattr(self, name) < value:
                raise ConfigError(f"{name} must be at least {value}, got {getattr(self, name)}")
        for name in ("accumulate", "learning_rate", "clip", "warmup"):
            if getattr(self.optimizer, name) < (name == "accumulate"):
                raise ConfigError(f"optimizer.{name} is {getattr(self.optimizer, name)}, which is too small")
        if self.checkpoint.every < 1 or self.checkpoint.keep < 1:
            raise ConfigError("checkpoint.every and checkpoint.keep must be at least 1")
        if not self.phases or any(p.steps is None for p in self.phases[:-1]) or self.phases[-1].steps is not None:
            raise ConfigError("every phase but the last needs its steps, and the last goes on to the end of the run")
        if len({phase.name for phase in self.phases}) < len(self.phases):
            raise ConfigError("two phases have the same name")

    def phase_at(self, step: int) -> tuple[Phase, int]:
        """The phase of the step that comes after ``step`` steps, and how many steps it has in this run."""
        begin = 0
        for phase in self.phases:
            end = self.steps if phase.steps is None else min(self.steps, begin + phase.steps)
            if step < end or end == self.steps:
                return phase, end - begin
            begin = end
        raise AssertionError("the last phase goes on to the end")

    @property
    def chunk(self) -> int:
        """Positions of a device's part of a row whose scores exist at a time: at most ``loss_chunk``, and a divisor."""
        length = self.data.tokens // self.mesh.sequence
        return math.gcd(length, self.loss_chunk) if length % self.loss_chunk else self.loss_chunk

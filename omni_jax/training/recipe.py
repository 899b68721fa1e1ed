"""What a run trains, from what, on what and over which devices: the value that a module of ``configs/`` makes."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from omni_jax.checkpoint.lora import MAX_ALPHA, MAX_RANK
from omni_jax.checks import check_float, check_int
from omni_jax.config import OmniConfig
from omni_jax.data.config import DataConfig
from omni_jax.errors import ConfigError, InputError
from omni_jax.layers.stack import Remat
from omni_jax.sharding import MeshConfig
from omni_jax.training.options import FLOAT_MAX, NextTokenOptions, ObjectiveOptions
from omni_jax.training.tpu import COMPILER_OPTIONS

RANDOM = Path("random")  # as ``init``: from nothing
_BELOW_ONE = 0.9999999  # moments that forget nothing would never move


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters that train alike."""

    paths: str
    """Regular expression that the whole path of a parameter matches, like thinker/decoder/layers/.* or .*/bias."""
    learning_rate_scale: float = 1.0
    """Factor of the learning rate of the schedule."""


@dataclass(frozen=True)
class Phase:
    """A part of a run in which the same parameters train. Each begins with a fresh optimizer and schedule."""

    name: str
    train: tuple[ParameterGroup, ...]
    """What trains. Of several groups that a parameter is in, the first counts; in none, it is frozen."""
    steps: int | None = None
    """How many; to the end of the run if it is left out."""


@dataclass(frozen=True)
class OptimizerConfig:
    """The optimizer, with a linear warm-up and a cosine decay to a fraction of the peak."""

    kind: Literal["adamw", "adafactor"] = "adamw"
    """adafactor keeps no first moment, and sums of rows and columns of the second: 4 bytes a parameter in place of 12.
    b1, b2, eps and first-moment are AdamW's."""
    learning_rate: float = 1e-5
    """At the peak."""
    warmup: int = 100
    """Steps from 0 to the peak, in each phase."""
    final_fraction: float = 0.1
    """Of the peak, at the end of the phase."""
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    first_moment: Literal["float32", "bfloat16"] = "float32"
    """What the first moment is kept in: bfloat16 takes a sixth off the state of what trains."""
    no_decay: str = r".*/(bias|scale)"
    """Regular expression of the paths of parameters that do not decay."""
    clip: float = 1.0
    """Gradients of a larger norm, over all that trains, are scaled down to it; 0: never."""
    ema: float = 0.0
    """Decay of an exponential moving average of what trains, which a checkpoint's parameters then are, and which is
    evaluated; 0: there is none. After n steps of a phase it is at most (1 + n) / (10 + n)."""
    accumulate: int = 1
    """Batches of a step; their gradients are added up, so that it is one step over all of their tokens."""


@dataclass(frozen=True)
class LoRAOptions:
    """Low-rank adapters of linear maps (LoRA), which train in place of the model's own parameters."""

    rank: int = 0
    """Of every adapter; 0: there are none. With adapters the phases train paths below lora/, and nothing else."""
    alpha: float = 32.0
    """What adapters add is multiplied by alpha / rank."""
    targets: str = r"thinker/decoder/layers/.*"
    """Regular expression that the whole path of a linear map matches, for instance .*/attention/(query|value)."""
    base: Literal["int8", "int4"] | None = None
    """Keep the kernels that have an adapter in 8 or 4 bits while it trains (QLoRA)."""


@dataclass(frozen=True)
class CheckpointConfig:
    """When a run saves itself, beside its end and when it is told to stop."""

    every: int = 1000
    """Steps from one to the next."""
    keep: int = 3
    """How many of the latest are kept."""


@dataclass(frozen=True)
class EvalConfig:
    """The loss on data.valid. The checkpoint with the least is kept beside the latest ones."""

    every: int = 500
    """Steps from one to the next; the last step has one too."""
    patience: int = 0
    """The run stops after so many of them without a smaller loss; 0: it goes on to its last step."""
    samples: int = 0
    """Rows of data.valid that the model answers each time, for people to look at; they are written to samples.jsonl."""
    max_tokens: int = 64
    """Of such an answer."""


@dataclass(frozen=True)
class PartFolders:
    """Published folders to begin from, in place of a checkpoint; what none of them holds begins at random."""

    llm: Path | None = None
    """Qwen2.5 of the same size: the language model."""
    vision: Path | None = None
    """Qwen2.5-VL of the same size: the vision encoder with its adapter."""
    audio: Path | None = None
    """Whisper-large-v3: the audio encoder, without the adapter, which Whisper has not."""

    @property
    def folders(self) -> dict[str, Path]:
        """Those that are named, by the part."""
        # the keys are those of ``assemble_thinker``
        named: dict[str, Path] = {}
        for name, folder in (("llm", self.llm), ("vision", self.vision), ("audio", self.audio)):
            if folder is not None:
                named[name] = folder
        return named


@dataclass(frozen=True)
class Recipe:
    """One run; ``about`` says in a line what it does."""

    about: str
    model: Annotated[OmniConfig, tyro.conf.Suppress]
    """Its shape, of a run that begins from nothing; else the checkpoint that it begins from says it."""
    phases: tuple[Phase, ...]
    data: DataConfig = field(default_factory=DataConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    steps: int = 10_000
    """Of the whole run, all phases together."""
    init: Path | None = None
    """Checkpoint to begin from, or the folder of an earlier run, whose last one it is. With --parts.* a folder that has
    at least the tokenizer and config.json of the model. random: begin from nothing."""
    files: Annotated[str | None, tyro.conf.arg(name="model", metavar="FILES|SIZE")] = None
    """What begins from nothing: a folder with config.json and the tokenizer's and preprocessor's files, or 7b, 3b, mini
    or tiny, with a tokenizer of bytes. Without it, the recipe's size."""
    parts: PartFolders = field(default_factory=PartFolders)
    seed: int = 0
    """Of parameters that begin at random, and of what a loss draws."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Of activations. What trains is kept in float32, what is frozen in the dtype of the checkpoint."""
    remat: Remat = "full"
    """What is recomputed of a layer in the backward pass: nothing (none), all but its input (full), or all but the
    products with its weights (dots)."""
    objective: tyro.conf.AvoidSubcommands[ObjectiveOptions] = field(default_factory=NextTokenOptions)
    """What is minimised."""
    lora: LoRAOptions = field(default_factory=LoRAOptions)
    """Adapters, to train in the memory of a small machine."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """What becomes of a step whose loss or gradients are no finite numbers: the run stops, or the step changes nothing
    and is counted as skipped."""
    max_skipped: int = 10
    """Of such steps since the run was started, at most; one more stops it."""
    tpu_options: dict[str, str] = field(default_factory=lambda: dict(COMPILER_OPTIONS))
    """For the compiler of TPUs: by default what lets it gather parameters while it computes."""
    profile: tuple[int, int] | None = None
    """Steps from the first to the second are traced into WORKDIR/profile, for Perfetto and XProf."""
    log_every: int = 10
    """Steps from one line of progress to the next where there is no terminal."""

    def check(self) -> None:
        """Raises ConfigError if a field is out of its range, or the fields do not go together."""
        # the checks of numbers raise what they raise for a request; here it is the recipe that is wrong
        try:
            self._check_numbers()
        except InputError as e:
            raise ConfigError(str(e)) from e
        self._check_mesh()
        self._check_phases()

    def _check_numbers(self) -> None:
        check_int("steps", self.steps, 1)
        check_int("log_every", self.log_every, 1)
        check_int("max_skipped", self.max_skipped, 0)
        if self.profile is not None:
            first, last = self.profile
            check_int("profile, the first step", first, 1)
            check_int("profile, the last step", last, first)
        check_int("lora.rank", self.lora.rank, 0, MAX_RANK)
        check_float("lora.alpha", self.lora.alpha, 0, MAX_ALPHA, above=True)
        self.objective.check()
        check_int("checkpoint.every", self.checkpoint.every, 1)
        check_int("checkpoint.keep", self.checkpoint.keep, 1)
        check_int("eval.every", self.eval.every, 1)
        check_int("eval.patience", self.eval.patience, 0)
        check_int("eval.samples", self.eval.samples, 0)
        if self.eval.samples and not self.data.valid:
            raise ConfigError("eval.samples asks for answers to held-out rows, and data.valid names none")
        check_int("eval.max_tokens", self.eval.max_tokens, 1)
        optimizer = self.optimizer
        check_int("optimizer.accumulate", optimizer.accumulate, 1)
        check_int("optimizer.warmup", optimizer.warmup, 0)
        check_float("optimizer.learning_rate", optimizer.learning_rate, 0, FLOAT_MAX)
        check_float("optimizer.final_fraction", optimizer.final_fraction, 0, 1)
        check_float("optimizer.b1", optimizer.b1, 0, _BELOW_ONE)
        check_float("optimizer.b2", optimizer.b2, 0, _BELOW_ONE)
        check_float("optimizer.eps", optimizer.eps, 0, FLOAT_MAX, above=True)
        check_float("optimizer.weight_decay", optimizer.weight_decay, 0, FLOAT_MAX)
        check_float("optimizer.ema", optimizer.ema, 0, _BELOW_ONE, hint="0: there is none")
        check_float("optimizer.clip", optimizer.clip, 0, FLOAT_MAX, hint="0: never")

    def _check_mesh(self) -> None:
        row_parts = self.mesh.data * self.mesh.fsdp  # that rows are sharded into
        if self.data.rows % row_parts:
            raise ConfigError(
                f"data.rows is {self.data.rows}, which must be a multiple of mesh.data x mesh.fsdp = {row_parts}"
            )
        if self.data.streams % row_parts:
            raise ConfigError(
                f"data.streams is {self.data.streams}, which must be a multiple of mesh.data x mesh.fsdp = "
                f"{row_parts}, so that every device has the media of its own rows"
            )
        # positions of a row are sharded evenly
        if self.data.tokens % self.mesh.sequence:
            raise ConfigError(f"mesh.sequence {self.mesh.sequence} does not divide data.tokens {self.data.tokens}")

    def _check_phases(self) -> None:
        # only the last phase has no length of its own
        open_ended = [phase.steps is None for phase in self.phases]
        if not open_ended or any(open_ended[:-1]) or not open_ended[-1]:
            raise ConfigError("every phase but the last needs its steps, and the last goes on to the end of the run")
        # a run keeps the step of each phase under its name
        if len({phase.name for phase in self.phases}) < len(self.phases):
            raise ConfigError("two phases have the same name")
        for phase in self.phases[:-1]:
            try:
                check_int(f"steps of the phase {phase.name}", phase.steps, 1)
            except InputError as e:
                raise ConfigError(str(e)) from e

    @property
    def is_random(self) -> bool:
        """Whether the run begins from nothing."""
        return self.init == RANDOM

    def find_warnings(self) -> list[str]:
        """What the run will do less than it seems to."""
        found = []
        begin = 0
        for phase in self.phases:
            if begin >= self.steps:
                found.append(f"the phase {phase.name} is never reached: it begins after step {begin} of {self.steps}")
                continue
            end = self.steps if phase.steps is None else min(self.steps, begin + phase.steps)
            if self.optimizer.warmup >= end - begin:
                found.append(
                    f"the phase {phase.name} has {end - begin} steps and a warm-up of {self.optimizer.warmup}, which "
                    "ends with it: the learning rate never falls"
                )
            begin = end
        return found

    def phase_at(self, step: int) -> tuple[Phase, int]:
        """The phase of the step that comes after ``step`` steps, and how many steps it has in this run."""
        begin = 0
        for phase in self.phases:
            # a run that is shorter than its phases ends within one, and its schedule with it
            end = self.steps if phase.steps is None else min(self.steps, begin + phase.steps)
            if step < end or end == self.steps:
                return phase, end - begin
            begin = end
        raise AssertionError("the last phase goes on to the end")

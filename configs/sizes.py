"""What recipes of one size have in common: the model, the mesh and the budgets of a step."""

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from omni_jax.config import OmniConfig
from omni_jax.data.config import DataConfig
from omni_jax.mini_config import mini_config
from omni_jax.sharding import MeshConfig
from omni_jax.training.options import NextTokenOptions, ObjectiveOptions
from omni_jax.training.recipe import (
    CheckpointConfig,
    LoRAOptions,
    OptimizerConfig,
    Phase,
    Recipe,
)

# paths of parameters; bos_eos, the audio encoder's begin and end embeddings, is read by nothing (see
# models/audio_encoder.py) and must not decay
ADAPTERS = r"thinker/(audio_encoder/proj|vision_encoder/merger)/.*"
ENCODERS = r"thinker/(audio_encoder/(?!bos_eos|proj)|vision_encoder/(?!merger)).*"
DECODER = r"thinker/decoder/.*"

# everything a test needs, in seconds on a CPU
_TINY_DATA = DataConfig(
    rows=2, tokens=256, spans=48, audio_blocks=3, canvases=2, windows=8, lookahead=4, max_pixels=112 * 112,
    video_max_pixels=84 * 84,
)  # fmt: skip
_TINY_STEPS = 20


def recipes(
    stage: str,
    about: str,
    *,
    phases: tuple[Phase, ...],
    optimizer: OptimizerConfig,
    steps: int,
    tokens: int = 8192,
    media: Mapping[str, Any] | None = None,
    devices: Mapping[str, int] = MappingProxyType({"7b": 64, "3b": 32}),
    lora: LoRAOptions = LoRAOptions(),  # noqa: B008, frozen
    objective: ObjectiveOptions = NextTokenOptions(),  # noqa: B008, frozen
    tiny_objective: ObjectiveOptions = NextTokenOptions(chunk=64),  # noqa: B008, frozen
) -> dict[str, Recipe]:
    """A stage in every size, by name; one row of ``tokens`` a device.

    Args:
      stage: the first part of the names.
      about: what the stage does, in a line.
      phases: what trains, in the sizes 7b and 3b; a tiny run has as many of a few steps.
      optimizer: of the sizes 7b and 3b.
      steps: of the sizes 7b and 3b.
      tokens: of a row.
      media: budgets of audio and pictures (``DataConfig``) that are not the default.
      devices: of the sizes 7b and 3b.
      lora: adapters.
      objective: of the sizes 7b and 3b.
      tiny_objective: of the tiny size.
    """
    published = {"7b": OmniConfig.qwen2_5_omni_7b(), "3b": OmniConfig.qwen2_5_omni_3b()}
    media = media or {}
    made = {}
    for size, model in published.items():
        count = devices[size]
        data = DataConfig(rows=count, streams=count, tokens=tokens, **media)
        made[f"{stage}-{size}"] = Recipe(
            about,
            model,
            phases,
            data,
            MeshConfig(fsdp=count),
            optimizer=optimizer,
            steps=steps,
            objective=objective,
            lora=lora,
        )
    # what a stage reads no sound or no picture of, its tiny recipe has no room for either
    absent = {name: count for name, count in media.items() if count == 0}
    made[f"{stage}-tiny"] = Recipe(
        about,
        OmniConfig.tiny(),
        tuple(dataclasses.replace(phase, steps=phase.steps and _TINY_STEPS // 2) for phase in phases),
        dataclasses.replace(_TINY_DATA, tokens=max(256, tokens // 64), **absent),
        optimizer=dataclasses.replace(optimizer, learning_rate=3e-3, warmup=2),
        checkpoint=CheckpointConfig(every=10),
        steps=_TINY_STEPS,
        dtype="float32",
        objective=tiny_objective,
        lora=lora,
        log_every=5,
    )
    return made


def make_mini(tiny: Recipe, *, data: Mapping[str, Any], model: OmniConfig | None = None, **changes: Any) -> Recipe:
    """A tiny recipe for a model that two cores train (docs/speech-training.md).

    Args:
      tiny: the recipe.
      data: budgets that are others.
      model: its shape; that of ``mini_config`` if none is given.
      changes: other fields of the recipe.
    """
    return dataclasses.replace(
        tiny,
        model=mini_config() if model is None else model,
        data=dataclasses.replace(tiny.data, **data),
        remat="none",
        checkpoint=CheckpointConfig(every=500),
        log_every=20,
        **changes,
    )

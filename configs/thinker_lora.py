"""Instruction tuning of the Thinker with low-rank adapters: what fits eight small chips, or four.

python train.py thinker-lora-7b --init CHECKPOINT --data.train dialogues.jsonl

``--lora.targets`` says which linear maps have an adapter (by default those of the language model's layers), and
``--lora.base int8`` keeps their kernels in 8 bits meanwhile.
"""

import dataclasses

from configs.sizes import recipes
from omni_jax.sharding import MeshConfig
from omni_jax.training.recipe import LoRAOptions, OptimizerConfig, ParameterGroup, Phase

_DEVICES = {"7b": 8, "3b": 4}


def _make_recipes() -> dict:
    made = recipes(
        "thinker-lora",
        "instruction tuning of the Thinker with low-rank adapters",
        phases=(Phase("adapters", (ParameterGroup("lora/.*"),)),),
        # ten times that of all parameters, as is usual for adapters
        optimizer=OptimizerConfig(learning_rate=2e-4, warmup=100, weight_decay=0.0),
        steps=5_000,
    )
    for name, recipe in made.items():
        lora = LoRAOptions(rank=16)
        devices = _DEVICES.get(name.rpartition("-")[2])
        if devices is None:
            made[name] = dataclasses.replace(recipe, lora=lora)
            continue
        data = dataclasses.replace(recipe.data, rows=devices, streams=devices)
        made[name] = dataclasses.replace(recipe, lora=lora, data=data, mesh=MeshConfig(fsdp=devices))
    return made


RECIPES = _make_recipes()

"""Checkpoints with an adapter (LoRA) of random numbers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np

from omni_jax.checkpoint import store
from omni_jax.checkpoint.lora import LORA, LORA_FILE, LoRAConfig, adapter_shapes, choose_modules, find_linear_maps
from omni_jax.config import OmniConfig


def add_adapter(source: Path, target: Path, targets: str, *, rank: int, alpha: float, seed: int = 0) -> LoRAConfig:
    """Writes a checkpoint with the components of ``source`` and an adapter in which no number is 0."""
    config = OmniConfig.load(source)
    components = list(store.components(source))
    adapter = LoRAConfig(rank, alpha, choose_modules(find_linear_maps(config, components), targets))
    rng = np.random.default_rng(seed)
    leaves = []
    for path, shape in adapter_shapes(config, adapter).items():
        inputs = shape[:-1] if path.endswith("/a") else (rank,)
        # what is added is some tenth of what it is added to, so that the layers do not run into their limits
        scale = (1.0 if path.endswith("/a") else 0.3) / np.sqrt(np.prod(inputs[-2:]))
        values = (scale * rng.standard_normal(shape)).astype(np.float32)
        name = (LORA, *path.split("/"))
        leaves.append(store.Leaf(name, shape, values.dtype, False, lambda values=values: iter([values])))
    alone = target.with_name(f"{target.name}_alone")
    store.save(alone, leaves)
    shutil.copytree(source, target)
    shutil.move(alone / "params" / LORA, target / "params" / LORA)
    (target / LORA_FILE).write_text(adapter.to_json())
    about = json.loads((target / store.ABOUT_FILE).read_text())
    about["components"][LORA] = ["float32"]
    (target / store.ABOUT_FILE).write_text(json.dumps(about))
    return adapter

"""Instruction tuning of the Thinker.

python train.py thinker-sft-7b --mesh.fsdp 64
"""

from omni_jax.config import OmniConfig
from omni_jax.training.recipe import MeshSizes, Recipe

ABOUT = "instruction tuning of the Thinker"

RECIPES = {
    "thinker-sft-7b": Recipe(ABOUT, OmniConfig.qwen2_5_omni_7b(), MeshSizes(fsdp=64)),
    "thinker-sft-3b": Recipe(ABOUT, OmniConfig.qwen2_5_omni_3b(), MeshSizes(fsdp=32)),
    "thinker-sft-tiny": Recipe(ABOUT, OmniConfig.tiny()),
}

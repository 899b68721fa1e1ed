"""Instruction tuning of the Thinker with low-rank adapters: what fits eight small chips, or four.

python train.py thinker-lora-7b --init CHECKPOINT --data.train dialogues.jsonl

``--lora.targets`` says which linear maps have an adapter (by default those of the language model's layers), and
``--lora.base int8`` keeps their kernels in 8 bits meanwhile.
"""

from configs.sizes import recipes
from omni_jax.training.recipe import LoRAOptions, OptimizerConfig, ParameterGroup, Phase

RECIPES = recipes(
    "thinker-lora",
    "instruction tuning of the Thinker with low-rank adapters",
    phases=(Phase("adapters", (ParameterGroup("lora/.*"),)),),
    # twenty times that of all parameters: adapters take larger steps
    optimizer=OptimizerConfig(learning_rate=2e-4, warmup=100, weight_decay=0.0),
    steps=5_000,
    devices={"7b": 8, "3b": 4},
    lora=LoRAOptions(rank=16),
)

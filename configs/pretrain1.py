"""Pretraining, stage 1 (paper section 3): the language model is frozen; first the adapters train, then the encoders.

python train.py pretrain1-7b --init FILES --parts.llm Qwen2.5-7B --parts.vision Qwen2.5-VL-7B-Instruct
    --parts.audio whisper-large-v3 --data.train pairs.arrayrecord
"""

from configs.sizes import ADAPTERS, ENCODERS, recipes
from omni_jax.training.recipe import OptimizerConfig, ParameterGroup, Phase

# the paper gives neither rates nor the share of the two phases; these are ours
PHASES = (
    Phase("adapters", (ParameterGroup(ADAPTERS),), steps=2_000),
    Phase("encoders", (ParameterGroup(ADAPTERS), ParameterGroup(ENCODERS, learning_rate_scale=0.1))),
)

RECIPES = recipes(
    "pretrain1",
    "pretraining 1: encoders learn to speak to a frozen language model",
    phases=PHASES,
    optimizer=OptimizerConfig(learning_rate=5e-4, warmup=500),
    steps=20_000,
)

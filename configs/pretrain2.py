"""Pretraining, stage 2 (paper section 3): everything trains, on mixed media and on text alone, 8,192 tokens a row.

python train.py pretrain2-7b --init STAGE1 --data.train media.arrayrecord text.arrayrecord --data.weights 4 1
"""

from configs.sizes import ADAPTERS, DECODER, ENCODERS, recipes
from omni_jax.training.recipe import OptimizerConfig, ParameterGroup, Phase

# the paper gives no rates; these are ours
PHASES = (Phase("all", (ParameterGroup(f"{DECODER}|{ADAPTERS}"), ParameterGroup(ENCODERS, learning_rate_scale=0.2))),)

RECIPES = recipes(
    "pretrain2",
    "pretraining 2: everything trains, on mixed media and text",
    phases=PHASES,
    optimizer=OptimizerConfig(learning_rate=5e-5, warmup=1000),
    steps=100_000,
)

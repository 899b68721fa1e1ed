"""Pretraining, stage 3 (paper section 3): everything trains, on long audio, video and text, 32,768 tokens a row.

python train.py pretrain3-7b --init STAGE2 --data.train long.arrayrecord
"""

from configs.pretrain2 import PHASES
from configs.sizes import recipes
from omni_jax.training.recipe import OptimizerConfig

RECIPES = recipes(
    "pretrain3",
    "pretraining 3: everything trains, on long rows",
    phases=PHASES,
    optimizer=OptimizerConfig(learning_rate=2e-5, warmup=500),
    steps=20_000,
    tokens=32_768,
    media=dict(spans=2048, audio_blocks=128, canvases=32),
)

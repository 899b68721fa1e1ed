"""The Talker prefers the better of two answers (paper section 4.3, its second stage): DPO.

python tools/score_pairs.py talker-dpo-7b --init STAGE1 --data.train pairs.jsonl --out scored.jsonl
python train.py talker-dpo-7b --init STAGE1 --data.train scored.jsonl

A row is a dialogue with two answers, ``{"messages": [...], "speech": {"chosen": {"codec_ids": [...]}, "rejected":
{"codec_ids": [...]}}}`` (docs/data.md).
"""

from configs.sizes import make_mini, recipes
from configs.talker import TALKER
from omni_jax.training.options import TalkerDPOOptions
from omni_jax.training.recipe import OptimizerConfig, Phase

RECIPES = recipes(
    "talker-dpo",
    "Talker 2: preferences between spoken answers",
    phases=(Phase("preferences", (TALKER,)),),
    # the paper gives neither rate nor beta
    optimizer=OptimizerConfig(learning_rate=1e-6, warmup=50, weight_decay=0.0),
    steps=2_000,
    tokens=4096,
    media=dict(audio_blocks=16, canvases=4),
    devices={"7b": 32, "3b": 16},
    objective=TalkerDPOOptions(),
    tiny_objective=TalkerDPOOptions(positions=512, pairs=4, chunk=128),
)
RECIPES["talker-dpo-mini"] = make_mini(
    RECIPES["talker-dpo-tiny"],
    data=dict(rows=2, streams=2, tokens=512, audio_blocks=0, canvases=0),
    optimizer=OptimizerConfig(learning_rate=5e-5, warmup=5, weight_decay=0.0),
    steps=30,
    objective=TalkerDPOOptions(positions=2048, pairs=6, chunk=2048),
)

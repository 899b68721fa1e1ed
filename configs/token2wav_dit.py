"""Flow matching: Token2Wav's DiT learns to make the mel of codes (paper section 2.4).

python train.py token2wav-dit-7b --init CHECKPOINT --data.train speech.jsonl

A row is ``{"codec_ids": [...], "audio": "x.wav"}`` (docs/data.md). ``--init random --model 7b`` begins from nothing.
"""

from configs.sizes import make_mini, recipes
from omni_jax.training.options import FlowMatchingOptions
from omni_jax.training.recipe import OptimizerConfig, ParameterGroup, Phase

RECIPES = recipes(
    "token2wav-dit",
    "flow matching of Token2Wav's DiT, from codes to mel",
    phases=(Phase("flow", (ParameterGroup("token2wav/dit/.*"),)),),
    optimizer=OptimizerConfig(learning_rate=7.5e-5, warmup=20_000, weight_decay=0.01, clip=1.0, ema=0.9999),
    steps=500_000,
    # codes: a minute of sound
    tokens=3072,
    media=dict(audio_blocks=0, canvases=0),
    devices={"7b": 64, "3b": 64},
    objective=FlowMatchingOptions(),
    tiny_objective=FlowMatchingOptions(utterances=4, clip_frames=64),
)
RECIPES["token2wav-dit-mini"] = make_mini(
    RECIPES["token2wav-dit-tiny"],
    data=dict(rows=1, tokens=300),
    optimizer=OptimizerConfig(learning_rate=1e-3, warmup=100, weight_decay=0.01, clip=1.0, ema=0.999),
    steps=6000,
    objective=FlowMatchingOptions(utterances=4, clip_frames=480),
)

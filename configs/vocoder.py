"""The vocoder of Token2Wav, from mel to sound: by spectra alone at first, then against discriminators.

python train.py vocoder-7b --init CHECKPOINT --data.train sound.jsonl

A row is ``{"audio": "x.wav"}`` (docs/data.md). The vocoder of both published sizes is one.
"""

import dataclasses

from configs.sizes import make_mini, recipes
from omni_jax.training.options import VocoderOptions
from omni_jax.training.recipe import OptimizerConfig, ParameterGroup, Phase

_VOCODER = ParameterGroup("token2wav/bigvgan/.*")
_DISCRIMINATORS = ParameterGroup("discriminators/.*")

RECIPES = recipes(
    "vocoder",
    "Token2Wav's vocoder, from mel to sound, against discriminators",
    phases=(Phase("regression", (_VOCODER,), steps=20_000), Phase("adversarial", (_DISCRIMINATORS, _VOCODER))),
    # the norms of a discriminator's gradients are in the hundreds
    optimizer=OptimizerConfig(learning_rate=1e-4, warmup=1000, b1=0.8, b2=0.99, weight_decay=0.01, clip=500.0),
    steps=1_000_000,
    # mel frames of a segment: 2.6 s
    tokens=256,
    media=dict(audio_blocks=0, canvases=0),
    devices={"7b": 16, "3b": 16},
    objective=VocoderOptions(),
    tiny_objective=VocoderOptions(context=4, channels=2, single_convs=True),
)
RECIPES["vocoder-tiny"] = dataclasses.replace(
    RECIPES["vocoder-tiny"], data=dataclasses.replace(RECIPES["vocoder-tiny"].data, tokens=16)
)
# what regression has learned in minutes the discriminators, which know nothing yet, must not undo
_GENTLE = (
    ParameterGroup(_DISCRIMINATORS.paths, learning_rate_scale=0.25),
    ParameterGroup(_VOCODER.paths, learning_rate_scale=0.05),
)
RECIPES["vocoder-mini"] = make_mini(
    RECIPES["vocoder-tiny"],
    data=dict(rows=4, tokens=40),
    phases=(Phase("regression", (_VOCODER,), steps=3600), Phase("adversarial", _GENTLE)),
    optimizer=OptimizerConfig(learning_rate=2e-3, warmup=50, b1=0.8, b2=0.99, weight_decay=0.01, clip=100.0),
    steps=3630,
    objective=VocoderOptions(context=6, channels=4, single_convs=True),
)

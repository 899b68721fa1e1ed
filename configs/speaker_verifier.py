"""Speaker vectors, which Token2Wav takes beside a clip of a voice: a network that tells speakers, from nothing.

python train.py speaker-verifier-7b --init random --model FILES --data.train voices.jsonl --objective.speakers Ada Ben

A row is ``{"audio": "x.wav", "voice": "Ada"}`` (docs/data.md). ``--init CHECKPOINT`` keeps the network beside what the
checkpoint has.
"""

import dataclasses

from configs.sizes import make_mini, recipes
from omni_jax.speaker_verifier_config import SpeakerVerifierConfig
from omni_jax.training.options import SpeakerVerifierOptions
from omni_jax.training.recipe import OptimizerConfig, ParameterGroup, Phase

RECIPES = recipes(
    "speaker-verifier",
    "vectors of speakers: those of one voice near each other, those of others far",
    phases=(Phase("speakers", (ParameterGroup("speaker_verifier/.*"),)),),
    optimizer=OptimizerConfig(learning_rate=1e-3, warmup=2_000, weight_decay=2e-5, clip=1.0),
    steps=100_000,
    # mel frames of a clip: three seconds
    tokens=300,
    media=dict(audio_blocks=0, canvases=0),
    devices={"7b": 16, "3b": 16},
    objective=SpeakerVerifierOptions(),
    tiny_objective=SpeakerVerifierOptions(SpeakerVerifierConfig.tiny()),
)
for _size in ("7b", "3b"):
    # clips are short: each device has several
    _recipe = RECIPES[f"speaker-verifier-{_size}"]
    RECIPES[f"speaker-verifier-{_size}"] = dataclasses.replace(
        _recipe, data=dataclasses.replace(_recipe.data, rows=512)
    )
RECIPES["speaker-verifier-mini"] = make_mini(
    RECIPES["speaker-verifier-tiny"],
    data=dict(rows=32, streams=2, tokens=200),
    optimizer=OptimizerConfig(learning_rate=2e-3, warmup=50, weight_decay=2e-5, clip=1.0),
    steps=150,
    objective=SpeakerVerifierOptions(
        SpeakerVerifierConfig(channels=(64, 64, 64, 64, 192), attention_channels=32, squeeze_channels=32)
    ),
)

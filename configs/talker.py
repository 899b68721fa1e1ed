"""The Talker (paper section 4.3): it learns to speak, takes new voices, and follows a tuned Thinker.

python train.py talker-pretrain-7b --init CHECKPOINT --data.train spoken.jsonl
python train.py talker-voices-7b --init STAGE2 --data.train voices.jsonl --objective.voices Ada 151873 Ben 151874
python train.py talker-realign-7b --init TUNED --data.train distilled.jsonl

A row is a dialogue with the codes of its last message, ``{"messages": [...], "speech": {"codec_ids": [...], "voice":
"Ada"}}`` (docs/data.md). The Thinker stays as it is; ``--phases.0.train.0.paths '(talker|thinker/decoder)/.*'
--objective.text-weight 1`` trains its language model too.
"""

from typing import Any

from configs.sizes import make_mini, recipes
from omni_jax.training.options import TalkerOptions
from omni_jax.training.recipe import OptimizerConfig, ParameterGroup, Phase

TALKER = ParameterGroup("talker/.*")
# of the embeddings the rows of new voices alone; nothing else of the table may move, so it does not decay
VOICE_EMBEDDINGS = ParameterGroup("thinker/decoder/embed/embedding", learning_rate_scale=10.0)

# what all stages have in common; the paper gives neither rates nor steps
_SHARED: dict[str, Any] = dict(
    tokens=4096,
    media=dict(audio_blocks=16, canvases=4),
    devices={"7b": 32, "3b": 16},
    objective=TalkerOptions(),
    tiny_objective=TalkerOptions(positions=512, utterances=8, chunk=128),
)

RECIPES = {
    **recipes(
        "talker-pretrain",
        "Talker 1: the next code, in the context of dialogues with any media",
        phases=(Phase("codes", (TALKER,)),),
        optimizer=OptimizerConfig(learning_rate=2e-4, warmup=2000, weight_decay=0.01),
        steps=100_000,
        **_SHARED,
    ),
    **recipes(
        "talker-voices",
        "Talker 3: several speakers, new ones among them",
        phases=(Phase("voices", (TALKER, VOICE_EMBEDDINGS)),),
        optimizer=OptimizerConfig(
            learning_rate=1e-5, warmup=100, weight_decay=0.01, no_decay=r".*/(bias|scale)|thinker/.*"
        ),
        steps=5_000,
        **_SHARED,
    ),
    **recipes(
        "talker-realign",
        "the Talker is fitted to a tuned Thinker again, on what the model has spoken itself",
        phases=(Phase("codes", (TALKER,)),),
        optimizer=OptimizerConfig(learning_rate=2e-5, warmup=100, weight_decay=0.01),
        steps=3_000,
        **_SHARED,
    ),
}

_MINI: dict[str, Any] = dict(
    # rows of 512 positions: of longer ones more pairs are masked, since each holds several utterances
    data=dict(rows=2, tokens=256, audio_blocks=0, canvases=0),
    objective=TalkerOptions(positions=512, utterances=3, chunk=512),
)
RECIPES["talker-pretrain-mini"] = make_mini(
    RECIPES["talker-pretrain-tiny"],
    # the second moment over many steps: one has few codes, of 4,096
    optimizer=OptimizerConfig(learning_rate=3e-3, warmup=100, b2=0.999, weight_decay=0.01),
    steps=2600,
    **_MINI,
)
RECIPES["talker-voices-mini"] = make_mini(
    RECIPES["talker-voices-tiny"],
    # codes so small are those of one voice: a new voice has other ones, which are all learned here
    optimizer=OptimizerConfig(
        learning_rate=2e-3, warmup=50, b2=0.999, weight_decay=0.01, no_decay=r".*/(bias|scale)|thinker/.*"
    ),
    steps=1500,
    **_MINI,
)

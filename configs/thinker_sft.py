"""Instruction tuning of the Thinker (paper section 4.2): ChatML, with the loss on the assistant's tokens alone.

python train.py thinker-sft-7b --init CHECKPOINT --data.train dialogues.jsonl

The encoders stay as they are; ``--phases.0.train.0.paths 'thinker/(?!audio_encoder/bos_eos).*'`` trains them too.
"""

from configs.sizes import ADAPTERS, DECODER, make_mini, recipes
from omni_jax.training.recipe import OptimizerConfig, ParameterGroup, Phase

RECIPES = recipes(
    "thinker-sft",
    "instruction tuning of the Thinker",
    phases=(Phase("dialogues", (ParameterGroup(f"{DECODER}|{ADAPTERS}"),)),),
    optimizer=OptimizerConfig(learning_rate=1e-5, warmup=100, weight_decay=0.01),
    steps=5_000,
)

# of the language model alone, on text
RECIPES["thinker-sft-mini"] = make_mini(
    RECIPES["thinker-sft-tiny"],
    data=dict(rows=1, tokens=512, audio_blocks=0, canvases=0),
    phases=(Phase("dialogues", (ParameterGroup(DECODER),)),),
    optimizer=OptimizerConfig(learning_rate=2e-3, warmup=50, weight_decay=0.01),
    steps=2000,
)

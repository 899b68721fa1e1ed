"""Token2Wav's DiT in fewer evaluations: guidance is put into it, and the steps of its flow become few.

python train.py token2wav-distill-7b --init CHECKPOINT --data.train speech.jsonl

The checkpoint's DiT is the teacher; rows are those of token2wav-dit. token2wav-guidance distills guidance alone, so
that any solver costs half as much.
"""

from typing import Any

from configs.sizes import make_mini, recipes
from omni_jax.training.options import FlowDistillationOptions
from omni_jax.training.recipe import OptimizerConfig, ParameterGroup, Phase

_COMMON: dict[str, Any] = dict(
    phases=(Phase("student", (ParameterGroup("token2wav/dit/.*"),)),),
    optimizer=OptimizerConfig(learning_rate=5e-5, warmup=500, weight_decay=0.0, clip=1.0, ema=0.999),
    # codes: a minute of sound
    tokens=3072,
    media=dict(audio_blocks=0, canvases=0),
    devices={"7b": 64, "3b": 64},
)

RECIPES = {
    **recipes(
        "token2wav-guidance",
        "guidance of Token2Wav's flow put into its DiT: an evaluation is one, not two",
        steps=20_000,
        objective=FlowDistillationOptions(steps=0),
        tiny_objective=FlowDistillationOptions(utterances=4, clip_frames=64, steps=0),
        **_COMMON,
    ),
    **recipes(
        "token2wav-distill",
        "Token2Wav's flow in four evaluations of its DiT",
        steps=20_000,
        objective=FlowDistillationOptions(),
        tiny_objective=FlowDistillationOptions(utterances=4, clip_frames=64, teacher_steps=1),
        **_COMMON,
    ),
}
RECIPES["token2wav-distill-mini"] = make_mini(
    RECIPES["token2wav-distill-tiny"],
    data=dict(rows=1, tokens=300),
    optimizer=OptimizerConfig(learning_rate=3e-4, warmup=20, weight_decay=0.0, clip=1.0, ema=0.99),
    steps=200,
    objective=FlowDistillationOptions(utterances=4, clip_frames=480, teacher_steps=1),
)

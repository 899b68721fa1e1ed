"""The speech tokenizer learns codes of speech, from nothing: what is said, then how it sounds too (paper section 2.4).

python train.py speech-tokenizer-7b --init random --model FILES --data.train speech.jsonl

A row is ``{"audio": "x.wav", "text": "what is said"}`` (docs/data.md). The tokenizer of both published sizes is one;
-mini is for two cores (docs/speech-training.md).
"""

import dataclasses

from configs.sizes import recipes
from omni_jax.mini_config import mini_config, mini_speech_tokenizer
from omni_jax.speech_tokenizer_config import SpeechTokenizerConfig
from omni_jax.training.options import SpeechTokenizerOptions
from omni_jax.training.recipe import OptimizerConfig, ParameterGroup, Phase

# the codebook follows from averages; the output is the Thinker's and is trained with it
_CONTENT = ParameterGroup("speech_tokenizer/(?!quantizer/|mel_decoder/|proj/).*")
_SOUND = ParameterGroup("speech_tokenizer/(?!quantizer/|proj/).*")

RECIPES = recipes(
    "speech-tokenizer",
    "codes of speech from nothing: what is said, then how it sounds too",
    phases=(Phase("content", (_CONTENT,), steps=200_000), Phase("sound", (_SOUND,))),
    optimizer=OptimizerConfig(learning_rate=2e-4, warmup=5_000, weight_decay=0.01, clip=1.0),
    steps=400_000,
    # codes: four minutes of sound
    tokens=12_000,
    media=dict(audio_blocks=0, canvases=0),
    devices={"7b": 32, "3b": 32},
    objective=SpeechTokenizerOptions(utterances=64, unquantized=0.5),
    tiny_objective=SpeechTokenizerOptions(SpeechTokenizerConfig.tiny(), utterances=4, max_codes=200, max_labels=48),
)
RECIPES["speech-tokenizer-mini"] = dataclasses.replace(
    RECIPES["speech-tokenizer-tiny"],
    model=mini_config(),
    data=dataclasses.replace(RECIPES["speech-tokenizer-tiny"].data, rows=2, streams=2, tokens=1200),
    phases=(Phase("content", (_CONTENT,), steps=500), Phase("sound", (_SOUND,))),
    optimizer=OptimizerConfig(learning_rate=2e-3, warmup=100, weight_decay=0.01, clip=1.0),
    steps=1200,
    objective=SpeechTokenizerOptions(
        mini_speech_tokenizer(), utterances=12, max_codes=400, max_labels=96, unquantized=0.5
    ),
    remat="none",
    log_every=20,
)

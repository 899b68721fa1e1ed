"""The speech tokenizer learns codes of speech, from nothing: what is said, then how it sounds too (paper section 2.4).

python train.py speech-tokenizer-7b --init random --model FILES --data.train speech.jsonl

A row is ``{"audio": "x.wav", "text": "what is said"}`` (docs/data.md). The tokenizer of both published sizes is one;
-mini is for two cores (docs/speech-training.md). ``speech-tokenizer-thinker`` has the Thinker of a checkpoint (--init)
beside it, which stays as it is and writes down what the codes say. ``speech-tokenizer-match`` finds the codes of a
Token2Wav that is there: rows have ``audio``, and ``codec_ids`` where they are known.
"""

import dataclasses

from configs.sizes import make_mini, recipes
from omni_jax.config import AudioEncoderConfig
from omni_jax.mini_config import mini_speech_tokenizer
from omni_jax.speech_tokenizer_config import SpeechTokenizerConfig
from omni_jax.training.options import CodeMatchingOptions, SpeechTokenizerOptions
from omni_jax.training.recipe import OptimizerConfig, ParameterGroup, Phase

_TINY = SpeechTokenizerConfig.tiny()
# the codebook follows from averages; the output is the Thinker's and is trained with it
_CONTENT = ParameterGroup("speech_tokenizer/(?!quantizer/|mel_decoder/|proj/).*")
_SOUND = ParameterGroup("speech_tokenizer/(?!quantizer/|proj/).*")

# and with a Thinker, which reads the output
_READ_CONTENT = ParameterGroup("speech_tokenizer/(?!quantizer/|mel_decoder/).*")
_READ_SOUND = ParameterGroup("speech_tokenizer/(?!quantizer/).*")

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
    tiny_objective=SpeechTokenizerOptions(_TINY, utterances=4, max_codes=200, max_labels=48),
)
RECIPES["speech-tokenizer-mini"] = make_mini(
    RECIPES["speech-tokenizer-tiny"],
    data=dict(rows=1, tokens=600),
    phases=(Phase("sound", (_SOUND,)),),
    optimizer=OptimizerConfig(learning_rate=2e-3, warmup=50, weight_decay=0.01, clip=1.0),
    steps=6000,
    objective=SpeechTokenizerOptions(
        mini_speech_tokenizer(),
        utterances=8,
        max_codes=400,
        max_labels=96,
        # of codes so small the words are learned from how they sound sooner than from their text
        unquantized=0.3,
        codebook_decay=0.98,
        content_weight=0.5,
        mel_weight=5.0,
        commitment_weight=0.25,
    ),
)


_WITH_THINKER = recipes(
    "speech-tokenizer-thinker",
    "codes of speech that a Thinker can write down, then how it sounds too",
    phases=(Phase("content", (_READ_CONTENT,), steps=200_000), Phase("sound", (_READ_SOUND,))),
    optimizer=OptimizerConfig(learning_rate=2e-4, warmup=5_000, weight_decay=0.01, clip=1.0),
    steps=400_000,
    tokens=12_000,
    media=dict(audio_blocks=0, canvases=0),
    devices={"7b": 32, "3b": 32},
    objective=SpeechTokenizerOptions(utterances=64, unquantized=0.5, thinker_weight=1.0, positions=12_288),
    tiny_objective=SpeechTokenizerOptions(
        _TINY, utterances=4, max_codes=200, max_labels=48, thinker_weight=1.0, positions=256
    ),
)
# the output has the width of the Thinker
_NARROW = SpeechTokenizerConfig(AudioEncoderConfig(output_dim=2048))
_WITH_THINKER["speech-tokenizer-thinker-3b"] = dataclasses.replace(
    _WITH_THINKER["speech-tokenizer-thinker-3b"],
    objective=dataclasses.replace(_WITH_THINKER["speech-tokenizer-thinker-3b"].objective, model=_NARROW),
)
RECIPES |= _WITH_THINKER

RECIPES |= recipes(
    "speech-tokenizer-match",
    "the codes that the Token2Wav of a checkpoint, as it is, makes the sound of",
    phases=(Phase("match", (ParameterGroup("speech_tokenizer/(conv1|conv2|front|project_in)/.*"),)),),
    optimizer=OptimizerConfig(learning_rate=2e-4, warmup=5_000, weight_decay=0.01, clip=1.0),
    steps=200_000,
    tokens=3072,
    media=dict(audio_blocks=0, canvases=0),
    devices={"7b": 16, "3b": 16},
    objective=CodeMatchingOptions(),
    tiny_objective=CodeMatchingOptions(utterances=4, clip_frames=64, model=_TINY),
)

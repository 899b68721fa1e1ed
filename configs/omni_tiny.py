"""omni-tiny: the model of this repository that is trained from nothing on two cores, with the stages of the 7B.

python tools/train_tiny.py out/omni-tiny

Its data are those of ``tools/make_world.py``. Published models begin with a language model that has read; here a stage
of text comes first, ``language``. Token2Wav and the speech tokenizer are those of ``mini_config``.
"""

import dataclasses
from typing import Any

from configs import pretrain1, pretrain2, pretrain3, talker, talker_dpo, thinker_sft
from configs.sizes import ADAPTERS, DECODER, ENCODERS, make_mini
from omni_jax.config import AudioEncoderConfig, OmniConfig, VisionEncoderConfig
from omni_jax.mini_config import mini_config
from omni_jax.training.options import BagOfWordsOptions, TalkerDPOOptions
from omni_jax.training.recipe import OptimizerConfig, ParameterGroup, Phase, Recipe

WIDTH = 192  # of the Thinker
_ROPE_THETA = 1000.0  # of contexts of a thousand positions: more frequencies that tell neighbours apart
# of pictures and videos, here and in the files of the model
PIXELS = {"max_pixels": 112 * 112, "video_max_pixels": 112 * 112}
# how codes are drawn: of 34 sentences 22 % of the words were wrong by Whisper at 0.3, and 27 % at the published 0.9
TALKER_SAMPLING = {"temperature": 0.3}
_UTTERANCES = 8  # of a row of the Talker, at most: of short ones three would leave 40 % of it empty
# small steps: their number counts more than their size. A video of six seconds with its sound is some 260 tokens, six
# windows and three blocks of sound
_MEDIA: dict[str, Any] = dict(
    rows=2, streams=2, tokens=576, spans=160, audio_blocks=6, canvases=4, windows=4, **PIXELS,
)  # fmt: skip
_WARMUP = 100


def omni_tiny_config(num_pieces: int) -> OmniConfig:
    """A Thinker and encoders of five million parameters.

    Args:
      num_pieces: of the vocabulary, before the added tokens.
    """
    mini = mini_config(num_pieces)
    text = dataclasses.replace(
        mini.thinker_config.text_config,
        hidden_size=WIDTH,
        intermediate_size=512,
        num_hidden_layers=5,
        num_attention_heads=6,
        rope_theta=_ROPE_THETA,
    )
    audio = AudioEncoderConfig.tiny(
        d_model=WIDTH, encoder_layers=4, encoder_attention_heads=6, encoder_ffn_dim=512, output_dim=WIDTH
    )
    vision = VisionEncoderConfig.tiny(
        depth=4,
        hidden_size=128,
        num_heads=4,
        intermediate_size=384,
        out_hidden_size=WIDTH,
        fullatt_block_indexes=(1, 3),
    )
    return dataclasses.replace(
        mini,
        thinker_config=dataclasses.replace(
            mini.thinker_config, text_config=text, audio_config=audio, vision_config=vision
        ),
        talker_config=dataclasses.replace(
            mini.talker_config, embedding_size=WIDTH, num_hidden_layers=6, rope_theta=_ROPE_THETA
        ),
    )


def _make(tiny: Recipe, phases: tuple[Phase, ...], *, steps: int, learning_rate: float, **changes: Any) -> Recipe:
    """A recipe of one of the Thinker's stages.

    Args:
      tiny: the stage's recipe of the tiny size.
      phases: what trains.
      steps: of the run.
      learning_rate: at the peak.
      changes: of the data.
    """
    optimizer = OptimizerConfig(learning_rate=learning_rate, warmup=_WARMUP, weight_decay=0.01)
    return make_mini(
        tiny,
        data={**_MEDIA, **changes},
        model=omni_tiny_config(num_pieces=512),
        phases=phases,
        optimizer=optimizer,
        steps=steps,
    )


def _make_text(**kw: Any) -> Recipe:
    """A recipe of the language model alone, with the arguments of ``_make``."""
    phases = (Phase("text", (_DECODER,)),)
    return _make(thinker_sft.RECIPES["thinker-sft-tiny"], phases, rows=4, tokens=256, audio_blocks=0, canvases=0, **kw)


def _make_tuning(what: str, *, phases: tuple[Phase, ...] | None = None, **kw: Any) -> Recipe:
    """A recipe of instruction tuning on one kind of media, with the arguments of ``_make``; all trains by default."""
    recipe = _make(thinker_sft.RECIPES["thinker-sft-tiny"], phases or _ALL, learning_rate=5e-4, **kw)
    return dataclasses.replace(recipe, about=f"instruction tuning on {what}")


def _make_talker(
    stage: str, *, steps: int, positions: int, learning_rate: float, code_dropout: float = 0.0, **changes: Any
) -> Recipe:
    """A recipe of the Talker.

    Args:
      stage: of the Talker.
      steps: of the run.
      positions: of a row of the Talker, for some utterances.
      learning_rate: at the peak.
      code_dropout: of the objective.
      changes: of the data; the recipes of ``mini`` have no room for media.
    """
    mini = talker.RECIPES[f"{stage}-mini"]
    data = dataclasses.replace(mini.data, **changes)
    optimizer = dataclasses.replace(mini.optimizer, learning_rate=learning_rate)
    objective = dataclasses.replace(
        mini.objective, positions=positions, chunk=positions, utterances=_UTTERANCES, code_dropout=code_dropout
    )
    model = omni_tiny_config(num_pieces=512)
    return dataclasses.replace(mini, model=model, data=data, objective=objective, optimizer=optimizer, steps=steps)


def _make_dpo(*, steps: int, learning_rate: float) -> Recipe:
    """The recipe of the Talker's preferences.

    Args:
      steps: of the run.
      learning_rate: at the peak.
    """
    mini = talker_dpo.RECIPES["talker-dpo-mini"]
    objective = TalkerDPOOptions(positions=1344, chunk=1344, pairs=4, anchor_weight=1.0)
    optimizer = OptimizerConfig(learning_rate=learning_rate, warmup=50, weight_decay=0.0)
    data = dataclasses.replace(mini.data, **_MEDIA)
    model = omni_tiny_config(num_pieces=512)
    return dataclasses.replace(mini, model=model, data=data, objective=objective, optimizer=optimizer, steps=steps)


_ADAPTERS = ParameterGroup(ADAPTERS)
_ENCODERS = ParameterGroup(ENCODERS)
_DECODER = ParameterGroup(DECODER)
_ALL = (Phase("all", (_DECODER, _ADAPTERS, _ENCODERS)),)

RECIPES = {
    # what a published language model knows already: to copy, and then the rest
    "lists-omni-tiny": _make_text(steps=1000, learning_rate=1e-3),
    "language-omni-tiny": _make_text(steps=4000, learning_rate=6e-4),
    # in place of published encoders, which begin with what they have learned elsewhere
    "encoders-omni-tiny": dataclasses.replace(
        _make(
            pretrain1.RECIPES["pretrain1-tiny"],
            (Phase("encoders", (_ADAPTERS, _ENCODERS)),),
            steps=4000,
            learning_rate=1e-3,
            tokens=768,
            audio_blocks=10,
            canvases=2,
        ),
        about="encoders predict the words of captions and of transcripts, without a language model",
        objective=BagOfWordsOptions(),
    ),
    # encoders begin at random, so that they train as fast as adapters
    "pretrain1-omni-tiny": _make(
        pretrain1.RECIPES["pretrain1-tiny"],
        (Phase("adapters", (_ADAPTERS,), steps=100), Phase("encoders", (_ADAPTERS, _ENCODERS))),
        steps=5000,
        learning_rate=7e-4,
        # rows of one picture or of one short sound
        audio_blocks=10,
        canvases=1,
    ),
    "pretrain2-omni-tiny": _make(
        pretrain2.RECIPES["pretrain2-tiny"],
        _ALL,
        steps=6000,
        learning_rate=7e-4,
    ),
    "pretrain3-omni-tiny": _make(
        pretrain3.RECIPES["pretrain3-tiny"],
        _ALL,
        steps=600,
        learning_rate=3e-4,
        tokens=1152,
        spans=320,
        audio_blocks=20,
        canvases=8,
    ),
    # of one medium alone a step has more rows, and takes less time; what the others teach comes back afterwards
    "pictures-omni-tiny": _make_tuning("pictures alone", steps=4000, audio_blocks=0, canvases=3),
    "videos-omni-tiny": _make_tuning("silent videos, with some pictures", steps=1500, audio_blocks=0, canvases=6),
    "sounds-omni-tiny": _make_tuning("sounds alone", steps=2400, audio_blocks=14, canvases=0),
    # two such videos in a row. Encoders stay as they are: what they see and hear is to be put together
    "timing-omni-tiny": _make_tuning(
        "moments of videos with sound, and on questions by voice",
        phases=(Phase("dialogues", (_DECODER, _ADAPTERS)),),
        steps=2800,
        tokens=704,
        audio_blocks=8,
        canvases=3,
        lookahead=8,
    ),
    "thinker-sft-omni-tiny": _make(
        thinker_sft.RECIPES["thinker-sft-tiny"],
        _ALL,
        steps=7500,
        learning_rate=5e-4,
    ),
    # each word of a list follows from the text alone. From sentences the Talker learns their grammar first, and says
    # any words in their places
    "talker-lists-omni-tiny": dataclasses.replace(
        _make_talker("talker-pretrain", steps=6000, positions=448, learning_rate=2e-3, rows=3, tokens=304),
        about="the Talker learns to copy lists of words, before it reads texts",
    ),
    # texts that are read aloud, lists among them, and clips that are gone on from
    "talker-pretrain-omni-tiny": _make_talker(
        "talker-pretrain", steps=5000, positions=672, learning_rate=1.5e-3, code_dropout=0.2, tokens=352
    ),
    # of one dialogue two answers: of the text, and of a text nearly the same
    "talker-dpo-omni-tiny": _make_dpo(steps=700, learning_rate=2e-4),
    # answers to several questions about a video, too: some 800 positions
    "talker-voices-omni-tiny": _make_talker("talker-voices", steps=4000, positions=896, learning_rate=1.5e-3, **_MEDIA),
}

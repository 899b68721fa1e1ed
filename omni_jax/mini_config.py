"""The size of a model that learns something small in minutes, or to speak in an hour and a half, on two cores."""

from __future__ import annotations

import dataclasses
from typing import Any, TypeVar

from omni_jax.config import (
    AudioEncoderConfig,
    BigVGANConfig,
    DiTConfig,
    OmniConfig,
    RopeScaling,
    TalkerConfig,
    TextConfig,
    ThinkerConfig,
    Token2WavConfig,
    VisionEncoderConfig,
)
from omni_jax.speech_tokenizer_config import SpeechTokenizerConfig

_Section = TypeVar("_Section", ThinkerConfig, TalkerConfig)

WIDTH = 128  # of the Thinker
NUM_CODES = 4096
_TINY_PIECES = 512  # of the tiny model's vocabulary


def mini_speech_tokenizer() -> SpeechTokenizerConfig:
    """A tokenizer of 2 million parameters with blocks of a second."""
    audio = AudioEncoderConfig.tiny(
        d_model=160, encoder_layers=3, encoder_attention_heads=4, encoder_ffn_dim=480, n_window=50, output_dim=WIDTH
    )
    return SpeechTokenizerConfig(audio, quantizer_layer=2, codebook_size=NUM_CODES, codebook_dim=32, mel_channels=160)


def mini_config(num_pieces: int = _TINY_PIECES) -> OmniConfig:
    """Every part at its size: a Thinker of 1.2 million parameters, speech of 4,096 codes.

    The ids of the Talker that are no codes lie behind those, as in the published model.

    Args:
      num_pieces: of the vocabulary, before the added tokens.
    """
    rope = RopeScaling(mrope_section=(4, 6, 6))
    shift = num_pieces - _TINY_PIECES
    text = TextConfig.tiny(
        hidden_size=WIDTH, intermediate_size=384, num_hidden_layers=3, head_dim=32, rope_scaling=rope
    )
    text = dataclasses.replace(text, vocab_size=text.vocab_size + shift)
    audio = AudioEncoderConfig.tiny(d_model=WIDTH, encoder_layers=3, encoder_ffn_dim=256, output_dim=WIDTH)
    vision = VisionEncoderConfig.tiny(out_hidden_size=WIDTH)
    talker = TalkerConfig.tiny(
        hidden_size=WIDTH,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        rope_scaling=rope,
        embedding_size=WIDTH,
        vocab_size=NUM_CODES + 32,
        tts_codec_pad_token_id=NUM_CODES + 16,
        tts_codec_start_token_id=NUM_CODES + 17,
        tts_codec_end_token_id=NUM_CODES + 18,
        tts_codec_mask_token_id=NUM_CODES + 20,
    )
    dit = DiTConfig(
        hidden_size=192,
        num_hidden_layers=8,
        num_attention_heads=3,
        emb_dim=128,
        num_embeds=NUM_CODES + 1,
        look_ahead_layers=(4,),
        look_backward_layers=(0, 6),
        enc_dim=64,
        enc_channels=(64, 64, 64, 64, 192),
        enc_attention_channels=32,
        enc_se_channels=32,
    )
    # two stages in place of six: each is another program, and narrow ones at a high rate are slow on a CPU
    vocoder = BigVGANConfig(
        upsample_initial_channel=96,
        upsample_rates=(20, 12),
        upsample_kernel_sizes=(40, 24),
        resblock_kernel_sizes=(7,),
        resblock_dilation_sizes=((1, 3),),
    )
    return OmniConfig(
        _shift_text_ids(ThinkerConfig.tiny(text_config=text, audio_config=audio, vision_config=vision), shift),
        _shift_text_ids(talker, shift),
        Token2WavConfig(dit_config=dit, bigvgan_config=vocoder),
    )


def _shift_text_ids(config: _Section, shift: int) -> _Section:
    """The ids of the Thinker's tokens that stand behind its pieces, moved on."""
    changes: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        is_id = field.name.endswith(("token_id", "token_index"))
        if is_id and not field.name.startswith(("tts_codec", "user")):
            changes[field.name] = getattr(config, field.name) + shift
    return dataclasses.replace(config, **changes)

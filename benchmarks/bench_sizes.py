"""The middle size: large enough that time goes where it goes in the published model, small enough for two cores."""

from __future__ import annotations

import dataclasses

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


def middle_config() -> OmniConfig:
    """All of the model.

    The Thinker has 12 layers of 1024, both encoders 4 layers of their published widths, the Talker 6 layers of 512
    with the published codes, the DiT 6 layers of 512; the vocoder has half the published channels.
    """
    text = TextConfig(1024, 4096, 12, 16, 4, 32_000, rope_scaling=RopeScaling(mrope_section=(8, 12, 12)))
    thinker = dataclasses.replace(
        ThinkerConfig.tiny(),
        text_config=text,
        audio_config=AudioEncoderConfig(encoder_layers=4, output_dim=1024),
        vision_config=VisionEncoderConfig(depth=4, fullatt_block_indexes=(3,), out_hidden_size=1024),
    )
    dit = DiTConfig(hidden_size=512, num_hidden_layers=6, num_attention_heads=8, look_ahead_layers=(3,))
    dit = dataclasses.replace(dit, look_backward_layers=(0, 5))
    wave = Token2WavConfig(dit_config=dit, bigvgan_config=BigVGANConfig(upsample_initial_channel=768))
    return OmniConfig.tiny(thinker_config=thinker, talker_config=_talker(), token2wav_config=wave)


def _talker() -> TalkerConfig:
    """MLPs as many times as wide as the published 3B's; the published ids of the codes, the tiny ones of the rest."""
    sizes = dict(hidden_size=512, intermediate_size=2816, num_hidden_layers=6, num_attention_heads=8)
    sizes |= dict(num_key_value_heads=2, head_dim=64, embedding_size=1024, vocab_size=8448)
    ends = dict(tts_codec_start_token_id=8293, tts_codec_end_token_id=8294, tts_codec_pad_token_id=8292)
    rope = RopeScaling(mrope_section=(8, 12, 12))
    return TalkerConfig.tiny(**sizes, **ends, tts_codec_mask_token_id=8296, rope_scaling=rope)

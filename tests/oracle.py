"""PyTorch's implementation as the oracle of parity tests, and the configurations they run over."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import (
    Qwen2_5OmniConfig,
    Qwen2_5OmniForConditionalGeneration,
    Qwen2_5OmniThinkerForConditionalGeneration,
)

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

SIX_STAGES = BigVGANConfig(upsample_initial_channel=64)  # rates, kernels and dilations as published


def _seven_queries_a_key() -> OmniConfig:
    """The ratio of the published 7B, windows of two cells a side, audio blocks of one second, heads of H = D / N."""
    rope = RopeScaling(mrope_section=(2, 1, 1))
    text = TextConfig.tiny(hidden_size=56, num_attention_heads=7, num_key_value_heads=1, head_dim=8, rope_scaling=rope)
    text = dataclasses.replace(text, num_hidden_layers=3)
    audio = AudioEncoderConfig.tiny(d_model=40, encoder_attention_heads=2, encoder_layers=3, output_dim=56, n_window=50)
    vision = VisionEncoderConfig.tiny(depth=4, hidden_size=48, num_heads=3, intermediate_size=52, window_size=56)
    vision = dataclasses.replace(vision, fullatt_block_indexes=(0, 3), out_hidden_size=56)
    no_width = RopeScaling(mrope_section=(16, 16, 0))  # as in the published 3B's Talker
    talker = TalkerConfig.tiny(embedding_size=56, hidden_size=24, head_dim=64, rope_scaling=no_width)
    talker = dataclasses.replace(talker, num_attention_heads=7)
    dit = DiTConfig.tiny(hidden_size=24, num_attention_heads=4, head_dim=8, num_hidden_layers=4, ff_mult=3)
    wav = Token2WavConfig.tiny(dit_config=dit, bigvgan_config=BigVGANConfig(upsample_initial_channel=128))
    thinker = ThinkerConfig.tiny(text_config=text, audio_config=audio, vision_config=vision)
    return OmniConfig.tiny(thinker_config=thinker, talker_config=talker, token2wav_config=wav)


def _one_query_a_key() -> OmniConfig:
    """As many keys as queries, heads wider than D / N, every picture layer whole, another base of the angles."""
    rope = RopeScaling(mrope_section=(4, 2, 2))
    text = TextConfig.tiny(hidden_size=48, num_key_value_heads=4, head_dim=16, rope_scaling=rope)
    text = dataclasses.replace(text, num_hidden_layers=1, intermediate_size=96, vocab_size=700, rope_theta=10_000.0)
    audio = AudioEncoderConfig.tiny(d_model=48, encoder_attention_heads=3, encoder_layers=1)
    vision = VisionEncoderConfig.tiny(depth=2, num_heads=4, fullatt_block_indexes=(0, 1))
    talker = TalkerConfig.tiny(num_attention_heads=4, num_key_value_heads=4, num_hidden_layers=1)
    dit = DiTConfig.tiny(num_hidden_layers=2, look_ahead_layers=(0,), look_backward_layers=(1,), enc_res2net_scale=4)
    thinker = ThinkerConfig.tiny(text_config=text, audio_config=audio, vision_config=vision)
    wav = Token2WavConfig.tiny(dit_config=dit, bigvgan_config=SIX_STAGES)
    return OmniConfig.tiny(thinker_config=thinker, talker_config=talker, token2wav_config=wav)


# two test processes share two cores, and threads of PyTorch that wait for each other hold them up
torch.set_num_threads(1)

_TINY = OmniConfig.tiny(token2wav_config=Token2WavConfig.tiny(bigvgan_config=SIX_STAGES))

# name of the configuration (for test ids) -> the configuration
CONFIGS = {"tiny": _TINY, "seven": _seven_queries_a_key(), "one": _one_query_a_key()}


def load(folder: Path, attention: str = "eager") -> Qwen2_5OmniForConditionalGeneration:
    """The whole model in float32 on the CPU.

    transformers' own way of loading only warns of tensors; here they are put in one by one, so that a name that is
    missing, unexpected or of another shape fails.
    """
    config = Qwen2_5OmniConfig.from_pretrained(folder)
    model = Qwen2_5OmniForConditionalGeneration._from_config(config, attn_implementation=attention)
    model.load_state_dict(_state(folder), strict=True)
    model.load_speakers(folder / "spk_dict.pt")
    return model.float().eval()


def load_thinker(folder: Path, attention: str = "eager") -> Qwen2_5OmniThinkerForConditionalGeneration:
    """The Thinker alone, in float32 on the CPU; ``attention`` is eager or sdpa."""
    config = Qwen2_5OmniConfig.from_pretrained(folder).thinker_config
    model = Qwen2_5OmniThinkerForConditionalGeneration._from_config(config, attn_implementation=attention)
    state = {k.removeprefix("thinker."): v for k, v in _state(folder).items() if k.startswith("thinker.")}
    model.load_state_dict(state, strict=True)
    return model.float().eval()


def _state(folder: Path) -> dict[str, Any]:
    state: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        state.update(load_file(file))
    return {name: tensor.float() for name, tensor in state.items()}

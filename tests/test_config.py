"""The configuration: read from published files in either spelling, written back, and strict."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from omni_jax.config import OmniConfig, RopeScaling, TextConfig, ThinkerConfig
from omni_jax.config_file import to_transformers_4
from omni_jax.errors import ConfigError
from tests.transformers_5 import CASES, as_transformers_5

# the library's bookkeeping, as published files repeat it in every section
BOOKKEEPING = {
    "_name_or_path": "",
    "architectures": None,
    "chunk_size_feed_forward": 0,
    "id2label": {"0": "LABEL_0", "1": "LABEL_1"},
    "is_decoder": False,
    "return_dict": True,
    "tie_encoder_decoder": False,
    "top_k": 50,
    "torch_dtype": None,
    "use_bfloat16": False,
}


def published_7b() -> dict[str, Any]:
    """The published 7B's config.json, key by key as section 1 of the reference notes lists it."""
    audio = {
        "activation_function": "gelu",
        "activation_dropout": 0.0,
        "attention_dropout": 0.0,
        "d_model": 1280,
        "dropout": 0.0,
        "encoder_attention_heads": 20,
        "encoder_ffn_dim": 5120,
        "encoder_layers": 32,
        "init_std": 0.02,
        "initializer_range": 0.02,
        "max_source_positions": 1500,
        "model_type": "qwen2_5_omni_audio_encoder",
        "n_window": 100,
        "num_hidden_layers": 32,
        "num_mel_bins": 128,
        "output_dim": 3584,
        "scale_embedding": False,
    }
    vision = {
        "depth": 32,
        "embed_dim": 1280,
        "fullatt_block_indexes": [7, 15, 23, 31],
        "hidden_act": "silu",
        "hidden_size": 1280,
        "in_channels": 3,
        "in_chans": 3,
        "init_std": 0.02,
        "initializer_range": 0.02,
        "intermediate_size": 3420,
        "model_type": "qwen2_5_omni_vision_encoder",
        "num_heads": 16,
        "out_hidden_size": 3584,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "spatial_patch_size": 14,
        "temporal_patch_size": 2,
        "tokens_per_second": 25,
        "window_size": 112,
    }
    rope = {"mrope_section": [16, 24, 24], "rope_type": "default", "type": "default"}
    text = {
        "attention_dropout": 0.0,
        "hidden_act": "silu",
        "hidden_size": 3584,
        "init_std": 0.02,
        "initializer_range": 0.02,
        "intermediate_size": 18944,
        "max_position_embeddings": 32768,
        "max_window_layers": 28,
        "model_type": "qwen2_5_omni_text",
        "num_attention_heads": 28,
        "num_hidden_layers": 28,
        "num_key_value_heads": 4,
        "rms_norm_eps": 1e-06,
        "rope_scaling": rope,
        "rope_theta": 1000000.0,
        "sliding_window": 32768,
        "tie_word_embeddings": False,
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": 152064,
    }
    ids = {
        "audio_end_token_id": 151648,
        "audio_start_token_id": 151647,
        "audio_token_index": 151646,
        "image_token_index": 151655,
        "position_id_per_seconds": 25,
        "seconds_per_chunk": 2,
        "video_token_index": 151656,
        "vision_end_token_id": 151653,
        "vision_start_token_id": 151652,
    }
    thinker = {
        **ids,
        "audio_config": {**BOOKKEEPING, **audio},
        "bos_token_id": 151644,
        "eos_token_id": 151645,
        "ignore_index": -100,
        "init_std": 0.02,
        "model_type": "qwen2_5_omni_thinker",
        "pad_token_id": 151643,
        "text_config": {**BOOKKEEPING, **text},
        "user_token_id": 872,
        "vision_config": {**BOOKKEEPING, **vision},
        "vision_token_id": 151654,
    }
    talker = {
        **{k: v for k, v in text.items() if k not in ("model_type", "tie_word_embeddings")},
        **ids,
        "embedding_size": 3584,
        "head_dim": 128,
        "hidden_size": 896,
        "model_type": "qwen2_5_omni_talker",
        "num_attention_heads": 12,
        "num_hidden_layers": 24,
        "spatial_merge_size": 2,
        "tts_codec_end_token_id": 8294,
        "tts_codec_mask_token_id": 8296,
        "tts_codec_pad_token_id": 8292,
        "tts_codec_start_token_id": 8293,
        "tts_text_end_token_id": 151861,
        "tts_text_pad_token_id": 151859,
        "tts_text_start_token_id": 151860,
        "vocab_size": 8448,
    }
    dit = {
        "depth": 22,
        "dim": 1024,
        "dropout": 0.1,
        "emb_dim": 512,
        "enc_attention_channels": 64,
        "enc_channels": [256, 256, 256, 256, 768],
        "enc_dilations": [1, 2, 3, 4, 1],
        "enc_dim": 128,
        "enc_emb_dim": 192,
        "enc_global_context": True,
        "enc_kernel_sizes": [5, 3, 3, 3, 1],
        "enc_lin_neurons": 192,
        "enc_res2net_scale": 2,
        "enc_se_channels": 64,
        "ff_mult": 2,
        "head_dim": 64,
        "heads": 16,
        "mel_dim": 80,
        "model_type": "qwen2_5_omni_dit",
        "num_embeds": 8193,
        "repeats": 2,
        "torch_dtype": "float32",
    }
    bigvgan = {
        "mel_dim": 80,
        "model_type": "qwen2_5_omni_bigvgan",
        "resblock_dilation_sizes": [[1, 3, 5], [1, 3, 5], [1, 3, 5]],
        "resblock_kernel_sizes": [3, 7, 11],
        "upsample_initial_channel": 1536,
        "upsample_kernel_sizes": [11, 7, 4, 4, 4, 4],
        "upsample_rates": [5, 3, 2, 2, 2, 2],
        "use_bias_at_final": False,
    }
    wav = {"bigvgan_config": bigvgan, "dit_config": {**BOOKKEEPING, **dit}, "model_type": "qwen2_5_omni_token2wav"}
    return {
        "architectures": ["Qwen2_5OmniModel"],
        "enable_audio_output": True,
        "enable_talker": True,
        "model_type": "qwen2_5_omni",
        "talker_config": {**BOOKKEEPING, **talker},
        "thinker_config": {**BOOKKEEPING, **thinker},
        "token2wav_config": wav,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.50.0.dev0",
    }


def test_the_published_file_is_the_named_config() -> None:
    config = OmniConfig.from_dict(published_7b())
    assert config == OmniConfig.qwen2_5_omni_7b()
    dit = config.token2wav_config.dit_config  # what no published file holds
    assert (dit.block_size, dit.look_ahead_layers, dit.look_backward_layers, dit.rope_theta) == (
        24,
        (10,),
        (0, 20),
        1e4,
    )


def test_the_3b_differs_where_section_1_says_so() -> None:
    config = OmniConfig.qwen2_5_omni_3b()
    text, talker = config.thinker_config.text_config, config.talker_config
    assert (text.hidden_size, text.intermediate_size, text.num_hidden_layers, text.vocab_size) == (
        2048,
        11008,
        36,
        151936,
    )
    assert (text.num_attention_heads, text.num_key_value_heads, text.head_dim) == (16, 2, 128)
    assert (talker.num_attention_heads, talker.num_key_value_heads, talker.head_dim) == (14, 2, 64)
    assert (talker.hidden_size, talker.intermediate_size, talker.embedding_size) == (896, 4864, 2048)
    assert talker.rope_scaling.mrope_section == (16, 16, 0)
    assert config.token2wav_config == OmniConfig.qwen2_5_omni_7b().token2wav_config


@pytest.mark.parametrize("name", ["tiny", "qwen2_5_omni_3b", "qwen2_5_omni_7b"])
def test_written_and_read_back(name: str, tmp_path: Path) -> None:
    config = getattr(OmniConfig, name)()
    config.save(tmp_path)
    assert OmniConfig.load(tmp_path) == config


def test_both_spellings_of_the_dit_are_read() -> None:
    values = published_7b()
    dit = values["token2wav_config"]["dit_config"]
    assert OmniConfig.from_dict(values).token2wav_config.dit_config.num_hidden_layers == 22
    dit["depth"] = 7  # transformers' class would ignore this
    assert OmniConfig.from_dict(values).token2wav_config.dit_config.num_hidden_layers == 7
    dit["num_hidden_layers"] = 22
    with pytest.raises(ConfigError, match="num_hidden_layers is 22, but its other spelling gives 7"):
        OmniConfig.from_dict(values)


def changed(path: str, value: Any) -> dict[str, Any]:
    """The published file with one key changed."""
    values = json.loads(json.dumps(published_7b()))
    *above, last = path.split(".")
    place = values
    for name in above:
        place = place[name]
    place[last] = value
    return values


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("thinker_config.text_config.hiden_size", 1, "text_config: unknown key 'hiden_size' .*known: .*hidden_size"),
        ("thinker_config.text_config.hidden_act", "gelu", "hidden_act is 'gelu'; only 'silu' is supported"),
        ("thinker_config.text_config.tie_word_embeddings", True, "tie_word_embeddings is True"),
        ("thinker_config.text_config.use_sliding_window", True, "use_sliding_window is True"),
        ("thinker_config.text_config.num_key_value_heads", 3, "num_key_value_heads 3 does not divide .* 28"),
        ("thinker_config.text_config.rope_scaling.type", "yarn", "type is 'yarn'; only 'default'"),
        ("thinker_config.text_config.vocab_size", "many", "vocab_size is 'many'; it must be a whole number from 1"),
        ("thinker_config.text_config.vocab_size", 1.5, "vocab_size is 1.5; it must be a whole number from 1"),
        ("thinker_config.text_config.vocab_size", float("inf"), "vocab_size is inf; it must be a whole number from 1"),
        ("thinker_config.text_config.num_hidden_layers", -1, "num_hidden_layers is -1; it must be from 1"),
        ("thinker_config.text_config.rms_norm_eps", float("nan"), "rms_norm_eps is nan; it must be above 0"),
        (
            "thinker_config.vision_config.fullatt_block_indexes",
            ["a"],
            "indexes is 'a'; it must be a whole",
        ),
        ("thinker_config.vision_config.fullatt_block_indexes", 7, "fullatt_block_indexes must be a list, got 7"),
        ("enable_audio_output", "no", "enable_audio_output must be true or false, got 'no'"),
        ("model_type", "qwen2_5_vl", "model_type is 'qwen2_5_vl'; only 'qwen2_5_omni'"),
        ("model_type", "qwen2_5_omni_talker", "'qwen2_5_omni_thinker', a Thinker saved alone, can be read"),
        ("thinker_config.audio_config.output_dim", 1280, "output_dim is 1280, but text_config.hidden_size is 3584"),
        ("thinker_config.vision_config.embed_dim", 640, "is .*, but its other spelling gives"),
        ("thinker_config.vision_config", 3, "vision_config must be a section, got 3"),
        ("talker_config.embedding_size", 8, "embedding_size is 8, but the Thinker's hidden_size is 3584"),
        ("token2wav_config.bigvgan_config.use_bias_at_final", True, "use_bias_at_final is True"),
    ],
)
def test_a_wrong_file_names_the_key(path: str, value: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        OmniConfig.from_dict(changed(path, value))


@pytest.mark.parametrize("name", ["tiny", "qwen2_5_omni_3b", "qwen2_5_omni_7b"])
def test_both_spellings_of_the_rotary_embedding_are_read(name: str) -> None:
    config = getattr(OmniConfig, name)()
    values = as_transformers_5(config.to_dict())
    assert "rope_theta" not in values["thinker_config"]["text_config"]
    assert OmniConfig.from_dict(values) == config


def test_the_file_of_transformers_5() -> None:
    values = json.loads((CASES / "config_transformers_5.24.json").read_text())
    config = OmniConfig.from_dict(values)
    text = config.thinker_config.text_config
    assert (text.rope_theta, text.rope_scaling.mrope_section) == (1e6, (4, 6, 6))
    assert config.talker_config.rope_scaling.mrope_section == (2, 2, 2)
    assert config.token2wav_config.dit_config.rope_theta == 1e4
    # what is written is in the spelling of version 4, and equal
    assert OmniConfig.from_dict(config.to_dict()) == config
    assert "rope_parameters" not in json.dumps(config.to_dict())


def test_a_file_of_transformers_4_is_not_rewritten() -> None:
    values = published_7b()
    assert to_transformers_4(values) == values


@pytest.mark.parametrize("version", [4, 5])
def test_the_file_of_a_thinker_alone(version: int) -> None:
    values = json.loads((CASES / "config_thinker_only_4.57.json").read_text())
    config = OmniConfig.from_dict(values if version == 4 else as_transformers_5(values))
    whole = OmniConfig.from_dict(json.loads((CASES / "config_transformers_5.24.json").read_text()))
    assert config.thinker_config == whole.thinker_config
    assert not config.enable_audio_output


@pytest.mark.parametrize(
    ("rope", "message"),
    [
        (3, "rope_parameters must be a section, got 3"),
        ({"rope_type": "yarn", "factor": 4.0}, "rope_type is 'yarn'; only 'default' and 'axial'"),
        ({"rope_type": "default", "factor": 4.0}, "unknown key 'factor'"),
        ({"mrope_section": [16, 24, 24], "factor": 4.0}, "rope_scaling: unknown key 'factor'"),
        ({"mrope_section": [16, 24, 24], "rope_theta": 5e5}, "rope_theta is 1000000.0, but rope_parameters gives"),
    ],
)
def test_a_rotary_embedding_of_another_kind_is_refused(rope: Any, message: str) -> None:
    values = changed("thinker_config.text_config.rope_parameters", rope)
    del values["thinker_config"]["text_config"]["rope_scaling"]
    with pytest.raises(ConfigError, match=message):
        OmniConfig.from_dict(values)


def test_the_vision_encoder_has_one_base() -> None:
    rope = {"rope_type": "axial", "rope_theta": 5000.0}
    with pytest.raises(ConfigError, match=r"rope_theta is 5000\.0; only 10000\.0 is supported"):
        OmniConfig.from_dict(changed("thinker_config.vision_config.rope_parameters", rope))


def test_null_for_the_width_of_heads_means_the_usual() -> None:
    config = OmniConfig.from_dict(changed("thinker_config.text_config.head_dim", None))
    assert config == OmniConfig.qwen2_5_omni_7b()


def test_a_missing_key_is_named() -> None:
    values = published_7b()
    del values["thinker_config"]["text_config"]["hidden_size"]
    with pytest.raises(ConfigError, match="text_config: missing hidden_size"):
        OmniConfig.from_dict(values)


def test_a_missing_or_broken_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read .*config\.json"):
        OmniConfig.load(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"config\.json is not JSON"):
        OmniConfig.load(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ConfigError, match=r"config\.json must hold an object, got \[\]"):
        OmniConfig.load(tmp_path)


def test_sections_of_a_tmrope_must_fill_the_head() -> None:
    with pytest.raises(ConfigError, match=r"mrope_section \(1, 1, 1\) must add up to half of head_dim 12"):
        TextConfig.tiny(rope_scaling=RopeScaling((1, 1, 1)))


def test_configs_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        ThinkerConfig.tiny().pad_token_id = 1  # type: ignore[misc]

"""Every number that shapes the model, as frozen dataclasses, from and to the published ``config.json``.

Field names are the published keys, so that a reader can hold the two side by side. Reading is strict: each key of the
file is known here, or listed as deliberately ignored with the reason, or an error that names it. Writing gives back
a file that PyTorch's ``transformers`` builds the equal model from.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self, get_type_hints

from omni_jax.errors import ConfigError

# What every Hugging Face config may carry and, unless a section names it as a field, no part of this model reads:
# bookkeeping of the library that wrote the file, and text-generation defaults, which live in generation_config.json.
_LIBRARY_KEYS = frozenset(
    """
    _attn_implementation _attn_implementation_autoset _name_or_path add_cross_attention architectures
    attn_implementation bad_words_ids begin_suppress_tokens bos_token_id chunk_size_feed_forward
    cross_attention_hidden_size decoder_start_token_id diversity_penalty do_sample dtype early_stopping
    encoder_no_repeat_ngram_size eos_token_id exponential_decay_length_penalty finetuning_task forced_bos_token_id
    forced_eos_token_id id2label is_decoder is_encoder_decoder label2id length_penalty max_length min_length
    model_type no_repeat_ngram_size num_beam_groups num_beams num_return_sequences output_attentions
    output_hidden_states output_scores pad_token_id prefix problem_type pruned_heads remove_invalid_values
    repetition_penalty return_dict return_dict_in_generate sep_token_id suppress_tokens task_specific_params
    temperature tf_legacy_loss tie_encoder_decoder tie_word_embeddings tokenizer_class top_k top_p torch_dtype
    torchscript transformers_version typical_p use_bfloat16 use_cache
    """.split()
)
_TRAINING_KEYS = frozenset({"initializer_range", "init_std", "dropout", "attention_dropout", "activation_dropout"})


class _Section:
    """One section of ``config.json``: how its keys become fields and its fields keys."""

    MODEL_TYPE: ClassVar[str | None] = None
    ALIASES: ClassVar[Mapping[str, str]] = {}  # another spelling -> the field
    IGNORED: ClassVar[frozenset[str]] = frozenset()  # read by no part of the model
    FIXED: ClassVar[Mapping[str, Any]] = {}  # the model is only defined for this value

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], where: str = "config.json") -> Self:
        """Builds the section from its part of the file.

        Raises:
          ConfigError: for an unknown key, a missing one, two spellings that disagree, or a value that is not supported.
        """
        known = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
        types = get_type_hints(cls)
        given: dict[str, Any] = {}
        for key, value in values.items():
            name = cls.ALIASES.get(key, key)
            if key in cls.FIXED:
                if value not in (None, cls.FIXED[key]):
                    raise ConfigError(f"{where}: {key} is {value!r}; only {cls.FIXED[key]!r} is supported")
            elif name in known:
                value = _decode(types[name], value, f"{where}: {key}")
                if name in given and given[name] != value:
                    raise ConfigError(f"{where}: {key} is {value!r}, but its other spelling gives {given[name]!r}")
                given[name] = value
            elif key not in cls.IGNORED | _LIBRARY_KEYS | _TRAINING_KEYS:
                raise ConfigError(f"{where}: unknown key {key!r} (value {value!r}); known: {', '.join(sorted(known))}")
        missing = [
            n
            for n, f in known.items()
            if n not in given and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        ]
        if missing:
            raise ConfigError(f"{where}: missing {', '.join(missing)}")
        return cls(**given)

    def to_dict(self) -> dict[str, Any]:
        """The section as the published file spells it."""
        out: dict[str, Any] = {"model_type": self.MODEL_TYPE} if self.MODEL_TYPE else {}
        out.update(self.FIXED)
        for f in dataclasses.fields(self):  # type: ignore[arg-type]
            out[f.name] = _encode(getattr(self, f.name))
        return out


def _decode(kind: Any, value: Any, where: str) -> Any:
    if isinstance(kind, type) and issubclass(kind, _Section):
        if not isinstance(value, Mapping):
            raise ConfigError(f"{where} must be a section, got {value!r}")
        return kind.from_dict(value, where)
    if isinstance(value, list):
        return tuple(_decode(None, v, where) for v in value)
    if kind in (int, float) and (isinstance(value, bool) or not isinstance(value, int | float)):
        raise ConfigError(f"{where} must be a number, got {value!r}")
    if kind is float:
        return float(value)
    if kind is int and value != int(value):
        raise ConfigError(f"{where} must be a whole number, got {value!r}")
    return int(value) if kind is int else value


def _encode(value: Any) -> Any:
    if isinstance(value, _Section):
        return value.to_dict()
    return [_encode(v) for v in value] if isinstance(value, tuple) else value


def _divides(where: str, **sizes: int) -> None:
    """Raises ConfigError unless the second size divides the first."""
    (whole, n), (part, d) = sizes.items()
    if d <= 0 or n % d:
        raise ConfigError(f"{where}: {part} {d} does not divide {whole} {n}")


@dataclass(frozen=True)
class AudioEncoderConfig(_Section):
    """The audio tower (``Qwen2_5OmniAudioEncoder``): 2-second blocks of ``2 * n_window`` mel frames."""

    MODEL_TYPE = "qwen2_5_omni_audio_encoder"
    IGNORED = frozenset({"num_hidden_layers"})
    FIXED = {"activation_function": "gelu", "scale_embedding": False}

    d_model: int = 1280
    encoder_layers: int = 32
    encoder_attention_heads: int = 20
    encoder_ffn_dim: int = 5120
    num_mel_bins: int = 128
    max_source_positions: int = 1500
    n_window: int = 100
    output_dim: int = 3584

    def __post_init__(self) -> None:
        _divides("audio_config", d_model=self.d_model, encoder_attention_heads=self.encoder_attention_heads)

    @property
    def block_frames(self) -> int:
        """Mel frames in a block."""
        return 2 * self.n_window

    @property
    def block_tokens(self) -> int:
        """Tokens that a full block becomes."""
        return self.n_window // 2

    @classmethod
    def tiny(cls, **changes: Any) -> AudioEncoderConfig:
        sizes = dict(d_model=32, encoder_layers=2, encoder_attention_heads=4, encoder_ffn_dim=64, output_dim=48)
        return cls(**{**sizes, **changes})


@dataclass(frozen=True)
class VisionEncoderConfig(_Section):
    """The picture tower (``Qwen2_5OmniVisionEncoder``): windows of ``window_size`` pixels, some layers whole frames."""

    MODEL_TYPE = "qwen2_5_omni_vision_encoder"
    ALIASES = {"embed_dim": "hidden_size", "in_chans": "in_channels", "spatial_patch_size": "patch_size"}
    # tokens_per_second is the text side's position_id_per_seconds; the encoder does not read it
    IGNORED = frozenset({"tokens_per_second"})
    FIXED = {"hidden_act": "silu"}

    depth: int = 32
    hidden_size: int = 1280
    num_heads: int = 16
    intermediate_size: int = 3420
    in_channels: int = 3
    patch_size: int = 14
    temporal_patch_size: int = 2
    spatial_merge_size: int = 2
    window_size: int = 112
    fullatt_block_indexes: tuple[int, ...] = (7, 15, 23, 31)
    out_hidden_size: int = 3584

    def __post_init__(self) -> None:
        _divides("vision_config", hidden_size=self.hidden_size, num_heads=self.num_heads)
        _divides("vision_config", head_dim=self.hidden_size // self.num_heads, pairs_of_two_axes=4)
        _divides("vision_config", window_size=self.window_size, merged_patch=self.patch_size * self.spatial_merge_size)

    @property
    def patch_dim(self) -> int:
        """Numbers in one patch: channels x frames x height x width."""
        return self.in_channels * self.temporal_patch_size * self.patch_size**2

    @property
    def window_cells(self) -> int:
        """Side of a window in merged cells."""
        return self.window_size // self.patch_size // self.spatial_merge_size

    @classmethod
    def tiny(cls, **changes: Any) -> VisionEncoderConfig:
        sizes = dict(depth=3, hidden_size=32, num_heads=2, intermediate_size=40, out_hidden_size=48)
        return cls(**{**sizes, "fullatt_block_indexes": (1,), **changes})


@dataclass(frozen=True)
class RopeScaling(_Section):
    """``rope_scaling``: how the frequencies are shared out between time, height and width."""

    IGNORED = frozenset({"mrope_interleaved", "rope_theta"})
    FIXED = {"type": "default", "rope_type": "default"}

    mrope_section: tuple[int, ...] = (16, 24, 24)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], where: str = "rope_scaling") -> RopeScaling:
        # transformers before 4.46 wrote "mrope" where later releases write "default"
        plain = {k: "default" if v == "mrope" and k in ("type", "rope_type") else v for k, v in values.items()}
        return super().from_dict(plain, where)


@dataclass(frozen=True)
class DecoderConfig(_Section):
    """What the Thinker's language model and the Talker share: a Qwen2 decoder with grouped queries and TMRoPE."""

    # use_sliding_window is false in every published file; the other keys of the window are inert then
    IGNORED = frozenset({"sliding_window", "max_window_layers", "layer_types"})
    FIXED = {"hidden_act": "silu", "use_sliding_window": False, "tie_word_embeddings": False}

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    vocab_size: int
    head_dim: int = 0  # 0: hidden_size // num_attention_heads
    max_position_embeddings: int = 32768
    rms_norm_eps: float = 1e-6
    rope_theta: float = 1_000_000.0
    rope_scaling: RopeScaling = RopeScaling()

    def __post_init__(self) -> None:
        where = type(self).__name__
        if not self.head_dim:
            _divides(where, hidden_size=self.hidden_size, num_attention_heads=self.num_attention_heads)
            object.__setattr__(self, "head_dim", self.hidden_size // self.num_attention_heads)
        _divides(where, num_attention_heads=self.num_attention_heads, num_key_value_heads=self.num_key_value_heads)
        if 2 * sum(self.rope_scaling.mrope_section) != self.head_dim:
            sections = self.rope_scaling.mrope_section
            raise ConfigError(f"{where}: mrope_section {sections} must add up to half of head_dim {self.head_dim}")


@dataclass(frozen=True)
class TextConfig(DecoderConfig):
    """The Thinker's language model (``Qwen2_5OmniThinkerTextModel``)."""

    MODEL_TYPE = "qwen2_5_omni_text"

    @classmethod
    def tiny(cls, **changes: Any) -> TextConfig:
        sizes = dict(hidden_size=48, intermediate_size=80, num_hidden_layers=2, num_attention_heads=4)
        sizes |= dict(num_key_value_heads=2, head_dim=12, vocab_size=640)
        return cls(**{**sizes, "rope_scaling": RopeScaling(mrope_section=(2, 2, 2)), **changes})


@dataclass(frozen=True)
class _MediaIds(_Section):
    """Token ids and times that the Thinker and the Talker both carry."""

    audio_token_index: int = 151646
    image_token_index: int = 151655
    video_token_index: int = 151656
    audio_start_token_id: int = 151647
    audio_end_token_id: int = 151648
    vision_start_token_id: int = 151652
    vision_end_token_id: int = 151653
    position_id_per_seconds: int = 25
    seconds_per_chunk: int = 2


_TINY_MEDIA_IDS = dict(audio_token_index=515, audio_start_token_id=516, audio_end_token_id=517)
_TINY_MEDIA_IDS |= dict(
    vision_start_token_id=521, vision_end_token_id=522, image_token_index=524, video_token_index=525
)
_MEDIA_ALIASES = {f"{m}_token_id": f"{m}_token_index" for m in ("audio", "image", "video")}


@dataclass(frozen=True)
class ThinkerConfig(_MediaIds):
    """The part that hears, sees, reads and writes (``Qwen2_5OmniThinkerForConditionalGeneration``)."""

    MODEL_TYPE = "qwen2_5_omni_thinker"
    ALIASES = _MEDIA_ALIASES
    IGNORED = frozenset({"ignore_index"})  # the training loss's -100

    vision_token_id: int = 151654
    user_token_id: int = 872
    bos_token_id: int = 151644
    eos_token_id: int = 151645
    pad_token_id: int = 151643
    audio_config: AudioEncoderConfig = AudioEncoderConfig()
    vision_config: VisionEncoderConfig = VisionEncoderConfig()
    text_config: TextConfig = field(kw_only=True)

    @classmethod
    def tiny(cls, **changes: Any) -> ThinkerConfig:
        """Small enough for a test; the special tokens stand at 512 and after, in the published order."""
        sections = dict(text_config=TextConfig.tiny(), audio_config=AudioEncoderConfig.tiny())
        sections |= dict(vision_config=VisionEncoderConfig.tiny(), user_token_id=84)
        ids = dict(vision_token_id=523, bos_token_id=513, eos_token_id=514, pad_token_id=512)
        return cls(**{**_TINY_MEDIA_IDS, **sections, **ids, **changes})  # type: ignore[arg-type]

    def __post_init__(self) -> None:
        widths = {"audio_config.output_dim": self.audio_config.output_dim}
        widths["vision_config.out_hidden_size"] = self.vision_config.out_hidden_size
        for name, width in widths.items():
            if width != self.text_config.hidden_size:
                raise ConfigError(f"{name} is {width}, but text_config.hidden_size is {self.text_config.hidden_size}")

    @property
    def chunk_ids(self) -> int:
        """Position ids in one chunk of interleaved picture and sound."""
        return self.position_id_per_seconds * self.seconds_per_chunk


@dataclass(frozen=True)
class TalkerConfig(_MediaIds, DecoderConfig):
    """The part that speaks codes (``Qwen2_5OmniTalkerForConditionalGeneration``)."""

    MODEL_TYPE = "qwen2_5_omni_talker"
    ALIASES = _MEDIA_ALIASES

    embedding_size: int = field(kw_only=True)
    spatial_merge_size: int = 2
    tts_text_start_token_id: int = 151860
    tts_text_end_token_id: int = 151861
    tts_text_pad_token_id: int = 151859
    tts_codec_start_token_id: int = 8293
    tts_codec_end_token_id: int = 8294
    tts_codec_pad_token_id: int = 8292
    tts_codec_mask_token_id: int = 8296

    @classmethod
    def tiny(cls, **changes: Any) -> TalkerConfig:
        sizes: dict[str, Any] = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2)
        sizes |= dict(num_key_value_heads=1, head_dim=12, vocab_size=96, embedding_size=48, tts_text_start_token_id=601)
        sizes |= dict(tts_text_end_token_id=602, tts_text_pad_token_id=600, tts_codec_start_token_id=81)
        sizes |= dict(tts_codec_end_token_id=82, tts_codec_pad_token_id=80, tts_codec_mask_token_id=84)
        return cls(**{**_TINY_MEDIA_IDS, **sizes, "rope_scaling": RopeScaling(mrope_section=(2, 2, 2)), **changes})


@dataclass(frozen=True)
class DiTConfig(_Section):
    """The flow-matching transformer of Token2Wav with its speaker encoder (``Qwen2_5OmniToken2WavDiTModel``).

    The published file says ``dim``, ``depth`` and ``heads`` where transformers' class says ``hidden_size`` and so on
    and ignores the file; both spellings are read here. ``block_size`` and the two lists of layers are not in the file.
    """

    MODEL_TYPE = "qwen2_5_omni_dit"
    ALIASES = {"dim": "hidden_size", "depth": "num_hidden_layers", "heads": "num_attention_heads"}
    # both are in the published file and read by nothing: the pooling always takes the whole clip, the output is enc_dim
    IGNORED = frozenset({"enc_global_context", "enc_lin_neurons"})

    hidden_size: int = 1024
    num_hidden_layers: int = 22
    num_attention_heads: int = 16
    head_dim: int = 64
    ff_mult: int = 2
    emb_dim: int = 512
    num_embeds: int = 8193
    repeats: int = 2
    mel_dim: int = 80
    block_size: int = 24
    look_ahead_layers: tuple[int, ...] = (10,)
    look_backward_layers: tuple[int, ...] = (0, 20)
    rope_theta: float = 10_000.0
    max_position_embeddings: int = 32768
    enc_emb_dim: int = 192
    enc_dim: int = 128
    enc_channels: tuple[int, ...] = (256, 256, 256, 256, 768)
    enc_kernel_sizes: tuple[int, ...] = (5, 3, 3, 3, 1)
    enc_dilations: tuple[int, ...] = (1, 2, 3, 4, 1)
    enc_attention_channels: int = 64
    enc_res2net_scale: int = 2
    enc_se_channels: int = 64

    @classmethod
    def tiny(cls, **changes: Any) -> DiTConfig:
        sizes: dict[str, Any] = dict(
            hidden_size=32, num_hidden_layers=3, num_attention_heads=2, head_dim=16, emb_dim=16
        )
        sizes |= dict(num_embeds=65, look_ahead_layers=(1,), look_backward_layers=(0, 2), enc_emb_dim=12, enc_dim=8)
        sizes |= dict(enc_channels=(16, 16, 16, 16, 48), enc_attention_channels=8, enc_se_channels=8)
        return cls(**{**sizes, **changes})


@dataclass(frozen=True)
class BigVGANConfig(_Section):
    """The vocoder (``Qwen2_5OmniToken2WavBigVGANModel``): mel at 100 frames a second to samples at 24 kHz."""

    MODEL_TYPE = "qwen2_5_omni_bigvgan"
    FIXED = {"use_bias_at_final": False}

    mel_dim: int = 80
    upsample_initial_channel: int = 1536
    upsample_rates: tuple[int, ...] = (5, 3, 2, 2, 2, 2)
    upsample_kernel_sizes: tuple[int, ...] = (11, 7, 4, 4, 4, 4)
    resblock_kernel_sizes: tuple[int, ...] = (3, 7, 11)
    resblock_dilation_sizes: tuple[tuple[int, ...], ...] = ((1, 3, 5), (1, 3, 5), (1, 3, 5))

    @classmethod
    def tiny(cls, **changes: Any) -> BigVGANConfig:
        return cls(**{"upsample_initial_channel": 64, **changes})


@dataclass(frozen=True)
class Token2WavConfig(_Section):
    """Codes to sound (``Qwen2_5OmniToken2WavModel``)."""

    MODEL_TYPE = "qwen2_5_omni_token2wav"

    dit_config: DiTConfig = DiTConfig()
    bigvgan_config: BigVGANConfig = BigVGANConfig()

    @classmethod
    def tiny(cls, **changes: Any) -> Token2WavConfig:
        return cls(**{"dit_config": DiTConfig.tiny(), "bigvgan_config": BigVGANConfig.tiny(), **changes})


@dataclass(frozen=True)
class OmniConfig(_Section):
    """The whole model (``Qwen2_5OmniForConditionalGeneration``)."""

    MODEL_TYPE = "qwen2_5_omni"
    IGNORED = frozenset({"enable_talker"})  # read by no release of transformers

    thinker_config: ThinkerConfig
    talker_config: TalkerConfig
    token2wav_config: Token2WavConfig = Token2WavConfig()
    enable_audio_output: bool = True

    def __post_init__(self) -> None:
        width, text = self.talker_config.embedding_size, self.thinker_config.text_config.hidden_size
        if width != text:
            raise ConfigError(f"talker_config.embedding_size is {width}, but the Thinker's hidden_size is {text}")

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> OmniConfig:
        """Reads ``config.json`` of a checkpoint folder."""
        path = os.path.join(folder, "config.json")
        try:
            with open(path, encoding="utf-8") as f:
                values = json.load(f)
        except OSError as e:
            raise ConfigError(f"cannot read {path}: {e.strerror}") from e
        except json.JSONDecodeError as e:
            raise ConfigError(f"{path} is not JSON: {e}") from e
        return cls.from_dict(values, path)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Writes ``config.json`` as transformers reads it."""
        values = {"architectures": ["Qwen2_5OmniForConditionalGeneration"], **self.to_dict()}
        with open(os.path.join(folder, "config.json"), "w", encoding="utf-8") as f:
            json.dump(values, f, indent=2)

    @classmethod
    def tiny(cls, **changes: Any) -> OmniConfig:
        """Every part at a size for tests."""
        parts = dict(thinker_config=ThinkerConfig.tiny(), talker_config=TalkerConfig.tiny())
        return cls(**{**parts, "token2wav_config": Token2WavConfig.tiny(), **changes})  # type: ignore[arg-type]

    @classmethod
    def qwen2_5_omni_7b(cls) -> OmniConfig:
        """The published 7B."""
        text = TextConfig(3584, 18944, 28, 28, 4, 152064)
        talker = TalkerConfig(896, 18944, 24, 12, 4, 8448, head_dim=128, embedding_size=3584)
        return cls(ThinkerConfig(text_config=text), talker)

    @classmethod
    def qwen2_5_omni_3b(cls) -> OmniConfig:
        """The published 3B."""
        text = TextConfig(2048, 11008, 36, 16, 2, 151936)
        rope = RopeScaling(mrope_section=(16, 16, 0))  # the width of a picture is not told to this Talker
        talker = TalkerConfig(896, 4864, 24, 14, 2, 8448, head_dim=64, rope_scaling=rope, embedding_size=2048)
        audio, vision = AudioEncoderConfig(output_dim=2048), VisionEncoderConfig(out_hidden_size=2048)
        return cls(ThinkerConfig(audio_config=audio, vision_config=vision, text_config=text), talker)

"""Every size and id that shapes the model, as frozen dataclasses, from and to the published ``config.json``.

Field names are the published keys, so that a reader can hold the two side by side. ``config_file`` reads and writes
them; what is written, PyTorch's ``transformers`` builds the equal model from.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from omni_jax.checks import shown
from omni_jax.config_file import (
    CONFIG_FILE,
    MAX_ITEMS,
    ConfigSection,
    check_divides,
    check_lengths,
    read_config_file,
    to_transformers_4,
    write_config_file,
)
from omni_jax.errors import ConfigError

# what transformers calls the whole model and the Thinker alone, the "architectures" of config.json
MODEL_CLASS = "Qwen2_5OmniForConditionalGeneration"
THINKER_CLASS = "Qwen2_5OmniThinkerForConditionalGeneration"


@dataclass(frozen=True)
class AudioEncoderConfig(ConfigSection):
    """The audio encoder (``Qwen2_5OmniAudioEncoder``): attention in 2-second blocks, ``2 * n_window`` frames."""

    MODEL_TYPE = "qwen2_5_omni_audio_encoder"
    IGNORED = frozenset({"num_hidden_layers"})
    FIXED = {"activation_function": "gelu", "scale_embedding": False}

    d_model: int = 1280
    encoder_layers: int = 32
    encoder_attention_heads: int = 20
    encoder_ffn_dim: int = 5120
    num_mel_bins: int = 128
    max_source_positions: int = 1500  # rows of the sinusoidal position table; a block uses the first n_window
    n_window: int = 100  # half a block, in mel frames of 10 ms
    output_dim: int = 3584  # the Thinker's hidden_size

    def __post_init__(self) -> None:
        check_divides("audio_config", "encoder_attention_heads", self.encoder_attention_heads, "d_model", self.d_model)

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
class VisionEncoderConfig(ConfigSection):
    """The vision encoder (``Qwen2_5OmniVisionEncoder``): attention in windows of ``window_size`` pixels; in the layers
    ``fullatt_block_indexes`` it spans whole frames."""

    MODEL_TYPE = "qwen2_5_omni_vision_encoder"
    ALIASES = {"embed_dim": "hidden_size", "in_chans": "in_channels", "spatial_patch_size": "patch_size"}
    # tokens_per_second is the text side's position_id_per_seconds; the encoder does not read it
    IGNORED = frozenset({"tokens_per_second"})
    # the base of its rotary embedding: transformers 5 writes it, 4 has it in code
    FIXED = {"hidden_act": "silu", "rope_theta": 10_000.0}

    depth: int = 32
    hidden_size: int = 1280
    num_heads: int = 16
    intermediate_size: int = 3420
    in_channels: int = 3
    patch_size: int = 14  # pixels
    temporal_patch_size: int = 2  # frames
    spatial_merge_size: int = 2  # patches a side that become one token
    window_size: int = 112  # pixels a side
    fullatt_block_indexes: tuple[int, ...] = (7, 15, 23, 31)
    out_hidden_size: int = 3584  # the Thinker's hidden_size

    def __post_init__(self) -> None:
        where = "vision_config"
        check_divides(where, "num_heads", self.num_heads, "hidden_size", self.hidden_size)
        # rotary pairs for two axes, height and width
        check_divides(where, "2 axes x 2 =", 4, "the width of a head,", self.hidden_size // self.num_heads)
        merged_patch = self.patch_size * self.spatial_merge_size
        check_divides(where, "patch_size x spatial_merge_size =", merged_patch, "window_size", self.window_size)

    @property
    def patch_dim(self) -> int:
        """Values in one patch: channels x frames x height x width."""
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
class RopeScaling(ConfigSection):
    """``rope_scaling``: how many rotary frequencies rotate by time, by height and by width (docs/reference.md, 6)."""

    IGNORED = frozenset({"mrope_interleaved", "rope_theta"})
    FIXED = {"type": "default", "rope_type": "default"}

    mrope_section: tuple[int, ...] = (16, 24, 24)  # pairs of a head's channels for time, height, width

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], where: str = "rope_scaling") -> Self:
        renamed = dict(values)
        for key in ("type", "rope_type"):
            # transformers before 4.46 wrote "mrope" where later releases write "default"
            if renamed.get(key) == "mrope":
                renamed[key] = "default"
        return super().from_dict(renamed, where)


@dataclass(frozen=True)
class DecoderConfig(ConfigSection):
    """What the Thinker's language model and the Talker share: a Qwen2 decoder with grouped queries and TMRoPE."""

    # use_sliding_window is false in every published file; the other keys of the window are inert then
    IGNORED = frozenset({"sliding_window", "max_window_layers", "layer_types"})
    FIXED = {"hidden_act": "silu", "use_sliding_window": False, "tie_word_embeddings": False}

    hidden_size: int
    intermediate_size: int  # of the MLP
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    vocab_size: int
    head_dim: int = 0  # 0: hidden_size // num_attention_heads
    max_position_embeddings: int = 32768  # the context, prompt and reply together
    rms_norm_eps: float = 1e-6
    rope_theta: float = 1_000_000.0
    rope_scaling: RopeScaling = RopeScaling()

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], where: str = CONFIG_FILE) -> Self:
        # null, as Hugging Face configurations have it where the width follows from hidden_size
        values = dict(values)
        if values.get("head_dim") is None:
            values.pop("head_dim", None)
        return super().from_dict(values, where)

    def __post_init__(self) -> None:
        where = type(self).__name__
        # the Talker of the 7B has heads of its own width, 12 x 128 over a hidden size of 896
        if not self.head_dim:
            check_divides(where, "num_attention_heads", self.num_attention_heads, "hidden_size", self.hidden_size)
            object.__setattr__(self, "head_dim", self.hidden_size // self.num_attention_heads)
        # query heads are shared out evenly among the key heads
        queries = self.num_attention_heads
        check_divides(where, "num_key_value_heads", self.num_key_value_heads, "num_attention_heads", queries)
        # a frequency rotates a pair of a head's channels
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
class _MediaIds(ConfigSection):
    """Token ids and times that the Thinker and the Talker both carry."""

    # the placeholders of features, one for each
    audio_token_index: int = 151646
    image_token_index: int = 151655
    video_token_index: int = 151656
    # around the placeholders of a medium
    audio_start_token_id: int = 151647
    audio_end_token_id: int = 151648
    vision_start_token_id: int = 151652
    vision_end_token_id: int = 151653
    position_id_per_seconds: int = 25  # position ids along the time axis in a second
    seconds_per_chunk: int = 2  # sound and frames of a video alternate in chunks of this length


_TINY_MEDIA_IDS = dict(audio_token_index=515, audio_start_token_id=516, audio_end_token_id=517)
_TINY_MEDIA_IDS |= dict(
    vision_start_token_id=521, vision_end_token_id=522, image_token_index=524, video_token_index=525
)
# both spellings are in published files, of different releases
_MEDIA_ALIASES = {f"{m}_token_id": f"{m}_token_index" for m in ("audio", "image", "video")}


@dataclass(frozen=True)
class ThinkerConfig(_MediaIds):
    """The Thinker (``Qwen2_5OmniThinkerForConditionalGeneration``): text, sound and pictures in, text out."""

    MODEL_TYPE = "qwen2_5_omni_thinker"
    ALIASES = _MEDIA_ALIASES
    IGNORED = frozenset({"ignore_index"})  # the training loss's -100

    vision_token_id: int = 151654
    user_token_id: int = 872  # the token "user" in a message's header
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
    """The Talker (``Qwen2_5OmniTalkerForConditionalGeneration``): the Thinker's reply in, codec tokens out."""

    MODEL_TYPE = "qwen2_5_omni_talker"
    ALIASES = _MEDIA_ALIASES

    embedding_size: int = field(kw_only=True)  # width of its inputs, the Thinker's hidden_size
    spatial_merge_size: int = 2
    # ids of the Thinker's vocabulary: what the Talker is conditioned on where there is no text
    tts_text_start_token_id: int = 151860
    tts_text_end_token_id: int = 151861
    tts_text_pad_token_id: int = 151859
    # ids of the Talker's own vocabulary, after the codes
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
class DiTConfig(ConfigSection):
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
    ff_mult: int = 2  # width of the MLP over hidden_size
    emb_dim: int = 512  # of a code
    num_embeds: int = 8193  # one less than the table's rows
    repeats: int = 2  # mel frames of a code
    mel_dim: int = 80
    block_size: int = 24  # mel frames; attention reaches whole blocks
    look_ahead_layers: tuple[int, ...] = (10,)  # that also attend to the block after
    look_backward_layers: tuple[int, ...] = (0, 20)  # that also attend to the block before
    rope_theta: float = 10_000.0
    max_position_embeddings: int = 32768
    enc_emb_dim: int = 192  # of a voice's speaker vector
    enc_dim: int = 128  # of the speaker encoder's output
    enc_channels: tuple[int, ...] = (256, 256, 256, 256, 768)  # the last block takes the three before it side by side
    enc_kernel_sizes: tuple[int, ...] = (5, 3, 3, 3, 1)
    enc_dilations: tuple[int, ...] = (1, 2, 3, 4, 1)
    enc_attention_channels: int = 64
    enc_res2net_scale: int = 2  # parts that a block's channels are split into
    enc_se_channels: int = 64

    def __post_init__(self) -> None:
        where = "dit_config"
        channels = self.enc_channels
        lists = {"enc_channels": channels, "enc_kernel_sizes": self.enc_kernel_sizes}
        check_lengths(where, {**lists, "enc_dilations": self.enc_dilations}, 3)
        # what a block gives is added to what it was given; the last item is of all blocks side by side
        if len(set(channels[:-1])) > 1 or sum(channels[1:-1]) != channels[-1]:
            raise ConfigError(
                f"{where}: enc_channels {channels} must be equal, and the last one the sum of the blocks'"
            )
        check_divides(where, "enc_res2net_scale", self.enc_res2net_scale, "enc_channels", channels[0])

    @classmethod
    def tiny(cls, **changes: Any) -> DiTConfig:
        sizes: dict[str, Any] = dict(
            hidden_size=32, num_hidden_layers=3, num_attention_heads=2, head_dim=16, emb_dim=16
        )
        sizes |= dict(num_embeds=65, look_ahead_layers=(1,), look_backward_layers=(0, 2), enc_emb_dim=12, enc_dim=8)
        sizes |= dict(enc_channels=(16, 16, 16, 16, 48), enc_attention_channels=8, enc_se_channels=8)
        return cls(**{**sizes, **changes})


@dataclass(frozen=True)
class BigVGANConfig(ConfigSection):
    """The vocoder (``Qwen2_5OmniToken2WavBigVGANModel``): mel at 100 frames a second to samples at 24 kHz."""

    MODEL_TYPE = "qwen2_5_omni_bigvgan"
    FIXED = {"use_bias_at_final": False}

    mel_dim: int = 80
    upsample_initial_channel: int = 1536  # halved by each stage
    upsample_rates: tuple[int, ...] = (5, 3, 2, 2, 2, 2)  # their product is the samples of a mel frame
    upsample_kernel_sizes: tuple[int, ...] = (11, 7, 4, 4, 4, 4)
    resblock_kernel_sizes: tuple[int, ...] = (3, 7, 11)  # of each stage's residual blocks, whose mean it takes
    resblock_dilation_sizes: tuple[tuple[int, ...], ...] = ((1, 3, 5), (1, 3, 5), (1, 3, 5))

    def __post_init__(self) -> None:
        where = "bigvgan_config"
        rates, kernels = self.upsample_rates, self.upsample_kernel_sizes
        check_lengths(where, {"upsample_rates": rates, "upsample_kernel_sizes": kernels})
        dilations = self.resblock_dilation_sizes
        lists = {"resblock_kernel_sizes": self.resblock_kernel_sizes, "resblock_dilation_sizes": dilations}
        check_lengths(where, lists)
        for number, items in enumerate(dilations):
            check_lengths(where, {f"resblock_dilation_sizes[{number}]": items})
        halves = 2 ** len(rates)
        check_divides(
            where, "2 to the number of stages,", halves, "upsample_initial_channel", self.upsample_initial_channel
        )
        # each of them is two convolutions in each stage
        num_rounds = sum(map(len, dilations))
        if num_rounds > MAX_ITEMS:
            raise ConfigError(f"{where}: resblock_dilation_sizes has {num_rounds} items; it may have {MAX_ITEMS}")

    @classmethod
    def tiny(cls, **changes: Any) -> BigVGANConfig:
        """Two stages of a block each: a program of the published six takes a CPU five seconds to compile."""
        sizes: dict[str, Any] = dict(upsample_initial_channel=16, upsample_rates=(16, 15))
        sizes |= dict(upsample_kernel_sizes=(32, 31), resblock_kernel_sizes=(3,))
        return cls(**{**sizes, "resblock_dilation_sizes": ((1, 3, 5),), **changes})


@dataclass(frozen=True)
class Token2WavConfig(ConfigSection):
    """Token2Wav (``Qwen2_5OmniToken2WavModel``): codec tokens in, sound out."""

    MODEL_TYPE = "qwen2_5_omni_token2wav"

    dit_config: DiTConfig = DiTConfig()
    bigvgan_config: BigVGANConfig = BigVGANConfig()

    @classmethod
    def tiny(cls, **changes: Any) -> Token2WavConfig:
        return cls(**{"dit_config": DiTConfig.tiny(), "bigvgan_config": BigVGANConfig.tiny(), **changes})


@dataclass(frozen=True)
class OmniConfig(ConfigSection):
    """The whole model (``Qwen2_5OmniForConditionalGeneration``)."""

    MODEL_TYPE = "qwen2_5_omni"
    IGNORED = frozenset({"enable_talker"})  # read by no release of transformers

    thinker_config: ThinkerConfig
    talker_config: TalkerConfig
    token2wav_config: Token2WavConfig = Token2WavConfig()
    enable_audio_output: bool = True

    def __post_init__(self) -> None:
        # the Talker is given what the Thinker computes, in the Thinker's width
        talker_width = self.talker_config.embedding_size
        thinker_width = self.thinker_config.text_config.hidden_size
        if talker_width != thinker_width:
            raise ConfigError(
                f"talker_config.embedding_size is {talker_width}, but the Thinker's hidden_size is {thinker_width}"
            )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], where: str = CONFIG_FILE) -> OmniConfig:
        """Builds the configuration from the contents of ``config.json`` of either transformers release.

        The file of a Thinker that was saved alone describes no Talker. As in transformers, the sections of Talker and
        Token2Wav are the published 7B's then, and ``enable_audio_output`` is false: the model has neither.

        Raises:
          ConfigError: as ``ConfigSection.from_dict``, and if the file describes another model.
        """
        values = to_transformers_4(values, where)
        model_type = values.get("model_type") or cls.MODEL_TYPE
        if model_type == ThinkerConfig.MODEL_TYPE:
            return cls._from_thinker(ThinkerConfig.from_dict(values, where))
        if model_type != cls.MODEL_TYPE:
            raise ConfigError(
                f"{where}: model_type is {shown(model_type)}; only {cls.MODEL_TYPE!r}, the whole model, and "
                f"{ThinkerConfig.MODEL_TYPE!r}, a Thinker saved alone, can be read"
            )
        return super().from_dict(values, where)

    @classmethod
    def _from_thinker(cls, thinker: ThinkerConfig) -> OmniConfig:
        # sections that no part will be made from, but every configuration has; their widths must agree
        talker = dataclasses.replace(
            cls.qwen2_5_omni_7b().talker_config, embedding_size=thinker.text_config.hidden_size
        )
        return cls(thinker, talker, enable_audio_output=False)

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> OmniConfig:
        """Reads ``config.json`` of a checkpoint folder.

        Raises:
          ConfigError: if the file cannot be read, or ``from_dict`` refuses it.
        """
        path = Path(folder)
        return cls.from_dict(read_config_file(path), str(path / CONFIG_FILE))

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Writes ``config.json`` as transformers reads it."""
        write_config_file(Path(folder), {"architectures": [MODEL_CLASS], **self.to_dict()})

    @classmethod
    def tiny(cls, **changes: Any) -> OmniConfig:
        """Every part at a size for tests."""
        parts = dict(thinker_config=ThinkerConfig.tiny(), talker_config=TalkerConfig.tiny())
        return cls(**{**parts, "token2wav_config": Token2WavConfig.tiny(), **changes})  # type: ignore[arg-type]

    @classmethod
    def qwen2_5_omni_7b(cls) -> OmniConfig:
        """The published 7B."""
        # hidden size, MLP, layers, query heads, key heads, vocabulary
        text = TextConfig(3584, 18944, 28, 28, 4, 152064)
        talker = TalkerConfig(896, 18944, 24, 12, 4, 8448, head_dim=128, embedding_size=3584)
        return cls(ThinkerConfig(text_config=text), talker)

    @classmethod
    def qwen2_5_omni_3b(cls) -> OmniConfig:
        """The published 3B."""
        text = TextConfig(2048, 11008, 36, 16, 2, 151936)
        rope = RopeScaling(mrope_section=(16, 16, 0))  # no frequency of this Talker rotates by the width of a picture
        talker = TalkerConfig(896, 4864, 24, 14, 2, 8448, head_dim=64, rope_scaling=rope, embedding_size=2048)
        audio = AudioEncoderConfig(output_dim=2048)
        vision = VisionEncoderConfig(out_hidden_size=2048)
        return cls(ThinkerConfig(audio_config=audio, vision_config=vision, text_config=text), talker)

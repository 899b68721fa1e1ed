"""The one table of names: every leaf of our parameter tree beside the published tensors it is made of.

Both directions of a conversion, the checks of a file, the parameter counts and the random checkpoints of the tests
read this table and nothing else. A layout is data, not code: a tensor is reshaped to ``split`` (same values, same
order) and its axes are permuted by ``order``; the way back undoes the two. What that does to each kind of tensor:

===================  ======================  ==================================
kind                 published (PyTorch)     here (JAX)
===================  ======================  ==================================
Linear               [out, in]               [in, out]
query, key, value    [N*H, D], bias [N*H]    [D, N, H], bias [N, H]
attention's output   [D, N*H]                [N, H, D]
Conv1d               [out, in, k]            [k, in, out]
ConvTranspose1d      [in, out, k]            [k, in, out], not flipped
Conv3d of patches    [D, C, t, h, w]         [C*t*h*w, D]
norm, bias           as it is                as it is
embedding            as it is                as it is
===================  ======================  ==================================

N is the number of heads, H the width of one, D the width of the model, k the width of a kernel, C channels.

A transposed convolution's kernel is kept in PyTorch's order of time; ``jax.lax.conv_transpose`` wants it flipped along
k (or ``transpose_kernel=True`` with the two channel axes exchanged).

Layers of one shape are stacked on a leading axis, so such a leaf has as many names as there are layers. The shapes
come from the configuration; the names are those of the published files (docs/reference.md, 3, 4, 6, 7.5 and 9).
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from omni_jax.config import (
    AudioEncoderConfig,
    BigVGANConfig,
    DecoderConfig,
    DiTConfig,
    OmniConfig,
    TalkerConfig,
    ThinkerConfig,
    Token2WavConfig,
    VisionEncoderConfig,
)

COMPONENTS = ("thinker", "talker", "token2wav")

# transformers 5 keeps the Thinker's encoders and its text model one level deeper in memory than the published files do
_IN_MEMORY = re.compile(r"^thinker\.model\.(language_model|audio_tower|visual)\.")
_PUBLISHED = {"language_model": "thinker.model.", "audio_tower": "thinker.audio_tower.", "visual": "thinker.visual."}

_MAX_LISTED = 20  # names that a message lists of each kind of trouble
_MAX_LINE = 500  # characters of one

# constants of the reference that no file holds
_TIME_FREQUENCIES = 256  # width of the DiT's sinusoidal embedding of time
_VOCODER_KERNEL = 7  # of the vocoder's first and last convolution


@dataclass(frozen=True)
class Entry:
    """One leaf of the parameter tree.

    Attributes:
      path: where the leaf stands, from the component down.
      names: the published tensors it holds: one for each layer where it is stacked, else a single one.
      shape: the published shape of each of them.
      split: ``shape`` with heads on an axis of their own, or kernel axes merged: the same values in the same order.
      order: which axis of ``split`` becomes the leaf's axis 0, 1, ...
      stacked: whether the leaf has a leading axis of layers.
    """

    path: tuple[str, ...]
    names: tuple[str, ...]
    shape: tuple[int, ...]
    split: tuple[int, ...]
    order: tuple[int, ...]
    stacked: bool = False

    @property
    def component(self) -> str:
        """Which of COMPONENTS the leaf belongs to."""
        return self.path[0]

    @property
    def leaf_shape(self) -> tuple[int, ...]:
        """Shape of the leaf, with the axis of layers where there is one."""
        layer_shape = tuple(self.split[axis] for axis in self.order)
        return (len(self.names), *layer_shape) if self.stacked else layer_shape

    @property
    def size(self) -> int:
        """Parameters in the leaf."""
        return math.prod(self.shape) * len(self.names)

    def to_jax(self, tensor: np.ndarray) -> np.ndarray:
        """A published tensor (``shape``) as the leaf, or one layer of it, holds it. A view where that is possible."""
        return tensor.reshape(self.split).transpose(self.order)

    def to_torch(self, leaf: np.ndarray) -> np.ndarray:
        """What ``to_jax`` was given, from the leaf or one layer of it."""
        return leaf.transpose(np.argsort(self.order)).reshape(self.shape)


def make_name_table(config: OmniConfig, components: Iterable[str] = COMPONENTS) -> tuple[Entry, ...]:
    """The entries of ``components``, in the order of the published files' modules.

    Raises:
      ValueError: for a name that is not in COMPONENTS.
    """
    entries: list[Entry] = []
    for component in components:
        match component:
            case "thinker":
                part = _map_thinker(config.thinker_config)
            case "talker":
                part = _map_talker(config.talker_config)
            case "token2wav":
                part = _map_token2wav(config.token2wav_config)
            case _:
                raise ValueError(f"{component!r} is no component; there are {', '.join(COMPONENTS)}")
        entries += _move_under(component, component, part)
    return tuple(entries)


def optional_constants(config: OmniConfig) -> dict[str, tuple[int, ...]]:
    """Tensors that a file may carry and that are no parameters: name to shape.

    The published files hold the frequencies of the DiT's rotary embedding. Transformers 4 reads them from the files,
    transformers 5 computes them and does not save them.
    """
    dit = config.token2wav_config.dit_config
    return {"token2wav.code2wav_dit_model.rotary_embed.inv_freq": (dit.head_dim // 2,)}


def make_constants(config: OmniConfig) -> dict[str, np.ndarray]:
    """The values of ``optional_constants`` in float32, as PyTorch computes them (docs/reference.md, 8.4)."""
    base = config.token2wav_config.dit_config.rope_theta
    constants = {}
    for name, (count,) in optional_constants(config).items():
        exponents = np.arange(count, dtype=np.float64) / count
        constants[name] = (base**-exponents).astype(np.float32)
    return constants


def published_name(name: str, component: str | None = None) -> str:
    """The published spelling of a name in either scheme (docs/reference.md, 6: transformers 5 has another in memory).

    Args:
      name: as a file has it.
      component: the part of the model that the file holds alone. Its names begin with the part's own in some releases
        of transformers, and lack it in others.
    """
    if component is not None and not name.startswith(f"{component}."):
        name = f"{component}.{name}"
    return _IN_MEMORY.sub(lambda match: _PUBLISHED[match.group(1)], name)


def parameter_count(config: OmniConfig, under: tuple[str, ...] = ()) -> int:
    """Parameters of the model, or of the leaves whose path begins with ``under``, from the shapes alone."""
    total = 0
    for entry in make_name_table(config):
        if entry.path[: len(under)] == under:
            total += entry.size
    return total


class Shaped(Protocol):
    """Anything with a shape: a tensor of a file, an array, an abstract array."""

    @property
    def shape(self) -> tuple[int, ...]: ...


def describe_differences(expected: Mapping[str, tuple[int, ...]], found: Mapping[str, Shaped]) -> str:
    """What is missing in ``found``, what is unexpected and what has another shape, in one text; empty if nothing is.

    Args:
      expected: name to shape, for every tensor that must be there.
      found: name to tensor, for every tensor that is.
    """
    unexpected = [name for name in found if name not in expected]
    missing = []
    reshaped = []
    for name, shape in expected.items():
        if name not in found:
            missing.append(name)
        elif tuple(found[name].shape) != shape:
            reshaped.append(f"{name}: config.json makes it {list(shape)}, found {list(found[name].shape)}")
    text = describe_list("missing", missing)
    text += describe_list("unexpected", unexpected)
    return text + describe_list("of another shape", reshaped)


def describe_list(heading: str, lines: list[str]) -> str:
    """``lines`` under a heading with their count; the first twenty, then how many more. Empty for none."""
    if not lines:
        return ""
    text = f"\n  {len(lines)} {heading}:"
    for line in lines[:_MAX_LISTED]:
        # a name of a file may be as long as the file
        text += f"\n    {line if len(line) <= _MAX_LINE else line[:_MAX_LINE] + '...'}"
    if len(lines) > _MAX_LISTED:
        text += f"\n    ... and {len(lines) - _MAX_LISTED} more"
    return text


# What the model is made of. A path is written with slashes, a name with dots; every helper returns a list of entries.


def _make_entry(
    path: str,
    name: str,
    shape: tuple[int, ...],
    order: tuple[int, ...] | None = None,
    split: tuple[int, ...] | None = None,
) -> Entry:
    split = split or shape
    return Entry(tuple(path.split("/")), (name,), shape, split, order or tuple(range(len(split))))


def _move_under(path: str, name: str, entries: Iterable[Entry]) -> list[Entry]:
    """``entries`` moved into a module of ours at ``path`` and of the published one at ``name``."""
    parent = tuple(path.split("/"))
    moved = []
    for entry in entries:
        names = tuple(f"{name}.{rest}" for rest in entry.names)
        moved.append(dataclasses.replace(entry, path=parent + entry.path, names=names))
    return moved


def _stack_layers(path: str, name: str, count: int, layer: Iterable[Entry]) -> list[Entry]:
    """``count`` layers ``name.0``, ``name.1``, ... in the leaves of one."""
    parent = tuple(path.split("/"))
    stacked = []
    for entry in layer:
        (rest,) = entry.names
        names = tuple(f"{name}.{i}.{rest}" for i in range(count))
        stacked.append(dataclasses.replace(entry, path=parent + entry.path, names=names, stacked=True))
    return stacked


def _map_bias(path: str, name: str, width: int) -> Entry:
    return _make_entry(f"{path}/bias", f"{name}.bias", (width,))


def _map_norm(path: str, name: str, width: int, bias: bool = False) -> list[Entry]:
    scale = _make_entry(f"{path}/scale", f"{name}.weight", (width,))
    return [scale, _map_bias(path, name, width)] if bias else [scale]


def _map_embedding(path: str, name: str, rows: int, width: int) -> list[Entry]:
    return [_make_entry(f"{path}/embedding", f"{name}.weight", (rows, width))]


def _map_linear(path: str, name: str, inputs: int, outputs: int, bias: bool = True) -> list[Entry]:
    kernel = _make_entry(f"{path}/kernel", f"{name}.weight", (outputs, inputs), (1, 0))  # [in, out]
    return [kernel, _map_bias(path, name, outputs)] if bias else [kernel]


def _map_to_heads(path: str, name: str, width: int, heads: tuple[int, int], bias: bool = True) -> list[Entry]:
    """A projection from ``width`` to ``heads`` = (number of heads N, width of one H)."""
    n, h = heads
    # [N*H, D] -> [N, H, D] -> [D, N, H]: the heads lie one after the other along PyTorch's first axis
    kernel = _make_entry(f"{path}/kernel", f"{name}.weight", (n * h, width), (2, 0, 1), (n, h, width))
    return [kernel, _make_entry(f"{path}/bias", f"{name}.bias", (n * h,), split=heads)] if bias else [kernel]


def _map_from_heads(path: str, name: str, heads: tuple[int, int], width: int, bias: bool = True) -> list[Entry]:
    n, h = heads
    # [D, N*H] -> [D, N, H] -> [N, H, D]
    kernel = _make_entry(f"{path}/kernel", f"{name}.weight", (width, n * h), (1, 2, 0), (width, n, h))
    return [kernel, _map_bias(path, name, width)] if bias else [kernel]


def _map_conv(path: str, name: str, inputs: int, outputs: int, width: int, bias: bool = True) -> list[Entry]:
    # [out, in, k] -> [k, in, out]
    kernel = _make_entry(f"{path}/kernel", f"{name}.weight", (outputs, inputs, width), (2, 1, 0))
    return [kernel, _map_bias(path, name, outputs)] if bias else [kernel]


def _map_transposed_conv(path: str, name: str, inputs: int, outputs: int, width: int) -> list[Entry]:
    return [
        # [in, out, k] -> [k, in, out]
        _make_entry(f"{path}/kernel", f"{name}.weight", (inputs, outputs, width), (2, 0, 1)),
        _map_bias(path, name, outputs),
    ]


def _map_thinker(config: ThinkerConfig) -> list[Entry]:
    text = config.text_config
    return [
        *_move_under("audio_encoder", "audio_tower", _map_audio_encoder(config.audio_config)),
        *_move_under("vision_encoder", "visual", _map_vision_encoder(config.vision_config)),
        *_move_under("decoder", "model", _map_decoder(text, text.hidden_size)),
        *_map_linear("decoder/head", "lm_head", text.hidden_size, text.vocab_size, bias=False),
    ]


def _map_talker(config: TalkerConfig) -> list[Entry]:
    """Codec embeddings are as wide as the Thinker's: the two are added before the projection."""
    return [
        *_map_linear("proj", "thinker_to_talker_proj", config.embedding_size, config.hidden_size),
        *_move_under("decoder", "model", _map_decoder(config, config.embedding_size)),
        *_map_linear("decoder/head", "codec_head", config.hidden_size, config.vocab_size, bias=False),
    ]


def _map_decoder(config: DecoderConfig, embedding_width: int) -> list[Entry]:
    """A Qwen2 decoder without its head (docs/reference.md, 6)."""
    width = config.hidden_size
    hidden = config.intermediate_size
    heads = (config.num_attention_heads, config.head_dim)
    key_heads = (config.num_key_value_heads, config.head_dim)
    layer = [
        *_map_norm("attention_norm", "input_layernorm", width),
        *_map_to_heads("attention/query", "self_attn.q_proj", width, heads),
        *_map_to_heads("attention/key", "self_attn.k_proj", width, key_heads),
        *_map_to_heads("attention/value", "self_attn.v_proj", width, key_heads),
        *_map_from_heads("attention/out", "self_attn.o_proj", heads, width, bias=False),
        *_map_norm("mlp_norm", "post_attention_layernorm", width),
        *_map_linear("mlp/gate", "mlp.gate_proj", width, hidden, bias=False),
        *_map_linear("mlp/up", "mlp.up_proj", width, hidden, bias=False),
        *_map_linear("mlp/down", "mlp.down_proj", hidden, width, bias=False),
    ]
    return [
        *_map_embedding("embed", "embed_tokens", config.vocab_size, embedding_width),
        *_stack_layers("layers", "layers", config.num_hidden_layers, layer),
        *_map_norm("norm", "norm", width),
    ]


def _map_audio_encoder(config: AudioEncoderConfig) -> list[Entry]:
    """docs/reference.md, 3. ``bos_eos`` is in every file and read by nothing; it is kept for the way back."""
    width = config.d_model
    hidden = config.encoder_ffn_dim
    heads = (config.encoder_attention_heads, width // config.encoder_attention_heads)
    layer = [
        *_map_norm("attention_norm", "self_attn_layer_norm", width, bias=True),
        *_map_to_heads("attention/query", "self_attn.q_proj", width, heads),
        # as in Whisper: a bias of the keys would add the same to all logits of a query, which softmax takes out again
        *_map_to_heads("attention/key", "self_attn.k_proj", width, heads, bias=False),
        *_map_to_heads("attention/value", "self_attn.v_proj", width, heads),
        *_map_from_heads("attention/out", "self_attn.out_proj", heads, width),
        *_map_norm("mlp_norm", "final_layer_norm", width, bias=True),
        *_map_linear("mlp/up", "fc1", width, hidden),
        *_map_linear("mlp/down", "fc2", hidden, width),
    ]
    return [
        *_map_conv("conv1", "conv1", config.num_mel_bins, width, 3),
        *_map_conv("conv2", "conv2", width, width, 3),
        *_map_embedding("bos_eos", "audio_bos_eos_token", 2, config.output_dim),
        *_stack_layers("layers", "layers", config.encoder_layers, layer),
        *_map_norm("norm", "ln_post", width, bias=True),
        *_map_linear("proj", "proj", width, config.output_dim),
    ]


def _map_vision_encoder(config: VisionEncoderConfig) -> list[Entry]:
    """docs/reference.md, 4."""
    width = config.hidden_size
    hidden = config.intermediate_size
    heads = (config.num_heads, width // config.num_heads)
    layer = [
        *_map_norm("attention_norm", "norm1", width),
        *_map_to_heads("attention/query", "attn.q", width, heads),
        *_map_to_heads("attention/key", "attn.k", width, heads),
        *_map_to_heads("attention/value", "attn.v", width, heads),
        *_map_from_heads("attention/out", "attn.proj", heads, width),
        *_map_norm("mlp_norm", "norm2", width),
        *_map_linear("mlp/gate", "mlp.gate_proj", width, hidden),
        *_map_linear("mlp/up", "mlp.up_proj", width, hidden),
        *_map_linear("mlp/down", "mlp.down_proj", hidden, width),
    ]
    # the merger concatenates a square of patches, which becomes one token
    cell = width * config.spatial_merge_size**2
    merger = [
        *_map_norm("norm", "ln_q", width),
        # mlp.1 is the activation; numbers left out further below are activations and dropout too, without parameters
        *_map_linear("up", "mlp.0", cell, cell),
        *_map_linear("down", "mlp.2", cell, config.out_hidden_size),
    ]
    patch = (width, config.in_channels, config.temporal_patch_size, config.patch_size, config.patch_size)
    return [
        # [D, C, t, h, w] -> [D, C*t*h*w] -> [C*t*h*w, D]: patches come flattened, so the convolution is a product
        _make_entry("patch_embed/kernel", "patch_embed.proj.weight", patch, (1, 0), (width, config.patch_dim)),
        *_stack_layers("layers", "blocks", config.depth, layer),
        *_move_under("merger", "merger", merger),
    ]


def _map_token2wav(config: Token2WavConfig) -> list[Entry]:
    return [
        *_move_under("dit", "code2wav_dit_model", _map_dit(config.dit_config)),
        *_move_under("bigvgan", "code2wav_bigvgan_model", _map_bigvgan(config.bigvgan_config)),
    ]


def _map_dit(config: DiTConfig) -> list[Entry]:
    """docs/reference.md, 8.2 to 8.7. ``modulation`` projects the time embedding to shifts, scales and gates."""
    width = config.hidden_size
    heads = (config.num_attention_heads, config.head_dim)
    layer = [
        # shift, scale and gate of the attention, then of the MLP; the norms have no parameters of their own
        *_map_linear("modulation", "attn_norm.linear", width, 6 * width),
        *_map_to_heads("attention/query", "attn.to_q", width, heads),
        *_map_to_heads("attention/key", "attn.to_k", width, heads),
        *_map_to_heads("attention/value", "attn.to_v", width, heads),
        *_map_from_heads("attention/out", "attn.to_out.0", heads, width),
        *_map_linear("mlp/up", "ff.ff.0", width, config.ff_mult * width),
        *_map_linear("mlp/down", "ff.ff.3", config.ff_mult * width, width),
    ]
    # the DiT's input: noisy mel, encoding of the reference clip, codec embedding, speaker vector
    conditions = config.mel_dim + config.enc_dim + config.emb_dim + config.enc_emb_dim
    return [
        *_map_linear("time_embed/up", "time_embed.time_mlp.0", _TIME_FREQUENCIES, width),
        *_map_linear("time_embed/down", "time_embed.time_mlp.2", width, width),
        # one embedding more than codes: the reference has it, though its empty code is 0
        *_map_embedding("codec_embed", "text_embed.codec_embed", config.num_embeds + 1, config.emb_dim),
        *_move_under("speaker_encoder", "input_embed.spk_encoder", _map_speaker_encoder(config)),
        *_map_linear("input_proj", "input_embed.proj", conditions, width),
        *_stack_layers("layers", "transformer_blocks", config.num_hidden_layers, layer),
        *_map_linear("modulation", "norm_out.linear", width, 2 * width),
        *_map_linear("proj", "proj_out", width, config.mel_dim),
    ]


def _map_speaker_encoder(config: DiTConfig) -> list[Entry]:
    """The ECAPA-TDNN of docs/reference.md, 8.3. Its blocks differ in dilation, so they are not stacked."""
    channels = config.enc_channels
    kernels = config.enc_kernel_sizes
    hidden = config.enc_attention_channels
    pooled = channels[-1]
    entries = _map_conv("block_0", "blocks.0.conv", config.mel_dim, channels[0], kernels[0])
    for i in range(1, len(channels) - 1):
        block = _map_speaker_block(config, channels[i - 1], channels[i], kernels[i])
        entries += _move_under(f"block_{i}", f"blocks.{i}", block)
    return [
        *entries,
        *_map_conv("aggregate", "mfa.conv", pooled, pooled, kernels[-1]),
        # attentive pooling sees each frame beside the mean and the deviation over time, and gives the latter two
        *_map_conv("pool/up", "asp.tdnn.conv", 3 * pooled, hidden, 1),
        *_map_conv("pool/down", "asp.conv", hidden, pooled, 1),
        *_map_conv("proj", "fc", 2 * pooled, config.enc_dim, 1),
    ]


def _map_speaker_block(config: DiTConfig, inputs: int, outputs: int, kernel: int) -> list[Entry]:
    """In, one convolution for each group of channels but the first, out, and squeeze-excitation of the channels."""
    # Res2Net: the channels are split into groups, of which the first passes through without a convolution
    group = outputs // config.enc_res2net_scale
    entries = _map_conv("in", "tdnn1.conv", inputs, outputs, 1)
    for g in range(config.enc_res2net_scale - 1):
        entries += _map_conv(f"group_{g + 1}", f"res2net_block.blocks.{g}.conv", group, group, kernel)
    return [
        *entries,
        *_map_conv("out", "tdnn2.conv", outputs, outputs, 1),
        *_map_conv("squeeze/down", "se_block.conv1", outputs, config.enc_se_channels, 1),
        *_map_conv("squeeze/up", "se_block.conv2", config.enc_se_channels, outputs, 1),
    ]


def _map_bigvgan(config: BigVGANConfig) -> list[Entry]:
    """docs/reference.md, 8.9. Stage s halves the channels; its block b has the kernel ``resblock_kernel_sizes[b]``."""
    channels = config.upsample_initial_channel
    entries = _map_conv("conv_in", "conv_pre", config.mel_dim, channels, _VOCODER_KERNEL)
    blocks = list(zip(config.resblock_kernel_sizes, config.resblock_dilation_sizes, strict=True))
    for s, width in enumerate(config.upsample_kernel_sizes):
        # the published stages are lists of one element, hence the 0; the blocks of all stages are in one list
        entries += _map_transposed_conv(f"stage_{s}/upsample", f"ups.{s}.0", channels, channels // 2, width)
        channels //= 2
        for b, (kernel, dilations) in enumerate(blocks):
            block = _map_vocoder_block(channels, kernel, len(dilations))
            entries += _move_under(f"stage_{s}/block_{b}", f"resblocks.{len(blocks) * s + b}", block)
    return [
        *entries,
        *_map_snake("activation", "activation_post.act", channels),
        *_map_conv("conv_out", "conv_post", channels, 1, _VOCODER_KERNEL, bias=False),
    ]


def _map_vocoder_block(channels: int, kernel: int, rounds: int) -> list[Entry]:
    """In each round: activation 2i, dilated convolution, activation 2i + 1, plain convolution."""
    entries: list[Entry] = []
    for i in range(rounds):
        entries += _map_snake(f"round_{i}/activation1", f"activations.{2 * i}.act", channels)
        entries += _map_conv(f"round_{i}/conv1", f"convs1.{i}", channels, channels, kernel)
        entries += _map_snake(f"round_{i}/activation2", f"activations.{2 * i + 1}.act", channels)
        entries += _map_conv(f"round_{i}/conv2", f"convs2.{i}", channels, channels, kernel)
    return entries


def _map_snake(path: str, name: str, channels: int) -> list[Entry]:
    return [_make_entry(f"{path}/{leaf}", f"{name}.{leaf}", (channels,)) for leaf in ("alpha", "beta")]

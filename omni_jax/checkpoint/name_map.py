"""The one table of names: every leaf of our parameter tree beside the published tensors it is made of.

Both directions of a conversion, the checks of a file, the parameter counts and the random checkpoints of the tests
read this table and nothing else. A layout is data, not code: a tensor is reshaped to ``split`` (same numbers, same
order) and its axes put in ``order``; going back undoes the two. What that does to each kind of tensor:

===================  ======================  ==================================
kind                 published (PyTorch)     here (JAX)
===================  ======================  ==================================
Linear               [out, in]               [in, out]
query, key, value    [N*H, D], bias [N*H]    [D, N, H], bias [N, H]
attention's output   [D, N*H]                [N, H, D]
Conv1d               [out, in, k]            [k, in, out]
ConvTranspose1d      [in, out, k]            [k, in, out], not flipped
Conv3d of patches    [D, C, t, h, w]         [C*t*h*w, D]
norm, bias, table    as it is                as it is
===================  ======================  ==================================

A transposed convolution's kernel is kept in PyTorch's order of time; ``jax.lax.conv_transpose`` wants it flipped along
k (or ``transpose_kernel=True`` with the two channel axes exchanged).

Layers of one shape are stacked on a leading axis, so such a leaf has as many names as there are layers. The shapes
come from the configuration; the names are those of the published files (sections 3, 4, 6, 7.5 and 9 of the reference
notes).
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

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

# transformers 5 keeps the Thinker's towers and its text model one level deeper in memory than the published files do
_IN_MEMORY = re.compile(r"^thinker\.model\.(language_model|audio_tower|visual)\.")
_PUBLISHED = {"language_model": "thinker.model.", "audio_tower": "thinker.audio_tower.", "visual": "thinker.visual."}

_LISTED = 20  # names that a message lists of each kind of trouble

_TIME_FREQUENCIES = 256  # width of the DiT's sinusoid of time; a constant of the reference, in no file
_VOCODER_KERNEL = 7  # of the vocoder's first and last convolution; likewise


@dataclass(frozen=True)
class Entry:
    """One leaf of the parameter tree.

    Attributes:
      path: where the leaf stands, from the component down.
      names: the published tensors it holds: one for each layer where it is stacked, else a single one.
      shape: the published shape of each of them.
      split: ``shape`` with heads told apart or kernel axes run together: the same numbers in the same order.
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
        one = tuple(self.split[axis] for axis in self.order)
        return (len(self.names), *one) if self.stacked else one

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
    """The entries of ``components``, in the order of the published files' modules."""
    parts = {
        "thinker": lambda: _thinker(config.thinker_config),
        "talker": lambda: _talker(config.talker_config),
        "token2wav": lambda: _token2wav(config.token2wav_config),
    }
    return tuple(entry for component in components for entry in _under(component, component, parts[component]()))


def optional_constants(config: OmniConfig) -> dict[str, tuple[int, ...]]:
    """Tensors that a file may carry and that are no parameters: name to shape.

    The published files and transformers 4 hold the frequencies of the DiT's rotary embedding, transformers 5 does not.
    """
    dit = config.token2wav_config.dit_config
    return {"token2wav.code2wav_dit_model.rotary_embed.inv_freq": (dit.head_dim // 2,)}


def published_name(name: str) -> str:
    """The published spelling of a name in either scheme (section 6: transformers 5 has another one in memory)."""
    return _IN_MEMORY.sub(lambda m: _PUBLISHED[m.group(1)], name)


def parameter_count(config: OmniConfig, under: tuple[str, ...] = ()) -> int:
    """Parameters of the model, or of the leaves whose path begins with ``under``, from the shapes alone."""
    return sum(entry.size for entry in make_name_table(config) if entry.path[: len(under)] == under)


def differences(
    expected: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]], known: Iterable[str] = ()
) -> str:
    """What ``found`` lacks, has too much and has in another shape, all in one text; empty where there is nothing.

    Args:
      expected: name to shape, for every tensor that must be there.
      found: the same, for every tensor that is.
      known: names that may be there or not.
    """
    missing = [name for name in expected if name not in found]
    unexpected = [name for name in found if name not in expected and name not in set(known)]
    other = [n for n, shape in expected.items() if n in found and found[n] != shape]
    other = [f"{n}: config.json makes it {list(expected[n])}, found {list(found[n])}" for n in other]
    parts = [listed("missing", missing), listed("unexpected", unexpected), listed("of another shape", other)]
    return "".join(parts)


def listed(what: str, lines: list[str]) -> str:
    """``lines`` under a heading with their number; the first twenty, then how many more. Empty for none."""
    if not lines:
        return ""
    shown = "".join(f"\n    {line}" for line in lines[:_LISTED])
    more = f"\n    ... and {len(lines) - _LISTED} more" if len(lines) > _LISTED else ""
    return f"\n  {len(lines)} {what}:{shown}{more}"


# What the model is made of. A path is written with slashes, a name with dots; every helper returns a list of entries.


def _leaf(
    path: str,
    name: str,
    shape: tuple[int, ...],
    order: tuple[int, ...] | None = None,
    split: tuple[int, ...] | None = None,
) -> Entry:
    split = split or shape
    return Entry(tuple(path.split("/")), (name,), shape, split, order or tuple(range(len(split))))


def _under(path: str, name: str, entries: Iterable[Entry]) -> list[Entry]:
    """``entries`` moved into a module of ours at ``path`` and of the published one at ``name``."""
    above = tuple(path.split("/"))
    return [dataclasses.replace(e, path=above + e.path, names=tuple(f"{name}.{n}" for n in e.names)) for e in entries]


def _stack(path: str, name: str, count: int, layer: Iterable[Entry]) -> list[Entry]:
    """``count`` layers ``name.0``, ``name.1``, ... in the leaves of one."""
    above = tuple(path.split("/"))
    return [
        dataclasses.replace(
            e, path=above + e.path, names=tuple(f"{name}.{i}.{e.names[0]}" for i in range(count)), stacked=True
        )
        for e in layer
    ]


def _bias(path: str, name: str, width: int) -> Entry:
    return _leaf(f"{path}/bias", f"{name}.bias", (width,))


def _norm(path: str, name: str, width: int, bias: bool = False) -> list[Entry]:
    scale = _leaf(f"{path}/scale", f"{name}.weight", (width,))
    return [scale, _bias(path, name, width)] if bias else [scale]


def _embedding(path: str, name: str, rows: int, width: int) -> list[Entry]:
    return [_leaf(f"{path}/embedding", f"{name}.weight", (rows, width))]


def _linear(path: str, name: str, inputs: int, outputs: int, bias: bool = True) -> list[Entry]:
    kernel = _leaf(f"{path}/kernel", f"{name}.weight", (outputs, inputs), (1, 0))
    return [kernel, _bias(path, name, outputs)] if bias else [kernel]


def _heads(path: str, name: str, width: int, heads: tuple[int, int], bias: bool = True) -> list[Entry]:
    """A projection from ``width`` to ``heads`` = (number of heads N, width of one H)."""
    n, h = heads
    kernel = _leaf(f"{path}/kernel", f"{name}.weight", (n * h, width), (2, 0, 1), (n, h, width))
    return [kernel, _leaf(f"{path}/bias", f"{name}.bias", (n * h,), split=heads)] if bias else [kernel]


def _from_heads(path: str, name: str, heads: tuple[int, int], width: int, bias: bool = True) -> list[Entry]:
    n, h = heads
    kernel = _leaf(f"{path}/kernel", f"{name}.weight", (width, n * h), (1, 2, 0), (width, n, h))
    return [kernel, _bias(path, name, width)] if bias else [kernel]


def _conv(path: str, name: str, inputs: int, outputs: int, width: int, bias: bool = True) -> list[Entry]:
    kernel = _leaf(f"{path}/kernel", f"{name}.weight", (outputs, inputs, width), (2, 1, 0))
    return [kernel, _bias(path, name, outputs)] if bias else [kernel]


def _transposed_conv(path: str, name: str, inputs: int, outputs: int, width: int) -> list[Entry]:
    return [
        _leaf(f"{path}/kernel", f"{name}.weight", (inputs, outputs, width), (2, 0, 1)),
        _bias(path, name, outputs),
    ]


def _thinker(config: ThinkerConfig) -> list[Entry]:
    text = config.text_config
    return [
        *_under("audio_encoder", "audio_tower", _audio_encoder(config.audio_config)),
        *_under("vision_encoder", "visual", _vision_encoder(config.vision_config)),
        *_under("decoder", "model", _decoder(text, text.hidden_size)),
        *_linear("decoder/head", "lm_head", text.hidden_size, text.vocab_size, bias=False),
    ]


def _talker(config: TalkerConfig) -> list[Entry]:
    """The codec table is as wide as the Thinker: its rows are added to the Thinker's before the projection."""
    return [
        *_linear("proj", "thinker_to_talker_proj", config.embedding_size, config.hidden_size),
        *_under("decoder", "model", _decoder(config, config.embedding_size)),
        *_linear("decoder/head", "codec_head", config.hidden_size, config.vocab_size, bias=False),
    ]


def _decoder(config: DecoderConfig, embedding_width: int) -> list[Entry]:
    """A Qwen2 decoder without its head (section 6)."""
    width, hidden = config.hidden_size, config.intermediate_size
    heads = (config.num_attention_heads, config.head_dim)
    shared = (config.num_key_value_heads, config.head_dim)
    layer = [
        *_norm("attention_norm", "input_layernorm", width),
        *_heads("attention/query", "self_attn.q_proj", width, heads),
        *_heads("attention/key", "self_attn.k_proj", width, shared),
        *_heads("attention/value", "self_attn.v_proj", width, shared),
        *_from_heads("attention/out", "self_attn.o_proj", heads, width, bias=False),
        *_norm("mlp_norm", "post_attention_layernorm", width),
        *_linear("mlp/gate", "mlp.gate_proj", width, hidden, bias=False),
        *_linear("mlp/up", "mlp.up_proj", width, hidden, bias=False),
        *_linear("mlp/down", "mlp.down_proj", hidden, width, bias=False),
    ]
    return [
        *_embedding("embed", "embed_tokens", config.vocab_size, embedding_width),
        *_stack("layers", "layers", config.num_hidden_layers, layer),
        *_norm("norm", "norm", width),
    ]


def _audio_encoder(config: AudioEncoderConfig) -> list[Entry]:
    """Section 3. Its table of the two audio marks is in every file and read by nothing; it is kept."""
    width, hidden = config.d_model, config.encoder_ffn_dim
    heads = (config.encoder_attention_heads, width // config.encoder_attention_heads)
    layer = [
        *_norm("attention_norm", "self_attn_layer_norm", width, bias=True),
        *_heads("attention/query", "self_attn.q_proj", width, heads),
        *_heads("attention/key", "self_attn.k_proj", width, heads, bias=False),
        *_heads("attention/value", "self_attn.v_proj", width, heads),
        *_from_heads("attention/out", "self_attn.out_proj", heads, width),
        *_norm("mlp_norm", "final_layer_norm", width, bias=True),
        *_linear("mlp/up", "fc1", width, hidden),
        *_linear("mlp/down", "fc2", hidden, width),
    ]
    return [
        *_conv("conv1", "conv1", config.num_mel_bins, width, 3),
        *_conv("conv2", "conv2", width, width, 3),
        *_embedding("bos_eos", "audio_bos_eos_token", 2, config.output_dim),
        *_stack("layers", "layers", config.encoder_layers, layer),
        *_norm("norm", "ln_post", width, bias=True),
        *_linear("proj", "proj", width, config.output_dim),
    ]


def _vision_encoder(config: VisionEncoderConfig) -> list[Entry]:
    """Section 4."""
    width, hidden = config.hidden_size, config.intermediate_size
    heads = (config.num_heads, width // config.num_heads)
    layer = [
        *_norm("attention_norm", "norm1", width),
        *_heads("attention/query", "attn.q", width, heads),
        *_heads("attention/key", "attn.k", width, heads),
        *_heads("attention/value", "attn.v", width, heads),
        *_from_heads("attention/out", "attn.proj", heads, width),
        *_norm("mlp_norm", "norm2", width),
        *_linear("mlp/gate", "mlp.gate_proj", width, hidden),
        *_linear("mlp/up", "mlp.up_proj", width, hidden),
        *_linear("mlp/down", "mlp.down_proj", hidden, width),
    ]
    cell = width * config.spatial_merge_size**2
    merger = [
        *_norm("norm", "ln_q", width),
        *_linear("up", "mlp.0", cell, cell),
        *_linear("down", "mlp.2", cell, config.out_hidden_size),
    ]
    patch = (width, config.in_channels, config.temporal_patch_size, config.patch_size, config.patch_size)
    return [
        _leaf("patch_embed/kernel", "patch_embed.proj.weight", patch, (1, 0), (width, config.patch_dim)),
        *_stack("layers", "blocks", config.depth, layer),
        *_under("merger", "merger", merger),
    ]


def _token2wav(config: Token2WavConfig) -> list[Entry]:
    return [
        *_under("dit", "code2wav_dit_model", _dit(config.dit_config)),
        *_under("bigvgan", "code2wav_bigvgan_model", _bigvgan(config.bigvgan_config)),
    ]


def _dit(config: DiTConfig) -> list[Entry]:
    """Sections 8.2 to 8.7. ``modulation`` is the projection of the time to shifts, scales and gates."""
    width = config.hidden_size
    heads = (config.num_attention_heads, config.head_dim)
    layer = [
        *_linear("modulation", "attn_norm.linear", width, 6 * width),
        *_heads("attention/query", "attn.to_q", width, heads),
        *_heads("attention/key", "attn.to_k", width, heads),
        *_heads("attention/value", "attn.to_v", width, heads),
        *_from_heads("attention/out", "attn.to_out.0", heads, width),
        *_linear("mlp/up", "ff.ff.0", width, config.ff_mult * width),
        *_linear("mlp/down", "ff.ff.3", config.ff_mult * width, width),
    ]
    conditions = config.mel_dim + config.enc_dim + config.emb_dim + config.enc_emb_dim
    return [
        *_linear("time_embed/up", "time_embed.time_mlp.0", _TIME_FREQUENCIES, width),
        *_linear("time_embed/down", "time_embed.time_mlp.2", width, width),
        # one row more than codes: the reference's table has it, though its empty code is row 0
        *_embedding("codec_embed", "text_embed.codec_embed", config.num_embeds + 1, config.emb_dim),
        *_under("speaker_encoder", "input_embed.spk_encoder", _speaker_encoder(config)),
        *_linear("input_proj", "input_embed.proj", conditions, width),
        *_stack("layers", "transformer_blocks", config.num_hidden_layers, layer),
        *_linear("modulation", "norm_out.linear", width, 2 * width),
        *_linear("proj", "proj_out", width, config.mel_dim),
    ]


def _speaker_encoder(config: DiTConfig) -> list[Entry]:
    """The ECAPA network of section 8.3. Its blocks differ in dilation, so they are not stacked."""
    channels, kernels = config.enc_channels, config.enc_kernel_sizes
    hidden, pooled = config.enc_attention_channels, channels[-1]
    entries = _conv("block_0", "blocks.0.conv", config.mel_dim, channels[0], kernels[0])
    for i in range(1, len(channels) - 1):
        entries += _under(f"block_{i}", f"blocks.{i}", _speaker_block(config, channels[i - 1], channels[i], kernels[i]))
    return [
        *entries,
        *_conv("aggregate", "mfa.conv", pooled, pooled, kernels[-1]),
        *_conv("pool/up", "asp.tdnn.conv", 3 * pooled, hidden, 1),
        *_conv("pool/down", "asp.conv", hidden, pooled, 1),
        *_conv("proj", "fc", 2 * pooled, config.enc_dim, 1),
    ]


def _speaker_block(config: DiTConfig, inputs: int, outputs: int, kernel: int) -> list[Entry]:
    """In, one convolution for each group of channels but the first, out, and the squeeze that weighs the channels."""
    group = outputs // config.enc_res2net_scale
    entries = _conv("in", "tdnn1.conv", inputs, outputs, 1)
    for g in range(config.enc_res2net_scale - 1):
        entries += _conv(f"group_{g + 1}", f"res2net_block.blocks.{g}.conv", group, group, kernel)
    return [
        *entries,
        *_conv("out", "tdnn2.conv", outputs, outputs, 1),
        *_conv("squeeze/down", "se_block.conv1", outputs, config.enc_se_channels, 1),
        *_conv("squeeze/up", "se_block.conv2", config.enc_se_channels, outputs, 1),
    ]


def _bigvgan(config: BigVGANConfig) -> list[Entry]:
    """Section 8.9. Stage s halves the channels; its block b has the kernel ``resblock_kernel_sizes[b]``."""
    channels = config.upsample_initial_channel
    entries = _conv("conv_in", "conv_pre", config.mel_dim, channels, _VOCODER_KERNEL)
    blocks = list(zip(config.resblock_kernel_sizes, config.resblock_dilation_sizes, strict=True))
    for s, width in enumerate(config.upsample_kernel_sizes):
        entries += _transposed_conv(f"stage_{s}/upsample", f"ups.{s}.0", channels, channels // 2, width)
        channels //= 2
        for b, (kernel, dilations) in enumerate(blocks):
            block = _vocoder_block(channels, kernel, len(dilations))
            entries += _under(f"stage_{s}/block_{b}", f"resblocks.{len(blocks) * s + b}", block)
    return [
        *entries,
        *_snake("activation", "activation_post.act", channels),
        *_conv("conv_out", "conv_post", channels, 1, _VOCODER_KERNEL, bias=False),
    ]


def _vocoder_block(channels: int, kernel: int, rounds: int) -> list[Entry]:
    """In each round: activation 2i, dilated convolution, activation 2i + 1, plain convolution."""
    entries: list[Entry] = []
    for i in range(rounds):
        entries += _snake(f"round_{i}/activation1", f"activations.{2 * i}.act", channels)
        entries += _conv(f"round_{i}/conv1", f"convs1.{i}", channels, channels, kernel)
        entries += _snake(f"round_{i}/activation2", f"activations.{2 * i + 1}.act", channels)
        entries += _conv(f"round_{i}/conv2", f"convs2.{i}", channels, channels, kernel)
    return entries


def _snake(path: str, name: str, channels: int) -> list[Entry]:
    return [_leaf(f"{path}/{p}", f"{name}.{p}", (channels,)) for p in ("alpha", "beta")]

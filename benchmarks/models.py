"""The one place that makes models of the benchmarks: their sizes, and their random parameters.

Parameters come from ``tools/make_checkpoint.py``, and both sides load them from the folder that it writes. Where they
are made on an accelerator instead, each side draws its own.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool

from benchmarks.side import CONVERTED, PARAMETER_DEVIATION, PUBLISHED, VoiceArrays
from omni_jax.checkpoint.convert import to_jax
from omni_jax.checkpoint.pytorch import read_headers
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
from omni_jax.engine.talker_engine import suppressed_codes
from omni_jax.models import thinker
from omni_jax.models.token2wav import Token2Wav, abstract_params
from omni_jax.processing.processor import Processor
from omni_jax.processing.tokenizer_files import write_tokenizer
from tools.make_checkpoint import write_checkpoint

SOLVER_EVALUATIONS = 36  # of the DiT for each block, by the published solver: 9 steps of 4
MEL_FRAMES_PER_SECOND = 100


def make_middle_config() -> OmniConfig:
    """Large enough that time goes where it goes in the published model, small enough for two cores.

    The Thinker has 12 layers of 1024, both encoders 4 layers of their published widths, the Talker 6 layers of 512
    with the published codes, the DiT 6 layers of 512; the vocoder has half the published channels.
    """
    text = TextConfig(1024, 4096, 12, 16, 4, 32_000, rope_scaling=RopeScaling(mrope_section=(8, 12, 12)))
    # the ids of special tokens are the tiny ones, which the small tokenizer has
    thinker_config = dataclasses.replace(
        ThinkerConfig.tiny(),
        text_config=text,
        audio_config=AudioEncoderConfig(encoder_layers=4, output_dim=1024),
        vision_config=VisionEncoderConfig(depth=4, fullatt_block_indexes=(3,), out_hidden_size=1024),
    )
    dit = DiTConfig(
        hidden_size=512,
        num_hidden_layers=6,
        num_attention_heads=8,
        look_ahead_layers=(3,),
        look_backward_layers=(0, 5),
    )
    token2wav = Token2WavConfig(dit_config=dit, bigvgan_config=BigVGANConfig(upsample_initial_channel=768))
    return OmniConfig.tiny(
        thinker_config=thinker_config, talker_config=_make_talker_config(), token2wav_config=token2wav
    )


def _make_talker_config() -> TalkerConfig:
    """MLPs as many times as wide as the published 3B's; the published ids of the codes, the tiny ones of the rest."""
    return TalkerConfig.tiny(
        hidden_size=512,
        intermediate_size=2816,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=64,
        embedding_size=1024,
        vocab_size=8448,
        tts_codec_start_token_id=8293,
        tts_codec_end_token_id=8294,
        tts_codec_pad_token_id=8292,
        tts_codec_mask_token_id=8296,
        rope_scaling=RopeScaling(mrope_section=(8, 12, 12)),
    )


def with_published_token2wav(config: OmniConfig) -> OmniConfig:
    """The same with DiT and vocoder at their published size."""
    published = OmniConfig.qwen2_5_omni_7b().token2wav_config
    return dataclasses.replace(config, token2wav_config=published)


def write_model(folder: Path, config: OmniConfig) -> None:
    """Writes a random model in float32 in both layouts, whose replies have text and are as long as is asked for.

    In both heads the logits of everything that must not be drawn are zero. So the likeliest token is never the end
    mark but always whole characters; and no end is ever among the 40 likeliest codes, which the published sampling
    draws from, as of thousands of random logits about half are above zero.
    """
    # PyTorch's layout first; ours is converted from it, so that both sides have the same parameters
    published = folder / PUBLISHED
    write_checkpoint(published, config, dtype="float32")
    # whole characters alone: a token that is a part of one would hold back the first piece of text
    _zero_rows(published, "thinker.lm_head.weight", ~find_text_tokens(Processor.load(published), config))
    _zero_rows(published, "talker.codec_head.weight", find_excluded_codes(config))
    to_jax(published, folder / CONVERTED)


def find_text_tokens(processor: Processor, config: OmniConfig) -> Bool[np.ndarray, " vocabulary"]:
    """The tokens of the Thinker that are whole characters."""
    is_text = np.zeros(config.thinker_config.text_config.vocab_size, bool)
    for token in range(len(is_text)):
        text = processor.tokenizer.token_bytes(token)
        is_text[token] = bool(text) and text.isascii()
    return is_text


def find_excluded_codes(config: OmniConfig) -> Bool[np.ndarray, " codes"]:
    """The Talker's tokens that must not be drawn: those that are never drawn, padding, and the end."""
    talker = config.talker_config
    excluded = suppressed_codes(config)
    excluded[[talker.tts_codec_pad_token_id, talker.tts_codec_end_token_id]] = True
    return excluded


def make_params(abstract: Any) -> Any:
    """Random parameters on the device, without a checkpoint: normal, the scales of norms around one.

    Args:
      abstract: shapes and dtypes, as ``models.*.abstract_params`` gives them.
    """
    leaves, tree = jax.tree_util.tree_flatten_with_path(nn.unbox(abstract))
    made = []
    for number, (path, leaf) in enumerate(leaves):
        mean = 1.0 if path[-1].key == "scale" else 0.0
        made.append(_draw(jax.random.key(number), leaf.shape, leaf.dtype, mean))
    return jax.tree.unflatten(tree, made)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _draw(key: jax.Array, shape: tuple[int, ...], dtype: Any, mean: float) -> jax.Array:
    # drawn in bfloat16: the largest of the 7B would take twice its memory in float32
    return (mean + PARAMETER_DEVIATION * jax.random.normal(key, shape, jnp.bfloat16)).astype(dtype)


def write_processor(folder: Path, config: OmniConfig) -> None:
    """Writes what the processors of both sides are loaded from."""
    write_tokenizer(folder / PUBLISHED, config)
    config.save(folder / PUBLISHED)


def _zero_rows(folder: Path, name: str, rows: np.ndarray) -> None:
    """Zeros in these rows of a tensor of the folder's files."""
    # in place: rows of a safetensors file follow each other, and zeros are zeros in every dtype
    tensor = read_headers(folder)[name]
    row_bytes = tensor.nbytes // tensor.shape[0]
    with open(tensor.file, "r+b") as file:
        for row in np.flatnonzero(rows):
            file.seek(tensor.offset + int(row) * row_bytes)
            file.write(bytes(row_bytes))


def make_voice(config: OmniConfig, num_frames: int) -> VoiceArrays:
    """A voice with a clip of so many frames."""
    # the published voices have clips of other lengths, which the speaker encoder's time depends on
    rng = np.random.default_rng(1)
    dit = config.token2wav_config.dit_config
    cond = rng.standard_normal((1, dit.enc_emb_dim), np.float32)
    return VoiceArrays(cond, rng.standard_normal((1, num_frames, dit.mel_dim), np.float32))


def count_token2wav_flops(config: OmniConfig) -> dict[str, float]:
    """Operations of the matrix products in a second of speech; a multiplication and an addition are two.

    Returns:
      "DiT": the weights of each layer for each frame, of the request and of its unconditional half, in all
      evaluations; its attention is 1 % of it. "vocoder": the weights of each convolution at each of its places in time.
    """
    sizes = config.token2wav_config
    # abstract parameters: shapes suffice, and nothing is made
    shapes = nn.unbox(abstract_params(Token2Wav(sizes)))
    # modulation is computed once for an evaluation, and not for each frame
    layers = {name: tree for name, tree in shapes["dit"]["layers"].items() if name != "modulation"}
    dit = MEL_FRAMES_PER_SECOND * 2 * SOLVER_EVALUATIONS * _kernel_size(layers)
    bigvgan = shapes["bigvgan"]
    upsampling = itertools.accumulate(
        sizes.bigvgan_config.upsample_rates, lambda rate, factor: rate * factor, initial=MEL_FRAMES_PER_SECOND
    )
    rates = list(upsampling)  # of mel frames, then of each stage's output
    vocoder = rates[0] * _kernel_size(bigvgan["conv_in"]) + rates[-1] * _kernel_size(bigvgan["conv_out"])
    for i, (before, after) in enumerate(itertools.pairwise(rates)):
        # each input frame of a transposed convolution meets the whole kernel; the residual blocks run at the new rate
        stage = dict(bigvgan[f"stage_{i}"])
        vocoder += before * _kernel_size(stage.pop("upsample"))
        vocoder += after * _kernel_size(stage)
    return {"DiT": 2.0 * dit, "vocoder": 2.0 * vocoder}


def count_decoding_bytes(config: OmniConfig) -> int:
    """Bytes of float32 parameters that a step of the Thinker reads: its layers and its head."""
    decoder = nn.unbox(thinker.abstract_params(thinker.Thinker(config.thinker_config)))["decoder"]
    # of the embeddings a step reads one row a slot
    read = {name: tree for name, tree in decoder.items() if name != "embed"}
    return 4 * sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(read))


def _kernel_size(tree: Any) -> int:
    """Parameters in all kernels of a tree."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return sum(math.prod(leaf.shape) for path, leaf in leaves if path[-1].key == "kernel")

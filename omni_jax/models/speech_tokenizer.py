"""The speech tokenizer: sound to codes, 50 a second (paper section 2.4: qwen-tts-tokenizer, its encoder unpublished).

Its design is that of the 25 Hz tokenizer of the same family (``WhisperEncoderVQ`` of the package qwen-tts, report
https://arxiv.org/abs/2601.15621) without its convolution down: layers like the audio encoder's, a vector quantizer, and
more layers behind it. Blocks do not see each other, so they are a batch axis, and a sound can be encoded as it comes.

What the codes keep is decided by what is trained behind them: the text that is spoken (content), and the sound's mel.

Letters: A blocks, T mel frames of a block, M mel bins, S positions after the second convolution (T / 2), D width,
Q channels of the codebook, E width of the output, L labels of the content.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.typing import Dtype
from jaxtyping import Bool, Float, Int

from omni_jax.batch import Array, AudioBlocks
from omni_jax.config import AudioEncoderConfig
from omni_jax.layers.attention import Mask
from omni_jax.layers.conv import Conv1D
from omni_jax.layers.linear import Linear
from omni_jax.layers.norm import LayerNorm
from omni_jax.layers.params import dtypes
from omni_jax.layers.stack import Remat, call_layers, layer_stack
from omni_jax.models.audio_encoder import (
    AudioLayer,
    embed_mel,
    make_convolutions,
    sinusoidal_positions,
    valid_positions,
)
from omni_jax.models.vector_quantizer import VectorQuantizer
from omni_jax.processing import speech_mel
from omni_jax.speech_tokenizer_config import SpeechTokenizerConfig

_MEL_KERNEL = 5  # positions, 100 ms
_MEL_LAYERS = 2


class LayerStack(nn.Module):
    """Layers of the audio encoder over blocks [A, S, D]."""

    config: AudioEncoderConfig
    depth: int
    scan_layers: bool = True
    remat: Remat = "none"
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    def setup(self) -> None:
        fields = dict(config=self.config, **dtypes(self))
        self.layers = layer_stack(AudioLayer, fields, self.depth, self.scan_layers, shared=1, remat=self.remat)

    def __call__(self, x: Float[Array, "A S D"], valid: Bool[Array, "A S"]) -> Float[jax.Array, "A S D"]:
        return call_layers(self.layers, self.depth, x, Mask(jnp.asarray(valid).astype(jnp.int32)))


class MelDecoder(nn.Module):
    """Quantized vectors to the log-mel of Token2Wav, two frames a position; residual convolutions within a block."""

    config: SpeechTokenizerConfig
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "A S D"], valid: Bool[Array, "A S"]) -> Float[jax.Array, "A S*2 M"]:
        c = self.config
        kw = dtypes(self)
        width = c.mel_channels
        is_valid = jnp.asarray(valid)[..., None]  # [A, S, 1]
        x = Linear((c.audio_config.d_model,), (width,), ("embed", "mlp"), name="proj_in", **kw)(x)  # [A, S, C]
        for number in range(_MEL_LAYERS):
            y = LayerNorm(width, param_dtype=self.param_dtype, name=f"norm{number}")(x)  # [A, S, C]
            # padding is silence to its neighbours, whatever it holds
            y = jnp.where(is_valid, y, 0)
            y = Conv1D(width, 2 * width, _MEL_KERNEL, name=f"conv{number}", **kw)(y)  # [A, S, 2 C]
            y = jax.nn.gelu(y, approximate=False)
            x += Linear((2 * width,), (width,), ("embed", "mlp"), name=f"down{number}", **kw)(y)  # [A, S, C]
        x = LayerNorm(width, param_dtype=self.param_dtype, name="norm")(x)
        x = Linear((width,), (2 * c.mel_dim,), ("mlp", "embed"), name="proj", **kw)(x)  # [A, S, 2 M]
        mel = x.reshape(x.shape[0], -1, c.mel_dim)  # [A, 2 S, M]
        # an optimizer's steps are small beside the numbers of a log-mel
        return speech_mel.LOG_MEAN + speech_mel.LOG_DEVIATION * mel


class SpeechTokenizer(nn.Module):
    """Log-mel blocks of the audio encoder's kind (``processing.audio``) to codes, and what is trained behind them."""

    config: SpeechTokenizerConfig
    scan_layers: bool = True
    remat: Remat = "none"
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    def setup(self) -> None:
        c = self.config
        audio = c.audio_config
        width = audio.d_model
        kw: dict[str, Any] = dtypes(self)
        stack: dict[str, Any] = dict(scan_layers=self.scan_layers, remat=self.remat, **kw)
        self.conv1, self.conv2 = make_convolutions(audio, kw)
        self.front = LayerStack(audio, c.quantizer_layer, **stack)
        self.quantizer = VectorQuantizer(c.codebook_size, c.codebook_dim)
        # the reference's VectorQuantization has these maps where the codebook is narrower than the layers
        self.has_maps = c.codebook_dim != width
        if self.has_maps:
            self.project_in = Linear((width,), (c.codebook_dim,), ("embed", "norm"), **kw)
            self.project_out = Linear((c.codebook_dim,), (width,), ("norm", "embed"), **kw)
        self.quantized_proj = Linear((width,), (width,), ("mlp", "embed"), **kw)
        self.back = LayerStack(audio, audio.encoder_layers - c.quantizer_layer, **stack)
        self.norm = LayerNorm(width, param_dtype=self.param_dtype)
        self.proj = Linear((width,), (audio.output_dim,), ("mlp", "embed"), **kw)
        # 257 labels are an odd number, which no mesh divides
        self.content = Linear((width,), (c.num_labels,), ("embed", "norm"), **kw)
        self.mel_decoder = MelDecoder(c, **kw)

    def __call__(self, audio: AudioBlocks) -> tuple[jax.Array, jax.Array, jax.Array]:
        """All that it computes, for ``init_params``: the output, labels' logits and mel."""
        valid = valid_positions(audio)
        x, _ = self.quantize(self.features(audio))
        x = self.project(x)
        hidden = self.hidden(x, valid)
        return self.output(hidden), self.content_logits(hidden), self.mel_decoder(x, valid)

    def features(self, audio: AudioBlocks) -> Float[jax.Array, "A S Q"]:
        """What is quantized at each position."""
        x = self.front(embed_mel(self.conv1, self.conv2, audio, self.dtype), valid_positions(audio))  # [A, S, D]
        return self.project_in(x) if self.has_maps else x

    def encode(self, audio: AudioBlocks) -> Int[jax.Array, "A S"]:
        """Codes; of a block that is not full the first ``(length + 1) // 2`` are sound."""
        return self.quantizer.encode(self.features(audio))

    def quantize(self, features: Float[Array, "A S Q"]) -> tuple[jax.Array, jax.Array]:
        """The vectors of the nearest codes, with the gradient passed straight through, and the codes [A, S]."""
        return self.quantizer(features)

    def project(self, x: Float[Array, "A S Q"]) -> Float[jax.Array, "A S D"]:
        """Quantized vectors with their positions, as what is behind the quantizer takes them."""
        x = jnp.asarray(x, self.dtype)
        x = self.project_out(x) if self.has_maps else x  # [A, S, D]
        positions = jnp.asarray(sinusoidal_positions(x.shape[1], x.shape[2]), self.dtype)
        return self.quantized_proj(x + positions)  # [A, S, D]

    def hidden(self, x: Float[Array, "A S D"], valid: Bool[Array, "A S"]) -> Float[jax.Array, "A S D"]:
        """Behind the last layer, before the norm."""
        return self.back(jnp.asarray(x), jnp.asarray(valid))

    def output(self, hidden: Float[Array, "A S D"]) -> Float[jax.Array, "A S/2 E"]:
        """Tokens of 40 ms in the width of a Thinker, as those of the audio encoder are."""
        hidden = jnp.asarray(hidden)
        pairs = hidden.reshape(hidden.shape[0], -1, 2, hidden.shape[-1]).mean(axis=2)  # [A, S / 2, D]
        return self.proj(self.norm(pairs))

    def content_logits(self, hidden: Float[Array, "A S D"]) -> Float[jax.Array, "A S L"]:
        """Of the label at each position, in float32."""
        return jnp.asarray(self.content(self.norm(jnp.asarray(hidden))), jnp.float32)

    def decode_mel(self, x: Float[Array, "A S D"], valid: Bool[Array, "A S"]) -> Float[jax.Array, "A S*2 M"]:
        """The log-mel of Token2Wav (``processing.speech_mel``); ``x`` is from ``project``."""
        return self.mel_decoder(jnp.asarray(x), jnp.asarray(valid))


def init_params(model: SpeechTokenizer, key: jax.Array) -> Any:
    """Fresh parameters, in their boxes."""
    audio = model.config.audio_config
    blocks = AudioBlocks(
        np.zeros((1, audio.block_frames, audio.num_mel_bins), np.float32), np.full(1, audio.block_frames, np.int32)
    )
    return model.init(key, blocks)["params"]


def abstract_params(model: SpeechTokenizer) -> Any:
    """Shapes, dtypes and logical axes of every parameter, in their boxes; nothing is computed."""
    return jax.eval_shape(lambda key: init_params(model, key), jax.random.key(0))

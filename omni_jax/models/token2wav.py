"""Token2Wav: codes to mel to sound (section 8; reference ``Qwen2_5OmniToken2WavModel``)."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.typing import Dtype

from omni_jax.config import Token2WavConfig
from omni_jax.layers.params import dtypes
from omni_jax.models.bigvgan import BigVGAN
from omni_jax.models.dit import DiT, pack
from omni_jax.models.speaker_encoder import shortest_clip

SAMPLE_RATE = 24_000


class Token2Wav(nn.Module):
    """The two networks; ``models/flow.py`` says how the first is followed."""

    config: Token2WavConfig
    scan_layers: bool = True
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    def setup(self) -> None:
        self.dit, self.bigvgan = parts(self)

    def __call__(self, *args: Any) -> tuple[jax.Array, jax.Array]:
        """One evaluation of the DiT, and what the vocoder makes of it; for ``abstract_params``."""
        given, null = self.dit(*args)
        mel = given.reshape(1, -1, given.shape[-1])
        return self.bigvgan(mel, np.array([mel.shape[1]])), null


def parts(model: Token2Wav) -> tuple[DiT, BigVGAN]:
    """The two networks, each to be called alone with its own part of the parameters: ``dit`` and ``bigvgan``."""
    kw = dtypes(model)
    return DiT(model.config.dit_config, scan_layers=model.scan_layers, **kw), BigVGAN(model.config.bigvgan_config, **kw)


def abstract_params(model: Token2Wav) -> Any:
    """Shapes, dtypes and logical axes of every parameter, in their boxes; nothing is computed."""
    c = model.config.dit_config
    blocks, _ = pack([c.block_size], c.block_size, 1)
    frames = (1, c.block_size)
    clip, cond = np.zeros((1, shortest_clip(c), c.mel_dim)), np.zeros((1, c.enc_emb_dim))
    arguments = np.zeros((*frames, c.mel_dim)), np.zeros(frames, int), clip, cond, np.float32(0), blocks
    return jax.eval_shape(model.init, jax.random.key(0), *arguments)["params"]

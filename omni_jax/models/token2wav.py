"""Token2Wav: codes to mel to sound (docs/reference.md, 8; reference ``Qwen2_5OmniToken2WavModel``)."""

from __future__ import annotations

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.typing import Dtype

from omni_jax.config import Token2WavConfig
from omni_jax.layers.params import dtypes
from omni_jax.layers.precision import Precision
from omni_jax.layers.stack import Remat
from omni_jax.models.bigvgan import BigVGAN
from omni_jax.models.dit import DiT
from omni_jax.models.dit_blocks import pack
from omni_jax.models.speaker_encoder import shortest_clip

SAMPLE_RATE = 24_000  # samples a second; no file holds it


class Token2Wav(nn.Module):
    """The two networks; ``models/flow_matching.py`` integrates the velocity of the first."""

    config: Token2WavConfig
    scan_layers: bool = True
    precision: Precision = "highest"
    remat: Remat = "none"  # of the DiT's layers
    # float32 even where the rest of the model is bfloat16: errors add up over 36 evaluations
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    def setup(self) -> None:
        self.dit, self.bigvgan = parts(self)

    def __call__(self, *args: Any) -> tuple[jax.Array, jax.Array]:
        """One evaluation of the DiT, and the vocoder's samples of it; for ``abstract_params``."""
        cond, uncond = self.dit(*args)
        mel = cond.reshape(1, -1, cond.shape[-1])
        return self.bigvgan(mel, np.array([mel.shape[1]])), uncond


def device_precision() -> Precision:
    """What serving needs: three bfloat16 passes of a TPU take half as long as six, and their error is not heard."""
    return "high" if jax.default_backend() == "tpu" else "highest"


def parts(model: Token2Wav) -> tuple[DiT, BigVGAN]:
    """The two networks, each to be called alone with its own part of the parameters: ``dit`` and ``bigvgan``."""
    kw: dict[str, Any] = dict(precision=model.precision, **dtypes(model))
    dit = DiT(model.config.dit_config, scan_layers=model.scan_layers, remat=model.remat, **kw)
    # layers are scanned where compiling is what takes long, and loops over taps are for the same places
    single_convs = not model.scan_layers
    return dit, BigVGAN(model.config.bigvgan_config, single_convs=single_convs, **kw)


def abstract_params(model: Token2Wav) -> Any:
    """Shapes, dtypes and logical axes of every parameter, in their boxes; nothing is computed."""
    return jax.eval_shape(functools.partial(init_params, model), jax.random.key(0))


def init_params(model: Token2Wav, key: jax.Array) -> Any:
    """Fresh parameters, in their boxes."""
    c = model.config.dit_config
    # one block, and the shortest clip whose edges can be mirrored
    blocks, _ = pack([c.block_size], c.block_size, 1)
    mel = np.zeros((1, c.block_size, c.mel_dim))
    codes = np.zeros((1, c.block_size), int)
    clip = np.zeros((1, shortest_clip(c), c.mel_dim))
    length = np.array([clip.shape[1]])
    cond = np.zeros((1, c.enc_emb_dim))
    return model.init(key, mel, codes, clip, length, cond, np.float32(0), blocks)["params"]

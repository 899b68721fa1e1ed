"""How inexact a first packet is whose vocoder looks ahead less than it needs to.

    python tools/first_packet_error.py

The vocoder with its published sizes and random weights makes the samples of 24 frames alone, as for a first packet of
24 codes, and those of a longer row. With random weights a sample depends more on what is near it than
with trained ones.
"""

from __future__ import annotations

import sys
from pathlib import Path

import jax
import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it also runs as a file

from omni_jax.config import DiTConfig, Token2WavConfig
from omni_jax.engine.token2wav_engine import make_vocoder_weights
from omni_jax.models import token2wav
from omni_jax.models.bigvgan import synthesize
from omni_jax.models.bigvgan_streaming import reach
from omni_jax.models.token2wav import Token2Wav
from tools.precision import make_params, relative_error

FRAMES = 24  # of the first packet
LOOK_AHEAD = (20, 15, 10, 5, 0)  # frames


def main() -> None:
    tyro.cli(lambda: None, description=__doc__)
    config = Token2WavConfig(dit_config=DiTConfig(num_hidden_layers=1))
    _, bigvgan = token2wav.parts(Token2Wav(config))
    c = config.bigvgan_config
    weights = make_vocoder_weights(bigvgan, make_params(config)["bigvgan"])
    frames = FRAMES + reach(c).ahead
    mel = np.random.default_rng(0).normal(-5.0, 2.0, (1, frames, c.mel_dim)).astype(np.float32)
    vocode = jax.jit(synthesize, static_argnums=0)
    exact = np.asarray(vocode(c, weights, mel, np.array([frames])))[0].reshape(frames, -1)
    alone = np.asarray(vocode(c, weights, mel[:, :FRAMES], np.array([FRAMES])))[0].reshape(FRAMES, -1)
    table = Table("look-ahead, frames", "sound in the packet, s", "error, relative", "of its last frame", box=None)
    for look_ahead in LOOK_AHEAD:
        count = FRAMES - look_ahead
        whole = relative_error(alone[:count], exact[:count])
        last = relative_error(alone[count - 1], exact[count - 1])
        table.add_row(str(look_ahead), f"{count / 100:.2f}", f"{whole:.1e}", f"{last:.1e}")
    Console().print(table)


if __name__ == "__main__":
    main()

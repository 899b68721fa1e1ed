"""What fewer passes of a TPU's matrix units cost in Token2Wav, in error.

    python tools/precision.py [--layers 22] [--blocks 4]

A TPU multiplies float32 numbers as sums of bfloat16 products: of six, of three or of one. A CPU computes the same sums
here, one product after the other, with the widths of the published model and random weights; what is compared with is
float32. The mel's error is that after all evaluations of the flow, the samples' that of the vocoder alone.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jax._src.lax.lax import _dot_general_lower  # as products are lowered else; nothing public has it
from jax.interpreters import mlir
from rich.console import Console
from rich.progress import track
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it also runs as a file

from omni_jax.config import BigVGANConfig, DiTConfig, Token2WavConfig
from omni_jax.engine.token2wav_engine import make_vocoder_weights
from omni_jax.engine.token2wav_lists import ListRequest, fill_lists, solve_blocks
from omni_jax.layers.precision import Precision
from omni_jax.models import token2wav
from omni_jax.models.bigvgan import synthesize
from omni_jax.models.ode_solver import Solver
from omni_jax.models.token2wav import Token2Wav

# of each number of passes, which pieces of the two numbers are multiplied: 0 is the largest
PASSES = {1: [(0, 0)], 3: [(0, 0), (0, 1), (1, 0)], 6: [(0, 0), (0, 1), (1, 0), (1, 1), (0, 2), (2, 0)]}


@dataclass(frozen=True)
class Options:
    """Prints a table of errors of one, three and six passes."""

    layers: int = 22
    """Of the DiT; 22 as published."""
    blocks: int = 4
    """Of speech, 0.24 seconds each."""


@dataclass(frozen=True)
class Sound:
    """What both networks make.

    Attributes:
      mel: float32 [N, F, mel].
      samples: float32 [samples], of a mel that is the same for all.
    """

    mel: np.ndarray
    samples: np.ndarray


def split_number(x: jax.Array, pieces: int) -> list[jax.Array]:
    """float32 as a sum of bfloat16 numbers, each what the ones before it left."""
    found = []
    for _ in range(pieces):
        piece = x.astype(jnp.bfloat16).astype(jnp.float32)
        found.append(piece)
        x = x - piece
    return found


def multiply_in_passes(
    x: jax.Array, y: jax.Array, *, passes: int, dimension_numbers: Any, preferred_element_type: Any
) -> jax.Array:
    """``dot_general`` as a TPU has it: so many products of bfloat16 numbers, added up in float32."""
    pairs = PASSES[passes]
    pieces = 1 + max(max(pair) for pair in pairs)
    x_pieces = split_number(x, pieces)
    y_pieces = split_number(y, pieces)
    total: jax.Array | float = 0.0
    # the small ones first
    for i, j in reversed(pairs):
        total += jax.lax.dot_general(
            x_pieces[i], y_pieces[j], dimension_numbers, "highest", preferred_element_type=preferred_element_type
        )
    assert isinstance(total, jax.Array)
    return total


def lower_in_passes(passes: int) -> None:
    """From now on products of the precision "high" are lowered to so many passes; those of "highest" stay float32."""
    jax.clear_caches()

    def lower(ctx: Any, x: Any, y: Any, *, precision: Any, **params: Any) -> Any:
        if precision is None or precision[0] != jax.lax.Precision.HIGH:
            return _dot_general_lower(ctx, x, y, precision=precision, platform="cpu", **params)
        chosen = {name: params[name] for name in ("dimension_numbers", "preferred_element_type")}
        rule = mlir.lower_fun(multiply_in_passes, multiple_results=False)
        return rule(ctx, x, y, passes=passes, **chosen)

    mlir.register_lowering(jax.lax.dot_general_p, lower, platform="cpu")


def make_sound(config: Token2WavConfig, params: Any, options: Options, precision: Precision) -> Sound:
    """A reply of random codes, with the products of both networks at this precision."""
    c = config.dit_config
    dit, bigvgan = token2wav.parts(Token2Wav(config, precision=precision))
    rng = np.random.default_rng(0)
    codes = rng.integers(0, c.num_embeds, options.blocks * c.block_size // c.repeats)
    speech, _ = fill_lists(c, [ListRequest(codes, 0, None, 0)], 1, lambda blocks: blocks)
    speakers = rng.standard_normal((1, 2, c.enc_dim)).astype(np.float32)
    cond = rng.standard_normal((1, c.enc_emb_dim)).astype(np.float32)
    mel = np.asarray(solve_blocks(dit, Solver(), params["dit"], speech, speakers, cond))
    weights = make_vocoder_weights(bigvgan, params["bigvgan"])
    # of the usual range of log-mel, in which the vocoder does not clip everything
    noise = rng.normal(-5.0, 2.0, (1, options.blocks * c.block_size, c.mel_dim)).astype(np.float32)
    samples = jax.jit(synthesize, static_argnums=0)(config.bigvgan_config, weights, noise, np.array([noise.shape[1]]))
    return Sound(mel, np.asarray(samples)[0])


def make_params(config: Token2WavConfig) -> Any:
    """Random numbers for all parameters of Token2Wav, of a size that keeps signals about as large as they come in."""
    shapes = nn.unbox(token2wav.abstract_params(Token2Wav(config)))
    rng = np.random.default_rng(1)

    def draw(leaf: Any, num_inputs: int) -> np.ndarray:
        scale = 1 / np.sqrt(num_inputs) if leaf.ndim > 1 else 0.1
        return (scale * rng.standard_normal(leaf.shape)).astype(np.float32)

    def draw_dit(leaf: Any) -> np.ndarray:
        # in front there are layers, or the taps of a small kernel
        return draw(leaf, max(1, int(np.prod(leaf.shape[1 if leaf.ndim > 2 else 0 : -1]))))

    def draw_vocoder(leaf: Any) -> np.ndarray:
        # each of its convolutions is added to what it reads
        return 0.3 * draw(leaf, max(1, int(np.prod(leaf.shape[:-1]))))

    return {"dit": jax.tree.map(draw_dit, shapes["dit"]), "bigvgan": jax.tree.map(draw_vocoder, shapes["bigvgan"])}


def relative_error(found: np.ndarray, expected: np.ndarray) -> float:
    """RMS of the difference over that of what is expected."""
    error = float(np.sqrt(np.mean((found - expected) ** 2) / np.mean(expected**2)))
    assert np.isfinite(error)
    return error


def main() -> None:
    options = tyro.cli(Options, description=__doc__)
    config = Token2WavConfig(dit_config=DiTConfig(num_hidden_layers=options.layers), bigvgan_config=BigVGANConfig())
    params = make_params(config)
    expected = make_sound(config, params, options, "highest")
    table = Table("passes", "mel, relative", "samples, relative", "samples, dB", box=None)
    for passes in track(sorted(PASSES, reverse=True), description="computing", console=Console(stderr=True)):
        lower_in_passes(passes)
        found = make_sound(config, params, options, "high")
        mel = relative_error(found.mel, expected.mel)
        samples = relative_error(found.samples, expected.samples)
        table.add_row(str(passes), f"{mel:.1e}", f"{samples:.1e}", f"{20 * np.log10(samples):.0f}")
    Console().print(table)


if __name__ == "__main__":
    main()

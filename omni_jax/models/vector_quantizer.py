"""A vector quantizer whose codebook is a moving average (https://arxiv.org/abs/1711.00937, appendix A.1).

No gradient changes the codebook. Each step sums the vectors of each code over the whole batch, which under ``jit`` is
the batch of all devices, and the averages of these sums give the codebook. Codes that nothing is near to any more are
replaced by vectors of the batch. All of it is float32.

Letters: P positions, D width, N codes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from omni_jax.batch import Array
from omni_jax.layers.precision import full_precision

SMOOTHING = 1e-5  # that each code's count has at least, as a share (Laplace smoothing)
DEAD_SHARE = 0.1  # of an even share of the vectors; a code with fewer is replaced


class CodeSums(NamedTuple):
    """Of a batch, by code.

    Attributes:
      counts: vectors of each code.
      sums: of these vectors.
      candidates: vectors of the batch, drawn at random, one for each code.
    """

    counts: Float[jax.Array, " N"]
    sums: Float[jax.Array, "N D"]
    candidates: Float[jax.Array, "N D"]


class VectorQuantizer(nn.Module):
    """The nearest of a codebook's vectors (reference ``EuclideanCodebook`` of qwen-tts).

    Parameters: ``codebook`` [N, D], and what it follows from, ``counts`` [N] and ``sums`` [N, D].
    """

    codebook_size: int
    width: int

    def setup(self) -> None:
        shape = (self.codebook_size, self.width)
        self.codebook = self.param("codebook", _partitioned(nn.initializers.uniform(1.0), "norm"), shape)
        self.counts = self.param("counts", _partitioned(nn.initializers.zeros), shape[:1])
        self.sums = self.param("sums", _partitioned(nn.initializers.zeros, "norm"), shape)

    @full_precision
    def encode(self, x: Float[Array, "*shape D"]) -> Int[jax.Array, "*shape"]:
        """The code of each vector."""
        x = jnp.asarray(x, jnp.float32)
        codebook = jnp.asarray(self.codebook)
        with jax.named_scope("nearest_code"):
            # the square of x is the same for every code
            similarity = 2 * x @ codebook.T - jnp.sum(jnp.square(codebook), axis=-1)  # [*shape, N]
            return jnp.argmax(similarity, axis=-1).astype(jnp.int32)

    def decode(self, codes: Int[Array, "*shape"]) -> Float[jax.Array, "*shape D"]:
        """The vector of each code; it has no gradient."""
        return jax.lax.stop_gradient(jnp.asarray(self.codebook))[jnp.asarray(codes)]

    def __call__(self, x: Float[Array, "*shape D"]) -> tuple[jax.Array, jax.Array]:
        """The vectors of the nearest codes, with the gradient passed straight through, and the codes."""
        codes = self.encode(jax.lax.stop_gradient(x))  # [*shape]
        vectors = self.decode(codes)  # [*shape, D]
        x = jnp.asarray(x)
        return x + jax.lax.stop_gradient(vectors - x), codes


def _partitioned(init: nn.initializers.Initializer, *axes: str) -> nn.initializers.Initializer:
    return nn.with_logical_partitioning(init, (None, *axes))


def sum_codes(
    x: Float[Array, "P D"], codes: Int[Array, " P"], valid: Bool[Array, " P"], num_codes: int, key: jax.Array
) -> CodeSums:
    """What a batch says of the codebook.

    Args:
      x: vectors before they are quantized.
      codes: of each.
      valid: which are no padding.
      num_codes: N.
      key: of the draw of candidates, the same on every device.
    """
    weight = jnp.asarray(valid, jnp.float32)  # [P]
    x = jnp.where(weight[:, None] > 0, jnp.asarray(x, jnp.float32), 0)  # [P, D]
    counts = jax.ops.segment_sum(weight, codes, num_codes)  # [N]
    sums = jax.ops.segment_sum(x, codes, num_codes)  # [N, D]
    # the place at which so many valid positions have come
    total = jnp.cumsum(weight)  # [P]
    drawn = jax.random.uniform(key, (num_codes,), maxval=jnp.maximum(total[-1], 1))  # [N]
    place = jnp.searchsorted(total, drawn, side="right")  # [N]
    return CodeSums(counts, sums, x[jnp.minimum(place, len(x) - 1)])


def update_codebook(
    params: Mapping[str, Float[Array, "N ..."]], found: CodeSums, decay: float
) -> dict[str, Float[jax.Array, "N ..."]]:
    """The parameters of a quantizer after a batch.

    Args:
      params: before it.
      found: what the batch has.
      decay: of the averages, in a step.
    """
    counts = decay * params["counts"] + (1 - decay) * found.counts  # [N]
    sums = decay * params["sums"] + (1 - decay) * found.sums  # [N, D]
    total = jnp.sum(counts)
    num_codes = len(counts)
    smoothed = (counts + SMOOTHING) / (total + num_codes * SMOOTHING) * total  # [N]
    even_share = total / num_codes
    is_dead = (counts < DEAD_SHARE * even_share)[:, None]  # [N, 1]
    # a code that is replaced has so much that it has some steps until it may be replaced again
    fresh_count = jnp.maximum(even_share, SMOOTHING)
    new = {
        "codebook": jnp.where(is_dead, found.candidates, sums / jnp.maximum(smoothed, SMOOTHING)[:, None]),
        "counts": jnp.where(is_dead[:, 0], fresh_count, counts),
        "sums": jnp.where(is_dead, fresh_count * found.candidates, sums),
    }
    # a batch of padding alone says nothing
    is_empty = jnp.sum(found.counts) == 0
    return {name: jnp.where(is_empty, params[name], value) for name, value in new.items()}


def perplexity(counts: Float[Array, " N"]) -> Float[jax.Array, ""]:
    """Of the distribution of codes: how many there would be if all that are used were equally frequent."""
    share = counts / jnp.maximum(jnp.sum(counts), 1e-9)  # [N]
    return jnp.exp(-jnp.sum(jnp.where(share > 0, share * jnp.log(jnp.maximum(share, 1e-12)), 0)))

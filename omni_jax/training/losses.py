"""The loss of the next word, without the scores of all words at all positions ever existing at once.

Letters: B rows, S positions, D width, V words, n chunks of c positions, s parts of a row (mesh axis ``sequence``).
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

from omni_jax.batch import Array
from omni_jax.sharding import axes_of, constrain


def next_token_loss(
    head: Float[Array, "D V"],
    hidden: Float[Array, "B S D"],
    targets: Int[Array, "B S"],
    weights: Float[Array, "B S"],
    *,
    chunk: int,
    z_loss: float = 0.0,
    head_trains: bool = True,
) -> tuple[Float[jax.Array, ""], Float[jax.Array, ""]]:
    """Cross-entropy, added up with the weights, in float32 (section 6).

    The gradients are made along with the loss, chunk by chunk, so that no scores are computed twice.

    Args:
      head: the last layer; it is cast to the dtype of ``hidden`` and brought together on every device once.
      hidden: what it is multiplied with.
      targets: the right words.
      weights: of the positions; such that they add up to 1 for a mean.
      chunk: c, which divides each part of a row.
      z_loss: times log(sum(exp(scores)))^2 is added, which keeps the scores from drifting away.
      head_trains: False leaves the gradient of ``head`` out.

    Returns:
      The sum with the z-loss, which is what is differentiated, and the sum without, which is to be looked at only.
    """
    whole = constrain(jnp.asarray(head, hidden.dtype), None, "vocab")
    pieces = [_split(a, chunk) for a in (hidden, targets, weights)]
    return _differentiable_sums(whole, *pieces, z_loss, head_trains)


def _split(x: Array, chunk: int) -> jax.Array:
    """[B, S, ...] to [n, B, s, c, ...], so that a chunk has positions of every device's part of a row."""
    mesh = jax.sharding.get_abstract_mesh()
    parts = math.prod(mesh.shape[axis] for axis in axes_of("sequence", x.shape[1]) or ())
    split = jnp.asarray(x).reshape(x.shape[0], parts, -1, chunk, *x.shape[2:])
    return constrain(jnp.moveaxis(split, 2, 0), None, "batch", "sequence", *[None] * (x.ndim - 1))


def _sums(
    head: jax.Array, hidden: jax.Array, targets: jax.Array, weights: jax.Array, z_loss: float, head_trains: bool
) -> tuple[jax.Array, jax.Array]:
    def one(sums: tuple[jax.Array, jax.Array], piece: tuple[jax.Array, ...]) -> tuple[Any, None]:
        losses, _ = _piece(head, piece, z_loss)
        return (sums[0] + losses[0], sums[1] + losses[1]), None

    return jax.lax.scan(one, (jnp.float32(0), jnp.float32(0)), (hidden, targets, weights))[0]


def _sums_and_gradients(
    head: jax.Array, hidden: jax.Array, targets: jax.Array, weights: jax.Array, z_loss: float, head_trains: bool
) -> tuple[Any, Any]:
    def one(carry: tuple[Any, ...], piece: tuple[jax.Array, ...]) -> tuple[Any, jax.Array]:
        total, plain, by_head = carry
        (more, more_plain), by_scores = _piece(head, piece, z_loss)
        by_scores = by_scores.astype(head.dtype)
        if head_trains:
            product = jnp.einsum("bscd,bscv->dv", piece[0], by_scores, preferred_element_type=jnp.float32)
            by_head = constrain(by_head + product, None, "vocab")
        return (total + more, plain + more_plain, by_head), jnp.einsum("bscv,dv->bscd", by_scores, head)

    zeros = jnp.zeros(head.shape if head_trains else (), jnp.float32)
    start = (jnp.float32(0), jnp.float32(0), zeros)
    (total, plain, by_head), by_hidden = jax.lax.scan(one, start, (hidden, targets, weights))
    return (total, plain), (by_head, by_hidden, head)


def _backward(z_loss: float, head_trains: bool, residuals: Any, cotangents: Any) -> tuple[Any, ...]:
    by_head, by_hidden, head = residuals
    by_head = (by_head * cotangents[0]).astype(head.dtype) if head_trains else jnp.zeros_like(head)
    return by_head, by_hidden * cotangents[0].astype(by_hidden.dtype), None, None


_differentiable_sums = jax.custom_vjp(_sums, nondiff_argnums=(4, 5))
_differentiable_sums.defvjp(_sums_and_gradients, _backward)


def _piece(
    head: jax.Array, piece: tuple[jax.Array, ...], z_loss: float
) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
    """Of a chunk [B, s, c]: both sums, and the gradient of the first by the scores, [B, s, c, V]."""
    hidden, targets, weights = piece
    scores = jnp.einsum("bscd,dv->bscv", hidden, head, preferred_element_type=jnp.float32)
    normaliser = jax.nn.logsumexp(scores, axis=-1, keepdims=True)
    # a comparison instead of a look-up, because the words are spread over devices
    right = jnp.arange(head.shape[1]) == targets[..., None]
    weights = weights[..., None]
    plain = jnp.sum(weights * (normaliser - jnp.sum(jnp.where(right, scores, 0), axis=-1, keepdims=True)))
    total = plain + z_loss * jnp.sum(weights * normaliser**2)
    share = jnp.exp(scores - normaliser)
    return (total, plain), weights * ((1 + 2 * z_loss * normaliser) * share - right)

"""Losses of the next token, without the logits of all positions ever existing at once.

Letters: B rows, S positions, D width, V vocabulary, n chunks of c positions, s parts of a row (mesh axis ``sequence``).
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

from omni_jax.batch import Array
from omni_jax.sharding import axes_of, constrain


class NextTokenLoss(NamedTuple):
    """Weighted losses, float32."""

    total: Float[jax.Array, ""]  # summed over positions, with the z-loss; this is differentiated
    cross_entropy: Float[jax.Array, "B S"]  # of each position, without it; this is reported


class _Chunk(NamedTuple):
    """Some positions of every device's part of every row; stacked, with a leading axis n, for a scan."""

    hidden: Float[jax.Array, "*n B s c D"]
    targets: Int[jax.Array, "*n B s c"]
    weights: Float[jax.Array, "*n B s c"]


def next_token_loss(
    head: Float[Array, "D V"],
    hidden: Float[Array, "B S D"],
    targets: Int[Array, "B S"],
    weights: Float[Array, "B S"],
    *,
    chunk: int,
    z_loss: float = 0.0,
    head_trains: bool = True,
) -> NextTokenLoss:
    """Cross-entropy of the next token, times the weights, in float32 (docs/reference.md, 6).

    The gradients are computed along with the loss, chunk by chunk, so that no logits are computed twice.

    Args:
      head: the last layer; it is cast to the dtype of ``hidden`` and gathered on every device once.
      hidden: the decoder's output, which the head multiplies.
      targets: the next token of each position.
      weights: of the positions; they add up to 1 for a mean.
      chunk: c, which divides each part of a row.
      z_loss: factor of log(sum(exp(logits)))^2, which keeps the logits from drifting (https://arxiv.org/abs/2204.02311,
        section 5).
      head_trains: False leaves the gradient of ``head`` out.
    """
    # once, and not in every chunk of the scan
    gathered = constrain(jnp.asarray(head, hidden.dtype), None, "vocab")  # [D, V]
    chunks = _Chunk(_split(hidden, chunk), _split(targets, chunk), _split(weights, chunk))
    with jax.named_scope("next_token_loss"):
        losses = _loss(gathered, chunks, z_loss, head_trains)
    # back to the order of positions
    by_part = jnp.moveaxis(losses.cross_entropy, 0, 2)  # [B, s, n, c]
    return losses._replace(cross_entropy=by_part.reshape(targets.shape))


def _split(x: Array, chunk: int) -> jax.Array:
    """[B, S, ...] to [n, B, s, c, ...], so that a chunk has positions of every device's part of a row."""
    mesh = jax.sharding.get_abstract_mesh()
    # 1 without a mesh, or where its sequence axis does not divide a row
    parts = math.prod(mesh.shape[axis] for axis in axes_of("sequence", x.shape[1]) or ())
    # cut along S alone, a chunk would lie on one device of the axis, and the others would wait for it
    split = jnp.asarray(x).reshape(x.shape[0], parts, -1, chunk, *x.shape[2:])  # [B, s, n, c, ...]
    # n in front, for scan takes its steps along the first axis
    return constrain(jnp.moveaxis(split, 2, 0), None, "batch", "sequence", *[None] * (x.ndim - 1))


def _forward(head: jax.Array, chunks: _Chunk, z_loss: float, head_trains: bool) -> NextTokenLoss:
    """The loss where no gradient is asked for; ``cross_entropy`` is [n, B, s, c]."""

    def add_chunk(total: jax.Array, chunk: _Chunk) -> tuple[jax.Array, jax.Array]:
        losses, _ = _chunk_loss(head, chunk, z_loss)
        return total + losses.total, losses.cross_entropy

    # the same scan as below without the products of the gradients; XLA drops the unused gradient of the logits
    return NextTokenLoss(*jax.lax.scan(add_chunk, jnp.float32(0), chunks))


def _forward_with_gradients(
    head: jax.Array, chunks: _Chunk, z_loss: float, head_trains: bool
) -> tuple[NextTokenLoss, tuple[jax.Array, ...]]:
    """The loss, and its gradients as residuals."""

    def add_chunk(carry: tuple[jax.Array, jax.Array], chunk: _Chunk) -> tuple[Any, tuple[jax.Array, jax.Array]]:
        total, head_gradient = carry
        losses, logits_gradient = _chunk_loss(head, chunk, z_loss)
        # in the dtype of computation for both products; that of the head still sums in float32
        logits_gradient = logits_gradient.astype(head.dtype)  # [B, s, c, V]
        if head_trains:
            product = jnp.einsum("bscd,bscv->dv", chunk.hidden, logits_gradient, preferred_element_type=jnp.float32)
            head_gradient = constrain(head_gradient + product, None, "vocab")  # [D, V]
        hidden_gradient = jnp.einsum("bscv,dv->bscd", logits_gradient, head)  # [B, s, c, D]
        return (total + losses.total, head_gradient), (losses.cross_entropy, hidden_gradient)

    # the gradient of the head is summed in float32 over all chunks; that of a frozen head is never made
    head_zeros = jnp.zeros(head.shape if head_trains else (), jnp.float32)  # [D, V] or []
    (total, head_gradient), (cross_entropy, hidden_gradient) = jax.lax.scan(
        add_chunk, (jnp.float32(0), head_zeros), chunks
    )
    return NextTokenLoss(total, cross_entropy), (head_gradient, hidden_gradient, head)


def _backward(
    z_loss: float, head_trains: bool, residuals: tuple[jax.Array, ...], cotangents: NextTokenLoss
) -> tuple[Any, ...]:
    # the gradients were computed for a cotangent of 1, and are linear in it
    head_gradient, hidden_gradient, head = residuals
    # that of ``cross_entropy`` is left out: it is reported and never differentiated
    scale = cotangents.total
    # a frozen head still needs a cotangent of its shape; nothing reads the zeros, so XLA leaves them out
    by_head = (head_gradient * scale).astype(head.dtype) if head_trains else jnp.zeros_like(head)
    by_hidden = hidden_gradient * scale.astype(hidden_gradient.dtype)
    return by_head, _Chunk(by_hidden, None, None)  # type: ignore[arg-type]  # None: targets and weights have none


# z_loss and head_trains, the third and fourth argument, are Python values and not traced
_loss = jax.custom_vjp(_forward, nondiff_argnums=(2, 3))
_loss.defvjp(_forward_with_gradients, _backward)


def _chunk_loss(head: jax.Array, chunk: _Chunk, z_loss: float) -> tuple[NextTokenLoss, jax.Array]:
    """Of one chunk the losses, and the gradient of ``total`` by the logits, [B, s, c, V]."""
    # inputs in the dtype of computation, the product in float32: the loss is never rounded to bfloat16
    logits = jnp.einsum("bscd,dv->bscv", chunk.hidden, head, preferred_element_type=jnp.float32)  # [B, s, c, V]
    log_normalizer = jax.nn.logsumexp(logits, axis=-1, keepdims=True)  # [B, s, c, 1]
    weights = chunk.weights[..., None]  # [B, s, c, 1]
    # a comparison instead of a look-up, because the vocabulary is spread over devices
    is_target = jnp.arange(head.shape[1]) == chunk.targets[..., None]  # [B, s, c, V]
    target_logit = jnp.sum(jnp.where(is_target, logits, 0), axis=-1, keepdims=True)  # [B, s, c, 1]
    cross_entropy = weights * (log_normalizer - target_logit)  # [B, s, c, 1]
    total = jnp.sum(cross_entropy + z_loss * weights * log_normalizer**2)

    # the derivative of log_normalizer by the logits is the softmax, so that of its square is 2 log_normalizer times it
    probabilities = jnp.exp(logits - log_normalizer)  # [B, s, c, V]
    gradient = weights * ((1 + 2 * z_loss * log_normalizer) * probabilities - is_target)  # [B, s, c, V]
    return NextTokenLoss(total, cross_entropy[..., 0]), gradient


class TokenLogProbs(NamedTuple):
    """Of the next tokens, in float32."""

    log_probs: Float[jax.Array, "B S"]  # of each token
    is_top: Float[jax.Array, "B S"]  # 1 where no other token is more likely


def token_log_probs(
    head: Float[Array, "D V"], hidden: Float[Array, "B S D"], targets: Int[Array, "B S"], *, chunk: int
) -> TokenLogProbs:
    """Log-probabilities of the next tokens, each of which may be differentiated by itself.

    Logits are computed again for the gradient, chunk by chunk, so this is for vocabularies as small as the Talker's;
    ``next_token_loss`` is for the Thinker's.

    Args:
      head: the last layer; it is cast to the dtype of ``hidden`` and gathered on every device once.
      hidden: the decoder's output, which the head multiplies.
      targets: the next token of each position.
      chunk: c, which divides each part of a row.
    """
    gathered = constrain(jnp.asarray(head, hidden.dtype), None, "vocab")  # [D, V]

    @jax.checkpoint
    def of_chunk(head: jax.Array, hidden: jax.Array, targets: jax.Array) -> TokenLogProbs:
        logits = jnp.einsum("bscd,dv->bscv", hidden, head, preferred_element_type=jnp.float32)  # [B, s, c, V]
        # a comparison instead of a look-up, because the vocabulary may be spread over devices
        is_target = jnp.arange(head.shape[1]) == targets[..., None]  # [B, s, c, V]
        target_logit = jnp.sum(jnp.where(is_target, logits, 0), axis=-1)  # [B, s, c]
        is_top = target_logit >= jax.lax.stop_gradient(jnp.max(logits, axis=-1))
        return TokenLogProbs(target_logit - jax.nn.logsumexp(logits, axis=-1), is_top.astype(jnp.float32))

    def take_chunk(_: None, chunk: tuple[jax.Array, jax.Array]) -> tuple[None, TokenLogProbs]:
        return None, of_chunk(gathered, *chunk)

    with jax.named_scope("token_log_probs"):
        _, found = jax.lax.scan(take_chunk, None, (_split(hidden, chunk), _split(targets, chunk)))

    def join(values: jax.Array) -> jax.Array:
        # back to the order of positions
        return jnp.moveaxis(values, 0, 2).reshape(targets.shape)  # [n, B, s, c] to [B, S]

    return TokenLogProbs(join(found.log_probs), join(found.is_top))

"""What the Thinker's and the Talker's engines share: slots, the context of a decoder, and reading results.

A decoder's batch is a fixed number of slots. A request's prompt is prefilled into a context of its own and then
inserted into a slot; the slot is free again when the request has no more use for it. Shapes never change but for the
capacity of the caches, which doubles, so one program serves all steps of a capacity.

Letters: B slots, R slots of a prefix, C positions of a chunk, D hidden width, K tokens of a call.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.sharding import Mesh, Sharding
from jaxtyping import Bool, Float, Int

from omni_jax.batch import Array
from omni_jax.config import DecoderConfig
from omni_jax.models.decoder import KVCache
from omni_jax.sharding import constrain, replicate

Tree = TypeVar("Tree")

PAD_TOKEN = -1  # in place of a token or a code where a slot has none
MIN_CAPACITY = 256  # positions of a cache at least


@struct.dataclass
class Context:
    """What the decoder of each slot has read."""

    hidden: Float[Array, "B D"]  # of the last position
    position: Int[Array, " B"]  # the position id of the next one
    cache: KVCache

    @property
    def capacity(self) -> int:
        return self.cache.capacity


@dataclass(frozen=True)
class DecodedTokens:
    """What one call of a decode loop gave, on the host.

    Attributes:
      tokens: int32 [B, K], ``PAD_TOKEN`` behind the last token of a slot.
      remaining: int32 [B], how many tokens each slot may still decode; 0: it has finished.
    """

    tokens: np.ndarray
    remaining: np.ndarray

    def at_slot(self, slot: int) -> np.ndarray:
        """The tokens of a slot, without padding."""
        tokens = self.tokens[slot]
        return tokens[tokens != PAD_TOKEN]


@dataclass(frozen=True)
class DecodeResult:
    """The same on the device, packed into one array so that one copy brings all of it to the host.

    Attributes:
      packed: int32 [B, K + 1], the tokens and then what remains.
    """

    packed: jax.Array

    def to_host(self) -> DecodedTokens:
        (decoded,) = read_results([self])
        return decoded


def read_results(results: Sequence[DecodeResult]) -> list[DecodedTokens]:
    """Copies results to the host, all of them in one transfer."""
    arrays = jax.device_get([result.packed for result in results])
    return [DecodedTokens(array[:, :-1], array[:, -1]) for array in arrays]


def wait_for_result(result: DecodeResult) -> None:
    """Waits until a result is computed. It raises the device's error, if there was one."""
    jax.block_until_ready(result.packed)


def pack_result(tokens: Int[Array, "B K"], remaining: Int[Array, " B"]) -> Int[jax.Array, "B K+1"]:
    """The array of a ``DecodeResult``, the same on every device of the mesh."""
    remaining = jnp.asarray(remaining)[:, None]
    return replicate(jnp.concatenate([tokens, remaining], axis=1))


def round_capacity(num_positions: int) -> int:
    """The capacity of a cache for so many positions: a power of two, so that few programs serve all lengths."""
    return max(MIN_CAPACITY, 1 << (num_positions - 1).bit_length())


def on_mesh(mesh: Mesh | None) -> contextlib.AbstractContextManager[Any]:
    """A context in which programs are traced for ``mesh``; it does nothing without one."""
    return contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh)


def apply_method(model: nn.Module, method: str, params: Any, *args: Any) -> Any:
    """Calls a method of a module with these parameters."""
    return model.apply({"params": params}, *args, method=method)


# module and method name are static: they select the program, and equal modules share it
jit_method = jax.jit(apply_method, static_argnums=(0, 1))


def is_deleted(tree: Any) -> bool:
    """Whether a call that failed has used up an array of this state."""
    return any(isinstance(leaf, jax.Array) and leaf.is_deleted() for leaf in jax.tree.leaves(tree))


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _init_context(model: Any, config: DecoderConfig, num_slots: int, capacity: int) -> Context:
    # one jitted function: on a mesh no device ever allocates more than its own part
    cache_dtype = model.dtype if model.cache_dtype is None else model.cache_dtype
    cache = KVCache.init(config, num_slots, capacity, model.scan_layers, cache_dtype)
    hidden = constrain(jnp.zeros((num_slots, config.hidden_size), model.dtype), "batch", "width")
    return Context(hidden, replicate(jnp.zeros(num_slots, jnp.int32)), cache)


def init_context(
    model: Any, config: DecoderConfig, num_slots: int, capacity: int, placement: Sharding, mesh: Mesh | None
) -> Context:
    """Slots that have read nothing.

    Args:
      model: a Thinker or a Talker; says how layers are stored and in which dtype.
      config: of its decoder.
      num_slots: B.
      capacity: positions of each slot at least; rounded up.
      placement: where the host's arrays are put (``sharding.host_sharding``).
      mesh: over which the parameters are sharded.
    """
    with on_mesh(mesh):
        context = _init_context(model, config, num_slots, round_capacity(capacity))
    return commit(context, placement, mesh)


def commit(tree: Tree, placement: Sharding, mesh: Mesh | None) -> Tree:
    """Fixes where new arrays lie.

    A program is compiled once for arrays that are committed to a device and once more for arrays that are not; what
    comes out of a program with parameters is committed.
    """
    # with a mesh, the sharding constraints inside the program have committed its results
    return tree if mesh is not None else jax.device_put(tree, placement)


# nothing is donated: XLA cannot reuse a buffer for an array of another shape
@functools.partial(jax.jit, static_argnames="capacity")
def resize_context(context: Context, capacity: int) -> Context:
    """The same with a cache of this capacity."""
    return dataclasses.replace(context, cache=context.cache.resize(capacity))


def insert_context(context: Context, slot: Int[Array, ""], prefix: Context) -> Context:
    """The first slot of ``prefix``, which has the same capacity, in place of a slot."""
    hidden = insert_slot(context.hidden, slot, prefix.hidden)
    position = replicate(insert_slot(context.position, slot, prefix.position))
    return Context(hidden, position, context.cache.insert(slot, prefix.cache))


def insert_slot(tree: Tree, slot: Int[Array, ""], prefix: Tree) -> Tree:
    """The first slot of every array of ``prefix`` in place of a slot of ``tree``'s; axis 0 holds the slots."""

    def insert(array: Array, first: Array) -> jax.Array:
        return jnp.asarray(array).at[slot].set(jnp.asarray(first)[0])

    return jax.tree.map(insert, tree, prefix)


def advance_context(
    context: Context,
    hidden: Float[Array, "B C D"],
    valid: Bool[Array, "B C"],
    delta: Int[Array, " B"],
    cache: KVCache,
) -> Context:
    """The context after a chunk; a slot that read nothing of it stays as it is.

    Args:
      context: before the chunk.
      hidden: hidden states of the chunk's positions.
      valid: which positions are real; those of a slot come first.
      delta: next position id minus number of tokens (``mrope.position_ids``).
      cache: with the chunk in it.
    """
    count = jnp.sum(valid, axis=1, dtype=jnp.int32)  # [B]
    has_read = count > 0  # [B]
    # the real positions come first, so the last of them is at count - 1
    # a slot that read nothing takes index 0, and drops it below
    index = jnp.maximum(count - 1, 0)[:, None, None]  # [B, 1, 1]
    last = jnp.take_along_axis(hidden, index, axis=1)[:, 0]  # [B, D]
    # count + delta is one more than the largest id of the chunk
    # ids go on after the largest one of the dialogue
    position = jnp.maximum(context.position, jnp.where(has_read, count + delta, 0))  # [B]
    hidden = jnp.where(has_read[:, None], last, context.hidden)
    return Context(hidden, replicate(position), cache)


def step_context(context: Context, hidden: Float[Array, "B 1 D"], active: Bool[Array, " B"], cache: KVCache) -> Context:
    """The context after one decoded position of the active slots."""
    # a slot that waits keeps its hidden state: its next token is drawn from it
    hidden = jnp.where(active[:, None], hidden[:, 0], context.hidden)  # [B, D]
    return Context(hidden, context.position + active, cache)


def step_position_ids(context: Context) -> Int[jax.Array, "3 B 1"]:
    """The TMRoPE ids of the next position: text and codes count up on all three axes at once."""
    position = jnp.asarray(context.position)
    return jnp.broadcast_to(position[None, :, None], (3, len(position), 1))

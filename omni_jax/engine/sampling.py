"""Choosing the next token: one jittable function for a batch whose slots each have their own parameters.

The order is that of transformers' logits processors: repetition penalty, suppressed tokens, temperature, top-k, top-p,
then the draw. A slot's random numbers depend on its own seed and step alone, so a request draws the same tokens
whatever is decoded beside it.

Letters: B slots, V vocabulary, K ranked tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Bool, Float, Int, UInt32

from omni_jax.batch import Array
from omni_jax.checks import SEED_MAX, check_float, check_int

MAX_TEMPERATURE = 100.0
MIN_TEMPERATURE = 1e-4  # below it the quotient of logits may leave float32: such a slot is greedy
MIN_PENALTY = 0.01
MAX_PENALTY = 100.0
NUM_RANKED = 64  # the Talker's default top-k is 40, so most settings draw from no more than these
_DRAW_GROUP = 512  # tokens whose weights are added up before a draw

_MINUS_INFINITY = -jnp.inf


@dataclass(frozen=True)
class SamplingParams:
    """How one request's tokens are chosen.

    Raises:
      InputError: for a value that is no number or out of range; it names the field and the limits.
    """

    temperature: float = 0.0
    """0 takes the most probable token each time (greedy); more varies more. At most 100."""
    top_k: int = 0
    """Draw among the k most probable tokens; 0: among all."""
    top_p: float = 1.0
    """Draw among the most probable tokens that together have this probability, above 0; 1: among all."""
    repetition_penalty: float = 1.0
    """Above 1 makes every token of the prompt and of the reply so far less probable. From 0.01 to 100."""
    seed: int | None = None
    """Of the random draws, below 2**32; the same seed draws the same tokens. Text without one takes 0."""

    def __post_init__(self) -> None:
        check_float("temperature", self.temperature, 0, MAX_TEMPERATURE)
        check_int("top_k", self.top_k, 0, hint="0: all tokens")
        check_float("top_p", self.top_p, 0, 1, above=True)
        check_float("repetition_penalty", self.repetition_penalty, MIN_PENALTY, MAX_PENALTY)
        if self.seed is not None:
            check_int("seed", self.seed, 0, SEED_MAX)

    @classmethod
    def names(cls) -> list[str]:
        """The names of the fields, in order."""
        return [field.name for field in dataclasses.fields(cls)]


def pop_sampling(options: dict[str, Any], default: SamplingParams) -> SamplingParams:
    """Takes the sampling fields out of flat keyword arguments.

    Args:
      options: keyword arguments; those that are fields of ``SamplingParams`` are removed from it.
      default: of the fields that are not given.

    Raises:
      InputError: for a value out of range.
    """
    values = {}
    for name in SamplingParams.names():
        if name in options:
            values[name] = options.pop(name)
    return dataclasses.replace(default, **values)


@struct.dataclass
class SamplingState:
    """The parameters of every slot, and what their draws depend on."""

    temperature: Float[Array, " B"]  # 0: greedy
    top_k: Int[Array, " B"]  # the size of the vocabulary: among all tokens
    top_p: Float[Array, " B"]
    penalty: Float[Array, " B"]
    seed: UInt32[Array, " B"]
    step: Int[Array, " B"]  # tokens drawn so far
    seen: Bool[Array, "B V"]  # which tokens the prompt and the reply hold


def make_sampling_state(
    params: Sequence[SamplingParams], prompts: Sequence[Int[np.ndarray, " S"]], vocab_size: int
) -> SamplingState:
    """The state before the first draw, in numpy arrays.

    Args:
      params: of each slot.
      prompts: the token ids of each slot that the repetition penalty counts from the beginning.
      vocab_size: V.
    """
    num_slots = len(params)
    state = SamplingState(
        temperature=np.zeros(num_slots, np.float32),
        top_k=np.zeros(num_slots, np.int32),
        top_p=np.zeros(num_slots, np.float32),
        penalty=np.zeros(num_slots, np.float32),
        seed=np.zeros(num_slots, np.uint32),
        step=np.zeros(num_slots, np.int32),
        seen=np.zeros((num_slots, vocab_size), bool),
    )
    for slot, own in enumerate(params):
        is_random = own.temperature >= MIN_TEMPERATURE
        state.temperature[slot] = own.temperature if is_random else 0.0
        # the device knows no special value for "all tokens": a top k as large as the vocabulary keeps all
        state.top_k[slot] = min(own.top_k or vocab_size, vocab_size)
        state.top_p[slot] = own.top_p
        state.penalty[slot] = own.repetition_penalty
        state.seed[slot] = own.seed or 0
    for slot, prompt in enumerate(prompts):
        state.seen[slot, prompt] = True
    return state


def init_sampling_state(num_slots: int, vocab_size: int) -> SamplingState:
    """Greedy slots that have seen nothing."""
    empty_prompt = np.zeros(0, np.int32)
    return make_sampling_state([SamplingParams()] * num_slots, [empty_prompt] * num_slots, vocab_size)


def select_slots(is_new: Bool[Array, " B"], new: SamplingState, old: SamplingState) -> SamplingState:
    """``new`` in the slots where ``is_new``, ``old`` in the others."""

    def select(new_leaf: Array, old_leaf: Array) -> jax.Array:
        # a flag of each slot, for the slots of arrays with any number of further axes
        mask = jnp.reshape(is_new, (-1, *[1] * (jnp.ndim(new_leaf) - 1)))
        return jnp.where(mask, new_leaf, old_leaf)

    return jax.tree.map(select, new, old)


def sample(
    logits: Float[Array, "B V"],
    state: SamplingState,
    active: Bool[Array, " B"],
    suppressed: Bool[Array, " V"] | None = None,
) -> tuple[Int[jax.Array, " B"], SamplingState]:
    """Draws one token for each slot.

    Args:
      logits: of the next token.
      state: of the slots.
      active: slots whose token counts; the others' state stays as it is.
      suppressed: tokens that are never drawn.

    Returns:
      The tokens, those of inactive slots without meaning, and the state after them.
    """
    # the order of transformers: the penalty sees the model's own logits, and comes before the suppression
    logits = _penalize(jnp.asarray(logits, jnp.float32), state)
    if suppressed is not None:
        logits = jnp.where(suppressed, _MINUS_INFINITY, logits)
    greedy = jnp.argmax(logits, axis=-1).astype(jnp.int32)  # [B]
    is_random = state.temperature > 0
    # ranking a vocabulary costs more than a decode step of a small model: only where a slot asks for it
    drawn = jax.lax.cond(jnp.any(is_random), _draw, lambda *_: greedy, logits, state)
    # a greedy slot does not depend on whether others are random
    tokens = jnp.where(is_random, drawn, greedy)
    slots = jnp.arange(len(tokens))
    # max is a logical or: an inactive slot adds nothing, and what was seen stays so
    seen = jnp.asarray(state.seen).at[slots, tokens].max(active)  # [B, V]
    return tokens, dataclasses.replace(state, seen=seen, step=state.step + active)


def filter_logits(
    logits: Float[Array, "B V"], top_k: Int[Array, " B"], top_p: Float[Array, " B"]
) -> Float[jax.Array, "B V"]:
    """Minus infinity for every token outside the top k, and then outside the top p of what remains.

    A slot whose top k are among its ``NUM_RANKED`` most probable tokens, with all that tie with the last of them, needs
    no more than these ranked; the whole vocabulary is searched only where some slot needs more.
    """
    ranked = jax.lax.top_k(logits, min(NUM_RANKED, logits.shape[-1]))[0]  # [B, K]
    # jnp.min, not ranked[:, -1:]: when XLA sees a slice taken, it turns top_k into a sort of the vocabulary
    smallest = jnp.min(ranked, axis=-1)  # [B]
    # a logit equal to the smallest ranked one may have equals that are not ranked
    suffices = (top_k <= ranked.shape[-1]) & (_kth_largest(ranked, top_k)[:, 0] > smallest)  # [B]
    # of a slot that these do not suffice for, it is wrong and is not used
    few_threshold = _threshold(ranked, top_k, top_p)  # [B, 1]

    def search_all() -> jax.Array:
        return jnp.where(suffices[:, None], few_threshold, _search_threshold(logits, top_k, top_p))

    threshold = jax.lax.cond(jnp.all(suffices), lambda: few_threshold, search_all)  # [B, 1]
    return jnp.where(logits >= threshold, logits, _MINUS_INFINITY)


def _penalize(logits: Float[jax.Array, "B V"], state: SamplingState) -> jax.Array:
    penalty = jnp.asarray(state.penalty)[:, None]
    # above 1 it makes any token less probable: a negative logit is multiplied, since division would raise it
    penalized = jnp.where(logits > 0, logits / penalty, logits * penalty)
    return jnp.where(state.seen, penalized, logits)


def _draw(logits: Float[jax.Array, "B V"], state: SamplingState) -> Int[jax.Array, " B"]:
    is_random = state.temperature > 0
    scaled = logits / jnp.where(is_random, state.temperature, 1)[:, None]  # [B, V]
    # computed once: the compiler for TPUs would make it a part of every reader, and take twice as long
    scaled = jax.lax.optimization_barrier(scaled)
    # a greedy slot's draw is not used: top-k 1 keeps it from having its whole vocabulary sorted
    top_k = jnp.where(is_random, state.top_k, 1)
    filtered = filter_logits(scaled, top_k, state.top_p)

    def draw_uniform(seed: jax.Array, step: jax.Array) -> jax.Array:
        # from seed and step alone: the draw does not depend on how steps are grouped into calls
        return jax.random.uniform(jax.random.fold_in(jax.random.key(seed), step))

    uniform = jax.vmap(draw_uniform)(jnp.asarray(state.seed), jnp.asarray(state.step))  # [B]
    # the most probable token is inside whatever the settings, so some weight is 1
    weight = jnp.exp(filtered - jnp.max(filtered, axis=-1, keepdims=True))  # [B, V]
    return _invert_cumulative(weight, uniform)


def _invert_cumulative(weight: Float[jax.Array, "B V"], uniform: Float[jax.Array, " B"]) -> Int[jax.Array, " B"]:
    """The token up to which weights add up to the share ``uniform`` of all; never one without weight.

    First the group of tokens is found, then the token in it, so that no sum runs over the whole vocabulary.
    """
    num_groups = -(-weight.shape[-1] // _DRAW_GROUP)
    padding = num_groups * _DRAW_GROUP - weight.shape[-1]
    grouped = jnp.pad(weight, ((0, 0), (0, padding))).reshape(-1, num_groups, _DRAW_GROUP)  # [B, G, members]
    of_group = jnp.sum(grouped, axis=-1)  # [B, G]
    point = uniform * jnp.sum(of_group, axis=-1)  # [B]
    group, rest = _find_share(of_group, point)
    members = jnp.take_along_axis(grouped, group[:, None, None], axis=1)[:, 0]  # [B, members]
    return group * _DRAW_GROUP + _find_share(members, rest)[0]


def _find_share(
    weight: Float[jax.Array, "B N"], point: Float[jax.Array, " B"]
) -> tuple[Int[jax.Array, " B"], Float[jax.Array, " B"]]:
    """The first index at which the sum of weights is above ``point``, and how far the point lies above that before."""
    total = jnp.cumsum(weight, axis=-1)  # [B, N]
    index = jnp.arange(weight.shape[-1])
    has_weight = weight > 0
    # rounding may leave the point at the sum of all: then it is the last that has weight
    last = jnp.max(jnp.where(has_weight, index, 0), axis=-1)  # [B]
    above = has_weight & ((total > point[:, None]) | (index == last[:, None]))
    found = jnp.argmax(above, axis=-1).astype(jnp.int32)  # [B]
    before = jnp.sum(jnp.where(index < found[:, None], weight, 0), axis=-1)  # [B]
    return found, point - before


def _kth_largest(ranked: Float[Array, "B K"], top_k: Int[Array, " B"]) -> Float[jax.Array, "B 1"]:
    # a top k beyond the ranked logits takes the last of them
    index = jnp.clip(top_k - 1, 0, ranked.shape[-1] - 1)[:, None]
    return jnp.take_along_axis(ranked, index, axis=-1)


def _threshold(
    ranked: Float[Array, "B K"], top_k: Int[Array, " B"], top_p: Float[Array, " B"]
) -> Float[jax.Array, "B 1"]:
    """The smallest logit inside of both top k and top p, of logits in falling order."""
    kth = _kth_largest(ranked, top_k)
    ranked = jnp.where(ranked >= kth, ranked, _MINUS_INFINITY)  # [B, K]
    probability = jax.nn.softmax(ranked, axis=-1)
    # the token that crosses top p is kept, as in transformers: what counts is the sum before it
    before = jnp.cumsum(probability, axis=-1) - probability  # of the tokens ranked higher
    inside = (before < top_p[:, None]) & (ranked > _MINUS_INFINITY)
    smallest = jnp.min(jnp.where(inside, ranked, jnp.inf), axis=-1, keepdims=True)
    return jnp.maximum(smallest, kth)


def _search_threshold(
    logits: Float[Array, "B V"], top_k: Int[Array, " B"], top_p: Float[Array, " B"]
) -> Float[jax.Array, "B 1"]:
    """``_threshold`` of logits in any order, but for the rounding of sums.

    Compilers for TPUs take long for the sort of a vocabulary, so both thresholds are searched bit by bit.
    """
    logits = jnp.asarray(logits)
    top_p = jnp.asarray(top_p)
    keys = _to_ordered_bits(logits)  # [B, V]
    probability = jnp.exp(logits - jnp.max(logits, axis=-1, keepdims=True))  # [B, V], times a number of each row

    def narrow(phase: jax.Array, threshold: jax.Array) -> jax.Array:
        by_number = phase == 0
        weight = jnp.where(keys >= threshold, jnp.where(by_number, 1.0, probability), 0)  # [B, V]
        # a token is outside where those above it have top p together: that is, above the largest key that has them
        needed = jnp.where(by_number, jnp.asarray(top_k, jnp.float32), top_p * jnp.sum(weight, axis=-1))  # [B]
        narrower = jnp.maximum(threshold, _largest_key(keys, weight, needed))
        return jnp.where(by_number | (top_p[:, None] < 1), narrower, threshold)

    # a loop of two, so that the search is compiled once
    everything = jnp.zeros((len(keys), 1), jnp.uint32)
    return _from_ordered_bits(jax.lax.fori_loop(0, 2, narrow, everything))


def _largest_key(
    keys: UInt32[jax.Array, "B V"], weight: Float[jax.Array, "B V"], needed: Float[jax.Array, " B"]
) -> UInt32[jax.Array, "B 1"]:
    """For each row the largest key for which the weights of all keys that are as large add up to ``needed``."""

    def decide_bit(i: jax.Array, found: jax.Array) -> jax.Array:
        candidate = found | (jnp.uint32(1) << (31 - i).astype(jnp.uint32))  # [B, 1]
        total = jnp.sum(jnp.where(keys >= candidate, weight, 0), axis=-1)  # [B]
        return jnp.where((total >= needed)[:, None], candidate, found)

    return jax.lax.fori_loop(0, 32, decide_bit, jnp.zeros((len(keys), 1), jnp.uint32))


def _to_ordered_bits(x: Float[jax.Array, "B V"]) -> UInt32[jax.Array, "B V"]:
    """Numbers whose order is that of the floats: their bits, with those of the negative ones turned over."""
    bits = jax.lax.bitcast_convert_type(x + 0.0, jnp.uint32)  # -0 becomes 0
    return jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(1 << 31))


def _from_ordered_bits(keys: UInt32[jax.Array, "B N"]) -> Float[jax.Array, "B N"]:
    bits = jnp.where(keys >> 31 == 1, keys & jnp.uint32((1 << 31) - 1), ~keys)
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


def merge_seed(params: SamplingParams, seed: int | None) -> SamplingParams:
    """The same with this seed, unless they have one of their own."""
    return params if params.seed is not None else dataclasses.replace(params, seed=seed)

"""Choosing the next token: one jittable function for a batch whose rows each have their own settings.

The order is that of transformers: repetition penalty, suppressed tokens, temperature, top-k, top-p, the draw. A row's
random numbers depend on its own seed and step alone, so a request draws the same tokens whatever is beside it.
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

_NEVER = -jnp.inf
_FEW = 64  # likeliest tokens, of which most settings draw: the Talker's default top k is 40


@dataclass(frozen=True)
class SamplingParams:
    """How one request's tokens are chosen.

    Attributes:
      temperature: 0 takes the likeliest token; otherwise the scores are divided by it.
      top_k: only this many of the likeliest tokens are drawn from; 0 for all.
      top_p: only the likeliest tokens that together have this probability; 1 for all.
      repetition_penalty: above 1 makes every token of the prompt and the reply so far less likely.
      seed: of the random draws.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        check_float("temperature", self.temperature, 0, 100)
        check_int("top_k", self.top_k, 0, hint="0: all tokens")
        check_float("top_p", self.top_p, 0, 1, above=True)
        check_float("repetition_penalty", self.repetition_penalty, 0.01, 100)
        if self.seed is not None:
            check_int("seed", self.seed, 0, SEED_MAX)

    @classmethod
    def names(cls) -> list[str]:
        """The names of the fields, in order."""
        return [field.name for field in dataclasses.fields(cls)]


@struct.dataclass
class SamplingState:
    """The settings of every row, and what their draws depend on."""

    temperature: Float[Array, " B"]
    top_k: Int[Array, " B"]
    top_p: Float[Array, " B"]
    penalty: Float[Array, " B"]
    seed: UInt32[Array, " B"]
    step: Int[Array, " B"]  # tokens drawn so far
    seen: Bool[Array, "B V"]  # which tokens the prompt and the reply hold
    suppressed: Bool[Array, " V"] | None = None  # tokens that are never chosen

    @classmethod
    def create(
        cls,
        rows: Sequence[SamplingParams],
        prompts: Sequence[np.ndarray],
        vocab: int,
        suppressed: np.ndarray | None = None,
    ) -> SamplingState:
        """For requests with these settings and prompt token ids; ``suppressed`` [vocab] holds for all of them."""
        seen = np.zeros((len(rows), vocab), bool)
        for i, prompt in enumerate(prompts):
            seen[i, prompt] = True
        return cls(
            temperature=np.array([r.temperature for r in rows], np.float32),
            top_k=np.array([r.top_k or vocab for r in rows], np.int32),
            top_p=np.array([r.top_p for r in rows], np.float32),
            penalty=np.array([r.repetition_penalty for r in rows], np.float32),
            seed=np.array([r.seed or 0 for r in rows], np.uint32),
            step=np.zeros(len(rows), np.int32),
            seen=seen,
            suppressed=suppressed,
        )

    def put(self, row: Int[Array, ""], other: SamplingState) -> SamplingState:
        """The first row of ``other`` in place of a row of this one; suppressed tokens must be the same."""
        suppressed = self.suppressed
        mine, theirs = dataclasses.replace(self, suppressed=None), dataclasses.replace(other, suppressed=None)
        return dataclasses.replace(put_row(mine, row, theirs), suppressed=suppressed)

    def replaced(self, other: SamplingState, rows: Bool[np.ndarray, " B"]) -> SamplingState:
        """With these rows of another one, whose suppressed tokens must be the same."""

        def one(mine: Array, theirs: Array) -> np.ndarray:
            mine = np.asarray(mine)
            return np.where(rows.reshape(-1, *[1] * (mine.ndim - 1)), np.asarray(theirs), mine)

        names = [f.name for f in dataclasses.fields(self) if f.name != "suppressed"]
        return dataclasses.replace(self, **{n: one(getattr(self, n), getattr(other, n)) for n in names})


def put_row(tree: Any, row: Int[Array, ""], other: Any) -> Any:
    """The first row of every array of ``other`` in place of a row of ``tree``'s; both begin with an axis of rows."""
    return jax.tree.map(lambda mine, theirs: jnp.asarray(mine).at[row].set(jnp.asarray(theirs)[0]), tree, other)


def sample(
    logits: Float[Array, "B V"], state: SamplingState, active: Bool[Array, " B"]
) -> tuple[Int[Array, " B"], SamplingState]:
    """Draws one token for each row, and remembers those of the active ones."""
    scores = _penalise(jnp.asarray(logits, jnp.float32), state)
    if state.suppressed is not None:
        scores = jnp.where(state.suppressed, _NEVER, scores)
    likeliest = jnp.argmax(scores, axis=-1).astype(jnp.int32)
    # sorting a vocabulary costs more than a step of a small model: only where a row asks for it
    drawn = jax.lax.cond(jnp.any(state.temperature > 0), _draw, lambda *_: likeliest, scores, state)
    tokens = jnp.where(state.temperature > 0, drawn, likeliest)
    seen = jnp.asarray(state.seen).at[jnp.arange(len(tokens)), tokens].max(active)
    return tokens, dataclasses.replace(state, seen=seen, step=state.step + active)


def _penalise(scores: jax.Array, state: SamplingState) -> jax.Array:
    penalty = state.penalty[:, None]
    return jnp.where(state.seen, jnp.where(scores > 0, scores / penalty, scores * penalty), scores)


def _draw(scores: jax.Array, state: SamplingState) -> jax.Array:
    warm = scores / jnp.where(state.temperature > 0, state.temperature, 1)[:, None]
    # what a row that takes its likeliest token may draw from does not matter; it is not to have all tokens ranked
    kept = restrict(warm, jnp.where(state.temperature > 0, state.top_k, 1), state.top_p)

    def one(seed: jax.Array, step: jax.Array, row: jax.Array) -> jax.Array:
        return jax.random.categorical(jax.random.fold_in(jax.random.key(seed), step), row)

    return jax.vmap(one)(jnp.asarray(state.seed), jnp.asarray(state.step), kept).astype(jnp.int32)


def restrict(
    scores: Float[Array, "B V"], top_k: Int[Array, " B"], top_p: Float[Array, " B"]
) -> Float[jax.Array, "B V"]:
    """Minus infinity for every token outside the top k, and then outside the top p of what is left.

    To rank a vocabulary costs more than a step of a small model. A row whose top k are among its ``_FEW`` likeliest
    tokens, with all that tie with the last of them, needs no more than these.
    """
    few = jax.lax.top_k(scores, min(_FEW, scores.shape[-1]))[0]
    # not few[:, -1:]: where XLA sees a part of it taken, it sorts all after all
    enough = (top_k <= few.shape[-1]) & (_least(few, top_k)[:, 0] > jnp.min(few, axis=-1))
    lowest = _lowest(few, top_k, top_p)

    def among_all() -> jax.Array:
        return jnp.where(enough[:, None], lowest, _lowest(jnp.sort(scores, descending=True), top_k, top_p))

    lowest = jax.lax.cond(jnp.all(enough), lambda: lowest, among_all)
    return jnp.where(scores >= lowest, scores, _NEVER)


def _least(ranked: Float[Array, "B K"], top_k: Int[Array, " B"]) -> Float[jax.Array, "B 1"]:
    """The score of the last of the top k."""
    return jnp.take_along_axis(ranked, jnp.clip(top_k - 1, 0, ranked.shape[-1] - 1)[:, None], axis=-1)


def _lowest(ranked: Float[Array, "B K"], top_k: Int[Array, " B"], top_p: Float[Array, " B"]) -> Float[jax.Array, "B 1"]:
    """The lowest score that is inside of both, of scores from the highest on."""
    least = _least(ranked, top_k)
    ranked = jnp.where(ranked >= least, ranked, _NEVER)
    probability = jax.nn.softmax(ranked, axis=-1)
    before = jnp.cumsum(probability, axis=-1) - probability
    inside = (before < top_p[:, None]) & (ranked > _NEVER)
    lowest = jnp.min(jnp.where(inside, ranked, jnp.inf), axis=-1, keepdims=True)
    return jnp.maximum(lowest, least)

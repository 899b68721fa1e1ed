"""The Thinker's loop: media in once, the prompt in once, then several words in each jitted call."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.sharding import Mesh
from jaxtyping import Bool, Float, Int

from omni_jax.batch import Array, OmniBatch, bucket
from omni_jax.generation.sampling import Sampling, SamplingState, sample
from omni_jax.models.decoder import KVCache
from omni_jax.models.thinker import Thinker

NOTHING = -1  # in place of a token, after a row has ended


@struct.dataclass
class TextState:
    """A batch in the middle of its replies; every shape is fixed, so one program serves all steps."""

    logits: Float[Array, "B V"]  # of the next token
    position: Int[Array, " B"]  # its position id
    cache: KVCache
    sampling: SamplingState
    left: Int[Array, " B"]  # tokens each row may still say; 0: it has ended
    stop: Int[Array, "B stops"]  # ids that end a row, padded with NOTHING


@dataclass(frozen=True)
class TextRequest:
    """What the loop needs to know of one row besides its prompt."""

    sampling: Sampling
    max_tokens: int
    stop_ids: tuple[int, ...]


class TextLoop:
    """The jitted functions around a Thinker and its parameters. It holds no state of any request."""

    def __init__(self, model: Thinker, params: Any, mesh: Mesh | None = None, steps: int = 8):
        """``steps`` is how many tokens one jitted call makes at most."""
        self.params = params
        self._mesh = mesh
        self._encode_audio = jax.jit(functools.partial(_apply, model, "encode_audio"))
        self._encode_vision = jax.jit(functools.partial(_apply, model, "encode_vision"))
        self._prefill = jax.jit(functools.partial(_prefill, model), static_argnames="slots")
        self._advance = jax.jit(functools.partial(_advance, model, steps), donate_argnums=1)

    def encode(self, batch: OmniBatch) -> list[jax.Array]:
        """The features of all media in the order of ``OmniBatch``, each [features, D]."""
        with self._on_mesh():
            features = [] if batch.audio is None else [self._encode_audio(self.params, batch.audio)]
            features += [self._encode_vision(self.params, frames) for frames in batch.vision]
            return jax.block_until_ready(features)

    def start(self, batch: OmniBatch, features: Sequence[jax.Array], requests: Sequence[TextRequest]) -> TextState:
        """Reads the prompts. Rows of the batch beyond the requests hold nothing and end at once."""
        rows = batch.tokens.shape[0]
        idle = TextRequest(Sampling(), 0, ())
        requests = [*requests, *[idle] * (rows - len(requests))]
        length = batch.tokens.shape[1] + max(r.max_tokens for r in requests)
        text = dataclasses.replace(batch, audio=None, vision=())
        slots = bucket(length, smallest=64)
        with self._on_mesh():
            filled = self._prefill(self.params, text, list(features), slots=slots)
        logits, position, cache = jax.block_until_ready(filled)
        mask = np.asarray(batch.mask)
        prompts = [np.asarray(batch.tokens)[i, mask[i]] for i in range(rows)]
        stops = max(len(r.stop_ids) for r in requests)
        return TextState(
            logits=logits,
            position=position,
            cache=cache,
            sampling=SamplingState.create([r.sampling for r in requests], prompts, logits.shape[-1]),
            left=np.array([r.max_tokens for r in requests], np.int32),
            stop=np.array([[*r.stop_ids, *[NOTHING] * (stops - len(r.stop_ids))] for r in requests], np.int32),
        )

    def tokens(self, state: TextState) -> Iterator[np.ndarray]:
        """Runs until every row has ended; yields the tokens of one jitted call at a time, [B, steps].

        A row's tokens end with its stop id, if it has met one; NOTHING stands after the end. Closing the iterator
        frees the state.
        """
        while True:
            with self._on_mesh():
                made, state = self._advance(self.params, state)
            yield np.asarray(made)
            if not np.asarray(state.left).any():
                return

    def _on_mesh(self) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext() if self._mesh is None else jax.set_mesh(self._mesh)


def _apply(model: Thinker, method: str, params: Any, *args: Any) -> Any:
    return model.apply({"params": params}, *args, method=method)


def _prefill(
    model: Thinker, params: Any, batch: OmniBatch, features: list[jax.Array], slots: int
) -> tuple[jax.Array, jax.Array, KVCache]:
    """Logits of the first token, its position and the filled cache."""
    rows = batch.tokens.shape[0]
    cache = KVCache.empty(model.config.text_config, rows, slots, model.scan_layers, model.dtype)
    x = _apply(model, "embed", params, batch.tokens, batch.media_index, features)
    hidden, position, cache = _apply(model, "prefill", params, x, batch.spans, batch.segment_ids, cache)
    return _apply(model, "logits", params, hidden), position, cache


def _advance(model: Thinker, steps: int, params: Any, state: TextState) -> tuple[Int[Array, "B steps"], TextState]:
    """Says up to ``steps`` tokens in every row that has not ended; leaves off as soon as none is left."""
    rows = state.position.shape[0]

    def going(loop: tuple[jax.Array, jax.Array, TextState]) -> Bool[Array, ""]:
        step, _, state = loop
        return (step < steps) & jnp.any(state.left > 0)

    def one(loop: tuple[jax.Array, jax.Array, TextState]) -> tuple[jax.Array, jax.Array, TextState]:
        step, made, state = loop
        tokens, sampling = sample(state.logits, state.sampling)
        active = state.left > 0
        made = made.at[:, step].set(jnp.where(active, tokens, NOTHING))
        ended = jnp.any(tokens[:, None] == state.stop, axis=1)
        left = jnp.where(active & ~ended, state.left - 1, 0)
        hidden, cache = _apply(model, "decode", params, tokens, state.position, state.cache)
        logits = _apply(model, "logits", params, hidden)
        return step + 1, made, TextState(logits, state.position + 1, cache, sampling, left, state.stop)

    made = jnp.full((rows, steps), NOTHING, jnp.int32)
    _, made, state = jax.lax.while_loop(going, one, (jnp.int32(0), made, state))
    return made, state

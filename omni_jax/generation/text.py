"""The Thinker's loop: media in once, the prompt in once, then several words in each jitted call."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
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
from omni_jax.sharding import constrain

NOTHING = -1  # in place of a token, after a row has ended


@struct.dataclass
class Conditioning:
    """What the Talker needs of the Thinker: the final hidden state of every token and its embedding, added up.

    The embedding of a media token counts as zero (section 7.2). S is the padded length of the prompts, R the room for
    the replies.
    """

    prompt: Float[Array, "B S D"]
    reply: Float[Array, "B R D"]  # of the tokens said so far; what follows them has no meaning


@struct.dataclass
class TextState:
    """A batch in the middle of its replies; every shape is fixed, so one program serves all steps."""

    logits: Float[Array, "B V"]  # of the next token
    position: Int[Array, " B"]  # its position id
    cache: KVCache
    sampling: SamplingState
    left: Int[Array, " B"]  # tokens each row may still say; 0: it has ended
    stop: Int[Array, "B stops"]  # ids that end a row, padded with NOTHING
    kept: Conditioning | None  # where speech is to follow


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
        self._encode_audio = jax.jit(functools.partial(call, model, "encode_audio"))
        self._encode_vision = jax.jit(functools.partial(call, model, "encode_vision"))
        self._prefill = jax.jit(functools.partial(_prefill, model), static_argnames=("slots", "keep"))
        self._words = jax.jit(functools.partial(call, model, "words"))
        self._advance = jax.jit(functools.partial(_advance, model, steps), donate_argnums=1)

    def encode(self, batch: OmniBatch) -> list[jax.Array]:
        """The features of all media in the order of ``OmniBatch``, each [features, D]."""
        with on_mesh(self._mesh):
            features = [] if batch.audio is None else [self._encode_audio(self.params, batch.audio)]
            features += [self._encode_vision(self.params, frames) for frames in batch.vision]
            return jax.block_until_ready(features)

    def words(self, ids: Int[Array, "*rows"]) -> jax.Array:
        """The embeddings of text ids, [*rows, D]."""
        with on_mesh(self._mesh):
            return self._words(self.params, ids)

    def start(
        self,
        batch: OmniBatch,
        features: Sequence[jax.Array],
        requests: Sequence[TextRequest],
        *,
        keep: bool = False,
    ) -> TextState:
        """Reads the prompts. Rows of the batch beyond the requests hold nothing and end at once.

        Args:
          batch: the prompts.
          features: what ``encode`` gave for the batch.
          requests: one a row.
          keep: collect in the state's ``kept`` what speech needs.
        """
        rows = batch.tokens.shape[0]
        idle = TextRequest(Sampling(), 0, ())
        requests = [*requests, *[idle] * (rows - len(requests))]
        length = batch.tokens.shape[1] + max(r.max_tokens for r in requests)
        text = dataclasses.replace(batch, audio=None, vision=())
        slots = bucket(length, smallest=64)
        with on_mesh(self._mesh):
            filled = self._prefill(self.params, text, list(features), slots=slots, keep=keep)
        logits, position, cache, kept = jax.block_until_ready(filled)
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
            kept=kept,
        )

    def advance(self, state: TextState) -> tuple[np.ndarray, TextState]:
        """One jitted call: up to ``steps`` tokens of each row, [B, steps], and the state after them.

        A row's tokens end with its stop id, if it has met one; NOTHING stands after the end. All rows have ended when
        nothing is ``left``. The state that is given is used up.
        """
        with on_mesh(self._mesh):
            made, state = self._advance(self.params, state)
        return np.asarray(made), state

    def tokens(self, state: TextState) -> Iterator[np.ndarray]:
        """Runs until every row has ended; yields what each ``advance`` made. Closing the iterator frees the state."""
        while True:
            made, state = self.advance(state)
            yield made
            if not np.asarray(state.left).any():
                return


def on_mesh(mesh: Mesh | None) -> contextlib.AbstractContextManager[Any]:
    """In this context arrays are spread over ``mesh``; the same as none without one."""
    return contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh)


def call(model: nn.Module, method: str, params: Any, *args: Any) -> Any:
    """Calls a method of a model with these parameters."""
    return model.apply({"params": params}, *args, method=method)


def _prefill(
    model: Thinker, params: Any, batch: OmniBatch, features: list[jax.Array], slots: int, keep: bool
) -> tuple[jax.Array, jax.Array, KVCache, Conditioning | None]:
    """Logits of the first token, its position, the filled cache, and what speech needs if ``keep``."""
    rows, length = batch.tokens.shape
    cache = KVCache.empty(model.config.text_config, rows, slots, model.scan_layers, model.dtype)
    x = call(model, "embed", params, batch.tokens, batch.media_index, features)
    hidden, position, cache = call(model, "prefill", params, x, batch.spans, batch.segment_ids, cache)
    logits = call(model, "logits", params, hidden[:, -1])
    if not keep:
        return logits, position, cache, None
    prompt = constrain(hidden + jnp.where((batch.media_index >= 0)[..., None], 0, x), "batch", "sequence", "width")
    reply = constrain(jnp.zeros((rows, slots - length, x.shape[-1]), hidden.dtype), "batch", None, "width")
    return logits, position, cache, Conditioning(prompt, reply)


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
        x = call(model, "words", params, tokens)
        hidden, cache = call(model, "decode", params, x, state.position, state.cache)
        logits, kept = call(model, "logits", params, hidden), state.kept
        if kept is not None:
            reply = jnp.asarray(kept.reply).at[jnp.arange(rows), state.sampling.step].set(hidden + x)
            kept = dataclasses.replace(kept, reply=reply)
        return step + 1, made, TextState(logits, state.position + 1, cache, sampling, left, state.stop, kept)

    made = jnp.full((rows, steps), NOTHING, jnp.int32)
    _, made, state = jax.lax.while_loop(going, one, (jnp.int32(0), made, state))
    return made, state

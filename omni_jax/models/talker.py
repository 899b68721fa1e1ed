"""The Talker: the Thinker's reply to codes of speech (reference ``Qwen2_5OmniTalkerForConditionalGeneration``).

Each position of its input is the sum of the Thinker's part (a hidden state plus a token embedding) and the embedding of
a code, both as wide as the Thinker; a projection then takes it to the Talker's own width (docs/reference.md, 7.1 and
7.2).

Letters: B rows of a batch, S positions of a sequence, C positions of a chunk, E the Thinker's width, D the Talker's,
V the number of codes.
"""

from __future__ import annotations

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.typing import Dtype
from jaxtyping import Bool, Float, Int

from omni_jax.batch import Array, Spans
from omni_jax.config import TalkerConfig
from omni_jax.layers.attention import Mask
from omni_jax.layers.linear import Linear
from omni_jax.layers.params import dtypes
from omni_jax.layers.stack import Remat
from omni_jax.models.decoder import Decoder, KVCache
from omni_jax.mrope import position_ids

NO_CODE = -1  # in place of a code at a position that has none


class Talker(nn.Module):
    """The Thinker's reply to logits of codes, 50 a second.

    ``__call__`` takes whole sequences, for training and for logits. Generation calls ``extend`` for each chunk of the
    prompt and for each code.
    """

    config: TalkerConfig
    scan_layers: bool = True
    remat: Remat = "none"
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32
    cache_dtype: Dtype | None = None  # of keys and values while decoding, such as int8; None: as ``dtype``

    def setup(self) -> None:
        c = self.config
        kw = dtypes(self)
        self.proj = Linear((c.embedding_size,), (c.hidden_size,), ("mlp", "embed"), **kw)
        # codes are added to the Thinker's rows before the projection, so their table has the Thinker's width
        self.decoder = Decoder(c, c.embedding_size, scan_layers=self.scan_layers, remat=self.remat, **kw)

    def __call__(
        self, text: Float[Array, "B S E"], codes: Int[Array, "B S"], spans: Spans, segment_ids: Int[Array, "B S"]
    ) -> Float[jax.Array, "B S V"]:
        """Logits of the next code at every position, in float32; those of padding have no meaning.

        Args:
          text: the Thinker's part of each position.
          codes: the code of each position, or ``NO_CODE``.
          spans: of the position ids.
          segment_ids: 0 where there is padding; positions of equal id attend to each other.
        """
        return self.logits(self.hidden(text, codes, spans, segment_ids))

    def hidden(
        self, text: Float[Array, "B S E"], codes: Int[Array, "B S"], spans: Spans, segment_ids: Int[Array, "B S"]
    ) -> Float[jax.Array, "B S D"]:
        """Hidden states after the last norm, of which the logits are a product; see ``__call__``."""
        ids, _ = position_ids(spans, segment_ids, self.config.position_id_per_seconds)  # [3, B, S]
        mask = Mask(jnp.asarray(segment_ids), causal=True)
        return self.decoder(self._embed_inputs(text, codes), ids, mask)

    def extend(
        self,
        text: Float[Array, "B C E"],
        codes: Int[Array, "B C"],
        ids: Int[Array, "3 B C"],
        valid: Bool[Array, "B C"],
        cache: KVCache,
    ) -> tuple[Float[jax.Array, "B C D"], KVCache]:
        """Appends a chunk to what the cache holds; ``text`` and ``codes`` as above, see ``Decoder.extend``."""
        return self.decoder.extend(self._embed_inputs(text, codes), ids, valid, cache)

    def logits(self, hidden: Float[Array, "*batch D"]) -> Float[jax.Array, "*batch V"]:
        """Logits of the next code, in float32."""
        return self.decoder.logits(hidden)

    def _embed_inputs(self, text: Array, codes: Array) -> jax.Array:
        with jax.named_scope("talker_input"):
            codes = jnp.asarray(codes)
            # the embedding of code 0 where there is none; it is replaced in the next line
            embeds = self.decoder.embed(jnp.maximum(codes, 0))  # [B, S, E]
            embeds = jnp.where((codes != NO_CODE)[..., None], embeds, 0)
            return self.proj(jnp.asarray(text, self.dtype) + embeds)  # [B, S, D]


def abstract_params(model: Talker) -> Any:
    """Shapes, dtypes and logical axes of every parameter, in their boxes; nothing is computed."""
    return jax.eval_shape(functools.partial(init_params, model), jax.random.key(0))


def init_params(model: Talker, key: jax.Array) -> Any:
    """Fresh parameters, in their boxes."""
    # one position is enough for every parameter to be made
    one = np.zeros((1, 1), np.int32)
    spans = Spans(one, one, one, one, one, one.astype(np.float32))
    text = np.zeros((1, 1, model.config.embedding_size), np.float32)
    return model.init(key, text, one, spans, one + 1)["params"]

"""The Talker: what the Thinker said to codes of speech (reference ``Qwen2_5OmniTalkerForConditionalGeneration``).

A row of its input is the sum of something from the Thinker and the embedding of a code, both as wide as the Thinker;
a projection then takes it to the Talker's own width (section 7.1).
"""

from __future__ import annotations

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
from omni_jax.models.decoder import Decoder, DecoderStream, KVCache
from omni_jax.mrope import position_ids

CODE_SECONDS = 0.02
NO_CODE = -1  # in place of a code where a row has none


class Talker(nn.Module):
    """Speaks in codes, 50 a second.

    ``__call__`` is the whole of it, for training and scoring. Generation calls ``extend`` for each stretch of the
    prompt and for each code. E is the Thinker's width, D the Talker's, V the number of codes.
    """

    config: TalkerConfig
    scan_layers: bool = True
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    def setup(self) -> None:
        c, kw = self.config, dtypes(self)
        self.proj = Linear((c.embedding_size,), (c.hidden_size,), ("mlp", "embed"), **kw)
        self.decoder = Decoder(c, c.embedding_size, scan_layers=self.scan_layers, **kw)

    def __call__(
        self, text: Float[Array, "B S E"], codes: Int[Array, "B S"], spans: Spans, segment_ids: Int[Array, "B S"]
    ) -> Float[jax.Array, "B S V"]:
        """The scores of the next code at every position; padding gives numbers without meaning.

        Args:
          text: what the Thinker gives to each position.
          codes: the code of each position, or NO_CODE.
          spans: of the position ids.
          segment_ids: 0 where there is padding.
        """
        ids, _ = position_ids(spans, segment_ids, self.config.position_id_per_seconds)
        mask = Mask(jnp.asarray(segment_ids), causal=True)
        return self.logits(self.decoder(self._embed(text, codes), ids, mask))

    def extend(
        self,
        text: Float[Array, "B C E"],
        codes: Int[Array, "B C"],
        ids: Int[Array, "3 B C"],
        valid: Bool[Array, "B C"],
        cache: KVCache,
    ) -> tuple[Float[jax.Array, "B C D"], KVCache]:
        """Reads more positions behind what the cache holds; see ``Decoder.extend``."""
        return self.decoder.extend(self._embed(text, codes), ids, valid, cache)

    def logits(self, hidden: Float[Array, "*rows D"]) -> Float[jax.Array, "*rows V"]:
        """Scores of the next code, in float32."""
        return self.decoder.logits(hidden)

    def _embed(self, text: Array, codes: Array) -> jax.Array:
        codes = jnp.asarray(codes)
        spoken = self.decoder.embed(jnp.maximum(codes, 0))
        return self.proj(jnp.asarray(text, self.dtype) + jnp.where((codes != NO_CODE)[..., None], spoken, 0))


def decoder_stream(model: Talker, slots: int) -> DecoderStream:
    """Its decoder, behind the projection, as a part that streams, with the parameters of ``decoder``."""
    c = model.config
    kw: dict[str, Any] = dict(scan_layers=model.scan_layers, dtype=model.dtype, param_dtype=model.param_dtype)
    return DecoderStream(Decoder(c, c.embedding_size, **kw), CODE_SECONDS, slots)


def abstract_params(model: Talker) -> Any:
    """Shapes, dtypes and logical axes of every parameter, in their boxes; nothing is computed."""
    one = np.zeros((1, 1), np.int32)
    spans = Spans(one, one, one, one, one, one.astype(np.float32))
    text = np.zeros((1, 1, model.config.embedding_size), np.float32)
    return jax.eval_shape(model.init, jax.random.key(0), text, one, spans, one + 1)["params"]

"""The Thinker: both encoders and the language model (reference ``Qwen2_5OmniThinkerForConditionalGeneration``).

Letters: B rows of a batch, S positions of a sequence, C positions of a chunk, D width, V size of the vocabulary.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.typing import Dtype
from jax.sharding import PartitionSpec
from jaxtyping import Bool, Float, Int

from omni_jax.batch import Array, AudioBlocks, OmniBatch, Spans, VisionFrames
from omni_jax.config import ThinkerConfig
from omni_jax.layers.attention import Mask
from omni_jax.layers.params import dtypes
from omni_jax.layers.stack import Remat
from omni_jax.models.audio_encoder import AudioEncoder
from omni_jax.models.decoder import Decoder, KVCache
from omni_jax.models.vision_encoder import VisionEncoder
from omni_jax.mrope import position_ids
from omni_jax.sharding import axes_of


class Thinker(nn.Module):
    """Text, sound and pictures to the logits of the next token (docs/reference.md, 6).

    ``__call__`` takes whole sequences, for training and for logits. Generation calls the parts: ``encode_audio`` and
    ``encode_vision`` for the media, then ``extend`` for each chunk of the prompt and for each token of the reply.
    """

    config: ThinkerConfig
    scan_layers: bool = True
    remat: Remat = "none"
    # whether every device has the media of its own rows, as packed batches do; else features are brought to all devices
    media_by_rows: bool = False
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32
    cache_dtype: Dtype | None = None  # of keys and values while decoding, such as int8; None: as ``dtype``

    def setup(self) -> None:
        c = self.config
        kw = dict(dtypes(self), scan_layers=self.scan_layers, remat=self.remat)
        self.audio_encoder = AudioEncoder(c.audio_config, **kw)
        self.vision_encoder = VisionEncoder(c.vision_config, **kw)
        self.decoder = Decoder(c.text_config, **kw)

    def __call__(self, batch: OmniBatch) -> Float[jax.Array, "B S V"]:
        """Logits of the next token at every position, in float32; those of padding have no meaning."""
        return self.decoder.logits(self.hidden(batch))

    def hidden(self, batch: OmniBatch) -> Float[jax.Array, "B S D"]:
        """Hidden states after the last norm, of which the logits are a product."""
        return self.hidden_and_embeds(batch)[0]

    def hidden_and_embeds(self, batch: OmniBatch) -> tuple[Float[jax.Array, "B S D"], Float[jax.Array, "B S D"]]:
        """The same, and what was read at each position: embeddings, with the features of media in their places."""
        return self._read(batch, self._encode(batch))

    def embeds(self, batch: OmniBatch) -> Float[jax.Array, "B S D"]:
        """What is read at each position; nothing is decoded."""
        return self.embed(batch.tokens, batch.media_index, self._encode(batch))

    def _encode(self, batch: OmniBatch) -> list[jax.Array]:
        """Features of all media, [features, D] each, in the order that ``media_index`` counts in."""
        features = []
        if batch.audio is not None:
            features.append(self.encode_audio(batch.audio))
        for frames in batch.vision:
            features.append(self.encode_vision(frames))
        return features

    def hidden_of_features(
        self, batch: OmniBatch, features: Sequence[Float[Array, "features D"]]
    ) -> Float[jax.Array, "B S D"]:
        """``hidden``, with features that something else than its encoders has made of the media.

        Args:
          batch: whose ``media_index`` counts these features; its own media are not read.
          features: see ``embed``.
        """
        return self._read(batch, features)[0]

    def _read(
        self, batch: OmniBatch, features: Sequence[Float[Array, "features D"]]
    ) -> tuple[Float[jax.Array, "B S D"], Float[jax.Array, "B S D"]]:
        x = self.embed(batch.tokens, batch.media_index, features)  # [B, S, D]
        ids, _ = position_ids(batch.spans, batch.segment_ids, self.config.position_id_per_seconds)  # [3, B, S]
        mask = Mask(jnp.asarray(batch.segment_ids), causal=True)
        return self.decoder(x, ids, mask), x

    def encode_audio(self, audio: AudioBlocks) -> Float[jax.Array, "features D"]:
        """One feature for each 40 ms of every block, padding included."""
        with jax.named_scope("audio_encoder"):
            return self.audio_encoder(audio).reshape(-1, self.config.text_config.hidden_size)

    def encode_vision(self, frames: VisionFrames) -> Float[jax.Array, "features D"]:
        """One feature for each merged cell of every window, padding included."""
        with jax.named_scope("vision_encoder"):
            return self.vision_encoder(frames).reshape(-1, self.config.text_config.hidden_size)

    def embed(
        self, tokens: Int[Array, "B S"], media_index: Int[Array, "B S"], features: Sequence[Float[Array, "features D"]]
    ) -> Float[jax.Array, "B S D"]:
        """Token embeddings, with the features of sound and pictures in their places.

        Args:
          tokens: ids, placeholders included.
          media_index: which feature a position takes, counted over all of ``features`` in turn; -1 for a token.
          features: the encoders' outputs, in the order of ``OmniBatch``.
        """
        embeds = self.embed_tokens(tokens)
        # text alone: nothing to gather, and no select over the embeddings
        if not features:
            return embeds
        index = jnp.asarray(media_index)
        gather = _gather_by_rows if self.media_by_rows else _gather_features
        with jax.named_scope("gather_features"):
            # positions gather features; the reference scatters features over positions
            media = gather(index, *map(jnp.asarray, features))  # [B, S, D]
            return jnp.where((index >= 0)[..., None], media.astype(embeds.dtype), embeds)

    def embed_tokens(self, tokens: Int[Array, "*batch"]) -> Float[jax.Array, "*batch D"]:
        """Token embeddings."""
        return self.decoder.embed(tokens)

    def extend(
        self, x: Float[Array, "B C D"], ids: Int[Array, "3 B C"], valid: Bool[Array, "B C"], cache: KVCache
    ) -> tuple[Float[jax.Array, "B C D"], KVCache]:
        """Appends a chunk of embeddings to what the cache holds; see ``Decoder.extend``."""
        return self.decoder.extend(x, ids, valid, cache)

    def extend_slots(
        self,
        x: Float[Array, "R C D"],
        ids: Int[Array, "3 R C"],
        valid: Bool[Array, "R C"],
        slot: Int[Array, " R"],
        start: Int[Array, " R"],
        cache: KVCache,
    ) -> tuple[Float[jax.Array, "R C D"], KVCache]:
        """Appends blocks of embeddings to slots of the cache; see ``Decoder.extend_slots``."""
        return self.decoder.extend_slots(x, ids, valid, slot, start, cache)

    def logits(self, hidden: Float[Array, "*batch D"]) -> Float[jax.Array, "*batch V"]:
        """Logits of the next token, in float32."""
        return self.decoder.logits(hidden)


def _gather_features(index: jax.Array, *features: jax.Array) -> jax.Array:
    return jnp.take(jnp.concatenate(features), jnp.maximum(index, 0), axis=0)


def _gather_by_rows(index: jax.Array, *features: jax.Array) -> jax.Array:
    """The same, where the features that a device's rows take are among those that it has of each encoder."""
    mesh = jax.sharding.get_abstract_mesh()
    rows = axes_of("batch", index.shape[0])
    positions = axes_of("sequence", index.shape[1])
    if mesh.empty or rows is None:
        return _gather_features(index, *features)

    def gather_local(index: jax.Array, *features: jax.Array) -> jax.Array:
        # ``index`` counts features over all devices; a device holds a part of each encoder's
        device = jax.lax.axis_index(rows)
        local_index = jnp.zeros_like(index)
        offset = 0  # of an encoder's features in the list over all devices
        local_offset = 0  # and in this device's own
        for own in features:
            count = len(own) * jax.lax.axis_size(rows)
            # less those of encoders and devices before, plus this device's own of the encoders before
            own_index = index - offset - device * len(own) + local_offset
            is_of_encoder = (index >= offset) & (index < offset + count)
            local_index = jnp.where(is_of_encoder, own_index, local_index)
            offset += count
            local_offset += len(own)
        # where no feature is taken, 0: the caller puts the embedding there
        return _gather_features(local_index, *features)

    specs = (PartitionSpec(rows, positions), *[PartitionSpec(rows)] * len(features))
    mapped = jax.shard_map(gather_local, mesh=mesh, in_specs=specs, out_specs=specs[0], check_vma=False)
    return mapped(index, *features)


def abstract_params(model: Thinker) -> Any:
    """Shapes, dtypes and logical axes of every parameter, in their boxes; nothing is computed."""
    hashable: Any = model  # Flax gives modules a hash, which type checkers do not see
    return _trace_params(hashable)


@functools.lru_cache(maxsize=8)  # tracing the whole takes seconds, and the start of a run asks several times
def _trace_params(model: Thinker) -> Any:
    return jax.eval_shape(lambda: init_params(model, jax.random.key(0)))


def init_params(model: Thinker, key: jax.Array) -> Any:
    """Fresh parameters, in their boxes; traced."""
    return model.init(key, smallest_batch(model.config))["params"]


def smallest_batch(config: ThinkerConfig) -> OmniBatch:
    """One audio block, one window of one frame and one token: enough for every parameter to be made."""
    audio = config.audio_config
    vision = config.vision_config
    patches = (1, 1, (vision.window_cells * vision.spatial_merge_size) ** 2)
    where = np.zeros(patches, np.int32)
    one = np.zeros((1, 1), np.int32)
    return OmniBatch(
        tokens=one,
        segment_ids=one + 1,
        media_index=one - 1,
        spans=Spans(one, one, one, one, one, one.astype(np.float32)),
        audio=AudioBlocks(np.zeros((1, audio.block_frames, audio.num_mel_bins), np.float32), np.array([1], np.int32)),
        vision=(VisionFrames(np.zeros((*patches, vision.patch_dim), np.float32), where, where, where == 0),),
    )

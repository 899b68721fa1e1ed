"""The Thinker: both encoders and the language model (reference ``Qwen2_5OmniThinkerForConditionalGeneration``)."""

from __future__ import annotations

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
from omni_jax.models.audio_encoder import TOKEN_SECONDS, AudioEncoder
from omni_jax.models.decoder import Decoder, DecoderStream, KVCache
from omni_jax.models.vision_encoder import VisionEncoder
from omni_jax.mrope import position_ids
from omni_jax.sharding import axes_of


class Thinker(nn.Module):
    """Hears, sees, reads and writes.

    ``__call__`` is the whole of it, for training and scoring. Generation calls the parts: ``encode_audio`` and
    ``encode_vision`` for the media, then ``extend`` for each stretch of the prompt and for each word of the reply.
    """

    config: ThinkerConfig
    scan_layers: bool = True
    remat: Remat = "none"
    # whether every device has the media of its own rows, as packed batches do; else features are brought to all devices
    media_by_rows: bool = False
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    def setup(self) -> None:
        c = self.config
        kw = dict(dtypes(self), scan_layers=self.scan_layers, remat=self.remat)
        self.audio_encoder = AudioEncoder(c.audio_config, **kw)
        self.vision_encoder = VisionEncoder(c.vision_config, **kw)
        self.decoder = Decoder(c.text_config, **kw)

    def __call__(self, batch: OmniBatch) -> Float[jax.Array, "B S V"]:
        """The scores of the next word at every position; padding gives numbers without meaning."""
        return self.decoder.logits(self.hidden(batch))

    def hidden(self, batch: OmniBatch) -> Float[jax.Array, "B S D"]:
        """What the scores are a product of: the state of every position after the last norm."""
        features = [] if batch.audio is None else [self.encode_audio(batch.audio)]
        features += [self.encode_vision(frames) for frames in batch.vision]
        x = self.embed(batch.tokens, batch.media_index, features)
        ids, _ = position_ids(batch.spans, batch.segment_ids, self.config.position_id_per_seconds)
        mask = Mask(jnp.asarray(batch.segment_ids), causal=True)
        return self.decoder(x, ids, mask)

    def encode_audio(self, audio: AudioBlocks) -> Float[jax.Array, "features D"]:
        """One feature for each 40 ms of every block, padding included."""
        return self.audio_encoder(audio).reshape(-1, self.config.text_config.hidden_size)

    def encode_vision(self, frames: VisionFrames) -> Float[jax.Array, "features D"]:
        """One feature for each merged cell of every window, padding included."""
        return self.vision_encoder(frames).reshape(-1, self.config.text_config.hidden_size)

    def embed(
        self, tokens: Int[Array, "B S"], media_index: Int[Array, "B S"], features: Sequence[Float[Array, "features D"]]
    ) -> Float[jax.Array, "B S D"]:
        """The words' embeddings, with the features of sound and pictures in their places.

        Args:
          tokens: ids, placeholders included.
          media_index: which feature a position takes, counted over all of ``features`` in turn; -1 for a word.
          features: what the encoders gave, in the order of ``OmniBatch``.
        """
        words = self.embed_tokens(tokens)
        if not features:
            return words
        index = jnp.asarray(media_index)
        arrays = [jnp.asarray(some) for some in features]
        media = (_take_by_rows if self.media_by_rows else _take)(index, *arrays)
        return jnp.where((index >= 0)[..., None], media.astype(words.dtype), words)

    def extend(
        self, x: Float[Array, "B C D"], ids: Int[Array, "3 B C"], valid: Bool[Array, "B C"], cache: KVCache
    ) -> tuple[Float[jax.Array, "B C D"], KVCache]:
        """Reads embeddings behind what the cache holds, see ``Decoder.extend``."""
        return self.decoder.extend(x, ids, valid, cache)

    def embed_tokens(self, tokens: Int[Array, "*rows"]) -> Float[jax.Array, "*rows D"]:
        """The words' embeddings."""
        return self.decoder.embed(tokens)

    def logits(self, hidden: Float[Array, "*rows D"]) -> Float[jax.Array, "*rows V"]:
        """Scores of the next word, in float32."""
        return self.decoder.logits(hidden)


def decoder_stream(model: Thinker, slots: int) -> DecoderStream:
    """Its language model as a part that streams, with the parameters of ``decoder``. Of sound, a position is 40 ms."""
    c = model.config
    decoder = Decoder(c.text_config, scan_layers=model.scan_layers, dtype=model.dtype, param_dtype=model.param_dtype)
    return DecoderStream(decoder, TOKEN_SECONDS, slots)


def _take(index: jax.Array, *features: jax.Array) -> jax.Array:
    return jnp.take(jnp.concatenate(features), jnp.maximum(index, 0), axis=0)


def _take_by_rows(index: jax.Array, *features: jax.Array) -> jax.Array:
    """The same, where the features that a device's rows take are among those that it has of each encoder."""
    mesh = jax.sharding.get_abstract_mesh()
    rows, positions = axes_of("batch", index.shape[0]), axes_of("sequence", index.shape[1])
    if mesh.empty or rows is None:
        return _take(index, *features)

    def local(index: jax.Array, *features: jax.Array) -> jax.Array:
        device, place = jax.lax.axis_index(rows), jnp.zeros_like(index)
        before = before_here = 0
        for own in features:
            count = len(own) * jax.lax.axis_size(rows)
            here = index - before - device * len(own) + before_here
            place = jnp.where((index >= before) & (index < before + count), here, place)
            before, before_here = before + count, before_here + len(own)
        return _take(place, *features)

    specs = (PartitionSpec(rows, positions), *[PartitionSpec(rows)] * len(features))
    taken = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=specs[0], check_vma=False)
    return taken(index, *features)


def abstract_params(model: Thinker) -> Any:
    """Shapes, dtypes and logical axes of every parameter, in their boxes; nothing is computed."""
    batch = _smallest_batch(model.config)
    return jax.eval_shape(lambda: model.init(jax.random.key(0), batch))["params"]


def _smallest_batch(config: ThinkerConfig) -> OmniBatch:
    audio, vision = config.audio_config, config.vision_config
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

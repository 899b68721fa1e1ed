"""Our position ids from the arguments of the reference's ``get_rope_index``."""

import jax
import numpy as np

from omni_jax import mrope
from omni_jax.batch import bucket
from omni_jax.processing.layout import MediaLengths, segments_from_tokens

_position_ids = jax.jit(mrope.position_ids, static_argnames="ids_per_second")


def expand(rows, mask, ids_per_second=25):
    """Ids [3, B, S] and deltas [B] of rows of spans; computed at a bucketed length, so that little is compiled."""
    mask = np.asarray(mask, np.int32)
    length = bucket(mask.shape[1], smallest=512)
    wide = np.pad(mask, ((0, 4 - len(mask)), (0, length - mask.shape[1])))
    table = mrope.stack([*rows, *[[]] * (4 - len(rows))], length)
    ids, deltas = _position_ids(table, wide, ids_per_second=ids_per_second)
    return np.asarray(ids)[:, : mask.shape[0], : mask.shape[1]], np.asarray(deltas)[: len(mask)]


def rope_index(inputs, config):
    """The same for tokens with the sizes of their media."""
    tokens, mask = np.asarray(inputs["input_ids"]), np.asarray(inputs["attention_mask"])
    sizes = ("image_grid_thw", "video_grid_thw", "second_per_grids", "audio_seqlens")
    lengths = MediaLengths.of(*(inputs[name] for name in sizes))
    flag = inputs["use_audio_in_video"]
    rows = []
    for ids, real in zip(tokens, mask, strict=True):
        segments = segments_from_tokens(ids[real == 1], lengths, config, use_audio_in_video=flag)
        rows.append(mrope.resolve(segments, config, begin=int(np.argmax(real))))
    return expand(rows, mask, config.position_id_per_seconds)

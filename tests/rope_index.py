"""Our position ids from the arguments of the reference's ``get_rope_index``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Int

from omni_jax import mrope
from omni_jax.batch import Spans, bucket
from omni_jax.config import ThinkerConfig
from omni_jax.processing.layout import MediaLengths, segments_from_tokens

_position_ids = jax.jit(mrope.position_ids, static_argnames="ids_per_second")


def expand_table(
    spans: Spans, segment_ids: Int[np.ndarray, "B S"], ids_per_second: int = 25
) -> tuple[Int[np.ndarray, "3 B S"], Int[np.ndarray, " B"]]:
    """Ids and deltas of a table of spans, padded to few shapes, so that little is compiled."""
    num_rows, length = segment_ids.shape
    more_rows = (0, bucket(num_rows, 4) - num_rows)
    more_positions = (0, bucket(length, 2048) - length)
    width = spans.begin.shape[1]
    more_spans = (0, bucket(width, 64) - width)
    columns = {}
    for name, table in vars(spans).items():
        unused = length + more_positions[1] if name == "begin" else 0
        columns[name] = np.pad(table, (more_rows, more_spans), constant_values=unused)
    wide = np.pad(np.asarray(segment_ids, np.int32), (more_rows, more_positions))
    ids, deltas = _position_ids(Spans(**columns), wide, ids_per_second=ids_per_second)
    return np.asarray(ids)[:, :num_rows, :length], np.asarray(deltas)[:num_rows]


def expand(
    rows: Sequence[Sequence[mrope.Span]], mask: Any, ids_per_second: int = 25
) -> tuple[Int[np.ndarray, "3 B S"], Int[np.ndarray, " B"]]:
    """Ids and deltas of rows of spans, whose real positions a mask says. [B, S]"""
    mask = np.asarray(mask, np.int32)
    return expand_table(mrope.stack(rows, mask.shape[1]), mask, ids_per_second)


def rope_index(
    inputs: Mapping[str, Any], config: ThinkerConfig
) -> tuple[Int[np.ndarray, "3 B S"], Int[np.ndarray, " B"]]:
    """The same for tokens with the sizes of their media."""
    tokens = np.asarray(inputs["input_ids"])
    mask = np.asarray(inputs["attention_mask"])
    names = ("image_grid_thw", "video_grid_thw", "second_per_grids", "audio_seqlens")
    lengths = MediaLengths.of(*(inputs[name] for name in names))
    rows = []
    for ids, real in zip(tokens, mask, strict=True):
        own = ids[real == 1]
        segments = segments_from_tokens(own, lengths, config, use_audio_in_video=inputs["use_audio_in_video"])
        rows.append(mrope.resolve(segments, config, begin=int(np.argmax(real))))
    return expand(rows, mask, config.position_id_per_seconds)

"""The variants of TMRoPE differ from the published rules in what they say, and in nothing else."""

import dataclasses

import numpy as np
import pytest

from omni_jax import mrope
from omni_jax.batch import OmniBatch, TrainBatch
from omni_jax.config import OmniConfig
from omni_jax.processing import layout
from omni_jax.processing.layout import VisionInput
from omni_jax.segments import Chunk, Grid, Interleaved, Text
from tools.ablate_tmrope import VARIANTS, Variant, change_ids, layout_of, mean_and_interval

CONFIG = OmniConfig.tiny().thinker_config
LENGTH = 64
# of six seconds: three frames of two seconds, four cells each, and 25 tokens of sound a second
VIDEO = Interleaved(Grid(3, 2, 2, 2.0), 150)


def position_ids(variant: Variant) -> np.ndarray:
    """[3, T] of two examples in a row: a text with a video, and a text."""
    first = [Text(3), Grid(2, 2, 2, 1.0), Text(2)]
    begin = sum(segment.length for segment in first)
    spans = [*mrope.resolve_spans(first, CONFIG), *mrope.resolve_spans([Text(4)], CONFIG, begin=begin)]
    segment_ids = np.zeros((1, LENGTH), np.int32)
    segment_ids[0, :begin] = 1
    segment_ids[0, begin : begin + 4] = 2
    # of a batch nothing else is read
    nothing = np.zeros((1, LENGTH), np.int32)
    inputs = OmniBatch(nothing, segment_ids, nothing, mrope.stack_spans([spans], LENGTH))
    batch = change_ids(TrainBatch(inputs, nothing, nothing.astype(np.float32), nothing), variant)
    return np.asarray(mrope.position_ids(batch.inputs.spans, segment_ids)[0])[:, 0, : begin + 4]


def test_plain_ids_count_the_tokens_of_each_example() -> None:
    assert (position_ids(VARIANTS["plain"]) == [*range(13), *range(4)]).all()


def test_ordinal_time_counts_frames() -> None:
    published = position_ids(VARIANTS["tmrope"])
    ordinal = position_ids(VARIANTS["ordinal"])
    # the second frame is a second later, or one frame later
    assert published[0, 7] - published[0, 3] == 25
    assert ordinal[0, 7] - ordinal[0, 3] == 1
    # rows and columns are the same, and so is all that is no frame
    assert (published[1:] == ordinal[1:]).all()
    assert (np.delete(published[0], range(7, 11)) == np.delete(ordinal[0], range(7, 11))).all()


def test_sound_comes_before_the_pictures_of_its_chunk() -> None:
    published = layout.interleave(VIDEO, CONFIG)
    with layout_of(VARIANTS["sound-first"]):
        swapped = layout.interleave(VIDEO, CONFIG)
        assert mrope.interleave(VIDEO, CONFIG) == swapped
    assert [chunk.is_audio for chunk in published] == [False, True] * 3
    assert [chunk.is_audio for chunk in swapped] == [True, False] * 3
    assert set(published) == set(swapped) and len(published) == len(swapped)
    assert swapped[:2] == [Chunk(True, 0, 50), Chunk(False, 0, 4)]
    assert layout.interleave(VIDEO, CONFIG) == published


@pytest.mark.parametrize("seconds,lengths", [(1, 6), (4, 2), (VARIANTS["whole"].chunk_seconds, 1)])
def test_chunks_have_their_length(seconds: int, lengths: int) -> None:
    config = dataclasses.replace(CONFIG, seconds_per_chunk=seconds)
    video = Interleaved(Grid(6, 2, 2, 1.0), 150)
    assert sum(chunk.is_audio for chunk in layout.interleave(video, config)) == lengths


def test_a_wrong_frame_rate_moves_the_frames() -> None:
    video = VisionInput(np.zeros((16, 4), np.float32), (2, 4, 2), "video", seconds_per_grid=1.0)
    with layout_of(dataclasses.replace(VARIANTS["tmrope"], frame_rate_factor=2.0)):
        assert video.cells(2) == Grid(2, 2, 1, 0.5)
    assert video.cells(2) == Grid(2, 2, 1, 1.0)


def test_the_interval_is_that_of_students_t() -> None:
    mean, half = mean_and_interval([0.5, 0.6, 0.7])
    assert mean == pytest.approx(0.6) and half == pytest.approx(4.3027 * 0.1 / np.sqrt(3), rel=1e-4)
    assert np.isnan(mean_and_interval([0.5])[1])

"""TMRoPE against golden files made with the reference (``get_rope_index``), and against itself."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from omni_jax import mrope
from omni_jax.config import OmniConfig
from omni_jax.segments import Grid, Interleaved, Text
from tests.rope_index import expand, rope_index

EXAMPLES = sorted((Path(__file__).parent / "data" / "rope_examples").glob("*.json"))
THINKER = OmniConfig.qwen2_5_omni_7b().thinker_config


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_golden(path):
    example = json.loads(path.read_text())
    ids, deltas = rope_index(example["inputs"], THINKER)
    np.testing.assert_array_equal(ids, np.asarray(example["expected"]["position_ids"]))
    np.testing.assert_array_equal(deltas[:, None], np.asarray(example["expected"]["mrope_position_deltas"]))


def test_all_golden_files_are_here():
    assert len(EXAMPLES) == 20


def test_rows_without_pictures_count_up():
    inputs = dict(image_grid_thw=None, video_grid_thw=None, second_per_grids=None, audio_seqlens=[25])
    sound = [THINKER.audio_start_token_id, *[THINKER.audio_token_index] * 6, THINKER.audio_end_token_id]
    inputs |= dict(input_ids=[[0, 0, *sound, 5], [1] * 11], use_audio_in_video=False)
    inputs["attention_mask"] = [[0, 0] + [1] * 9, [1] * 9 + [0, 0]]
    ids, deltas = rope_index(inputs, THINKER)
    np.testing.assert_array_equal(ids[0], [[1, 1, *range(9)], [*range(9), 1, 1]])
    np.testing.assert_array_equal(ids[1:], ids[[0, 0]])
    np.testing.assert_array_equal(deltas, 0)


small = st.integers(1, 4)
grids = st.builds(Grid, small, small, small, st.sampled_from([0.5, 0.7, 1.0, 3.0]))
segment = st.one_of(
    st.builds(Text, st.integers(1, 6)),
    st.builds(Grid, st.integers(1, 3), st.integers(1, 4), st.integers(1, 4), st.sampled_from([0.5, 1.0, 3.0])),
    st.builds(
        Interleaved,
        st.builds(Grid, st.integers(1, 4), st.integers(1, 3), st.integers(1, 3), st.sampled_from([0.7, 2.0])),
        st.integers(1, 90),
    ),
)


@settings(max_examples=40, deadline=None)
@given(st.lists(segment, min_size=1, max_size=5), st.integers(0, 7))
def test_ids_do_not_depend_on_the_padding(segments, pad):
    length = sum(s.length for s in segments)
    on_left, delta_left = expand([mrope.resolve_spans(segments, THINKER, begin=pad)], [[0] * pad + [1] * length])
    on_right, delta_right = expand([mrope.resolve_spans(segments, THINKER)], [[1] * length + [0] * pad])
    np.testing.assert_array_equal(on_left[..., pad:], on_right[..., :length])
    np.testing.assert_array_equal(on_left[..., :pad], 1)
    np.testing.assert_array_equal(delta_left, delta_right)


def test_a_dialogue_goes_on_from_the_next_free_id():
    first, second = [Text(4), Grid(1, 2, 3)], [Text(3), Grid(2, 2, 2)]
    whole = mrope.resolve_spans([*first, Text(1), *second], THINKER)
    rest = mrope.resolve_spans([Text(1), *second], THINKER, begin=10, start=4 + 3)
    assert whole[2:] == rest

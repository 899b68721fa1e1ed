import itertools
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from omni_jax.config import ThinkerConfig
from omni_jax.errors import InputError
from omni_jax.processing.layout import (
    AudioInput,
    VisionInput,
    lay_out,
    media_tokens,
)
from omni_jax.segments import Grid, Interleaved, Text
from tests.rope_index import MediaLengths, segments_from_tokens

TINY = ThinkerConfig.tiny()
V, E, A, Z = (
    TINY.vision_start_token_id,
    TINY.vision_end_token_id,
    TINY.audio_start_token_id,
    TINY.audio_end_token_id,
)
AUDIO, IMAGE, VIDEO = TINY.audio_token_index, TINY.image_token_index, TINY.video_token_index


def sound(frames):
    return AudioInput(np.zeros((frames, 128), np.float32))


def sight(t, rows, columns, kind="image", seconds=1.0):
    """Of this many merged cells."""
    return VisionInput(np.zeros((4 * t * rows * columns, 8)), (t, 2 * rows, 2 * columns), kind, seconds)


def test_text_alone():
    prompt = lay_out([1, 2, 3], [], TINY)
    np.testing.assert_array_equal(prompt.tokens, [1, 2, 3])
    assert prompt.segments == (Text(3),) and prompt.media == () and len(prompt) == 3
    np.testing.assert_array_equal(prompt.media_item, -1)
    assert prompt.usage.text == prompt.usage.total == 3


def test_a_picture_and_a_sound():
    picture, clip = sight(1, 1, 2), sound(13)
    prompt = lay_out([5, V, IMAGE, E, A, AUDIO, Z, 6], [picture, clip], TINY)
    np.testing.assert_array_equal(prompt.tokens, [5, V, IMAGE, IMAGE, E, A, AUDIO, AUDIO, AUDIO, Z, 6])
    np.testing.assert_array_equal(prompt.media_item, [-1, -1, 0, 0, -1, -1, 1, 1, 1, -1, -1])
    np.testing.assert_array_equal(prompt.media_token, [0, 0, 0, 1, 0, 0, 0, 1, 2, 0, 0])
    assert prompt.segments == (Text(2), Grid(1, 1, 2), Text(7))
    assert prompt.media == (picture, clip)
    usage = prompt.usage
    assert (usage.text, usage.image, usage.audio, usage.video, usage.audio_seconds) == (6, 2, 3, 0, 0.13)


def test_a_video_with_its_sound():
    video, track = sight(3, 1, 1, "video", 1.0), sound(240)  # 60 tokens
    prompt = lay_out([V, VIDEO, E, 7], [(video, track)], TINY)
    expected = [V, A, VIDEO, VIDEO, *[AUDIO] * 50, VIDEO, *[AUDIO] * 10, Z, E, 7]
    np.testing.assert_array_equal(prompt.tokens, expected)
    assert prompt.segments == (Interleaved(Grid(3, 1, 1), 60), Text(1))
    assert prompt.media == (video, track)
    np.testing.assert_array_equal(prompt.media_token[prompt.media_item == 0], range(3))
    np.testing.assert_array_equal(prompt.media_token[prompt.media_item == 1], range(60))
    assert prompt.usage.video == 3 and prompt.usage.audio == 60 and prompt.usage.video_seconds == 3.0


def test_placeholders_and_media_must_pair_up():
    with pytest.raises(InputError, match=re.escape("placeholders for ['audio'], but the messages carry ['image']")):
        lay_out([A, AUDIO, Z], [sight(1, 1, 1)], TINY)
    with pytest.raises(InputError, match=re.escape("placeholders for [], but the messages carry ['video']")):
        lay_out([1], [(sight(1, 1, 1, "video"), sound(9))], TINY)
    with pytest.raises(InputError, match="must put a video with sound between a begin and an end token"):
        lay_out([VIDEO], [(sight(1, 1, 1, "video"), sound(9))], TINY)


cells = st.integers(1, 4)
pictures = st.builds(sight, st.just(1), cells, cells)
videos = st.builds(sight, cells, cells, cells, st.just("video"), st.sampled_from([0.3, 1.0, 2.5]))
sounds = st.builds(sound, st.integers(3, 500))
items = st.lists(st.one_of(pictures, videos, sounds, st.tuples(videos, sounds)), max_size=4)


def marked(item):
    if isinstance(item, AudioInput):
        return [A, AUDIO, Z]
    kind = "video" if isinstance(item, tuple) else item.kind
    return [V, {"image": IMAGE, "video": VIDEO}[kind], E]


@settings(max_examples=100, deadline=None)
@given(items, st.integers(0, 3))
def test_every_layout(items, between):
    ids = [token for item in items for token in [*[1] * between, *marked(item)]] + [2]
    prompt = lay_out(ids, items, TINY)
    assert sum(segment.length for segment in prompt.segments) == len(prompt) == prompt.usage.total
    for i, media in enumerate(prompt.media):
        own = prompt.media_item == i
        np.testing.assert_array_equal(prompt.media_token[own], range(media_tokens(media, TINY)))
        token = AUDIO if isinstance(media, AudioInput) else {"image": IMAGE, "video": VIDEO}[media.kind]
        assert (prompt.tokens[own] == token).all()
    assert not set(prompt.tokens[prompt.media_item == -1]) & {AUDIO, IMAGE, VIDEO}
    texts = [isinstance(segment, Text) for segment in prompt.segments]
    assert not any(a and b for a, b in itertools.pairwise(texts))


@settings(max_examples=100, deadline=None)
@given(items.filter(lambda items: len({isinstance(i, tuple) for i in items if marked(i)[1] == VIDEO}) < 2))
def test_a_row_can_be_read_back(items):
    """Except where silent videos stand beside videos with sound, which one flag cannot tell apart."""
    prompt = lay_out([1, *[token for item in items for token in marked(item)], 2], items, TINY)
    seen = [m for m in prompt.media if isinstance(m, VisionInput)]
    clips = [m for m in seen if m.kind == "video"]
    lengths = MediaLengths.of(
        [m.grid for m in seen if m.kind == "image"],
        [m.grid for m in clips],
        [m.seconds_per_grid for m in clips],
        [len(m.mel) for m in prompt.media if isinstance(m, AudioInput)],
    )
    with_sound = any(isinstance(item, tuple) for item in items)
    assert segments_from_tokens(prompt.tokens, lengths, TINY, use_audio_in_video=with_sound) == prompt.segments


def test_rows_that_do_not_fit_their_sizes():
    row = [1, V, IMAGE, IMAGE, E]
    with pytest.raises(InputError, match=r"token 2: an image of this size takes 4 tokens"):
        segments_from_tokens(row, MediaLengths.of([(1, 4, 4)]), TINY)
    with pytest.raises(InputError, match="token 2: the row holds one image more than there are sizes for"):
        segments_from_tokens(row, MediaLengths.of([]), TINY)
    with pytest.raises(InputError, match="token 1: the row holds one sound more"):
        segments_from_tokens([A, AUDIO, Z], MediaLengths.of([]), TINY)
    video = [V, A, VIDEO, AUDIO, Z, E]
    lengths = MediaLengths.of(None, [(1, 2, 2)], [1.0], [9])
    with pytest.raises(InputError, match="token 0: a video with its sound of this size takes 7 tokens"):
        segments_from_tokens(video, lengths, TINY, use_audio_in_video=True)

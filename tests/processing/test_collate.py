"""Prompts to a batch: every token finds its own feature, whatever the batch is made of."""

import dataclasses

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from omni_jax.batch import bucket, bucket_windows
from omni_jax.config import OmniConfig
from omni_jax.processing.collate import _lay_out_windows, collate
from omni_jax.processing.layout import AudioInput, VisionInput, lay_out
from tests.processing.test_layout import TINY as THINKER
from tests.processing.test_layout import marked
from tests.rope_index import expand_table

# a patch that is one number, so that a test can hold a batch in its hand
SMALL = dict(in_channels=1, patch_size=1, temporal_patch_size=1, window_size=8)
VISION = dataclasses.replace(THINKER.vision_config, **SMALL)
AUDIO = dataclasses.replace(THINKER.audio_config, num_mel_bins=2)
CONFIG = OmniConfig.tiny(thinker_config=dataclasses.replace(THINKER, vision_config=VISION, audio_config=AUDIO))


def sight(number, t, rows, columns, kind="image"):
    """Of this many merged cells; every patch of a cell holds ``number`` and the cell's place."""
    patches = np.repeat(number + np.arange(t * rows * columns), 4)[:, None].astype(np.float32)
    return VisionInput(patches, (t, 2 * rows, 2 * columns), kind, 0.7)


def sound(number, frames):
    """Every frame holds ``number`` and its token's place."""
    return AudioInput(np.repeat((number + np.arange(frames) // 4)[:, None], 2, 1).astype(np.float32))


side = st.integers(1, 9)
number = st.integers(1, 900).map(lambda n: 10_000 * n)
pictures = st.builds(sight, number, st.just(1), side, side)
videos = st.builds(sight, number, st.integers(1, 3), side, side, st.just("video"))
sounds = st.builds(sound, number, st.integers(4, 450))
prompts = st.lists(st.one_of(pictures, videos, sounds, st.tuples(videos, sounds)), max_size=3).map(
    lambda items: lay_out([1, *[t for item in items for t in marked(item)], 2], items, CONFIG.thinker_config)
)


def features(batch):
    """Stands in for the encoders: a token's feature is the number that its frames or patches hold."""
    out = []
    if batch.audio is not None:
        tokens = batch.audio.mel.reshape(len(batch.audio.mel), AUDIO.block_tokens, -1)
        out.append(tokens[..., 0].reshape(-1))
    for frames in batch.vision:
        f, w, p, _ = frames.patches.shape
        cells = frames.patches.reshape(f, w, p // 4, 4)
        assert (cells == cells[..., :1]).all()  # a cell's four patches are together
        out.append(cells[..., 0].reshape(-1))
    return np.concatenate([np.zeros(0), *out])


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(prompts, min_size=1, max_size=3))
def test_every_token_finds_its_own_feature(prompts):
    batch = collate(prompts, CONFIG)
    found = features(batch)
    for i, prompt in enumerate(prompts):
        real = np.flatnonzero(batch.segment_ids[i])
        np.testing.assert_array_equal(real, np.arange(len(prompt)))
        np.testing.assert_array_equal(batch.tokens[i, real], prompt.tokens)
        for j, media in enumerate(prompt.media):
            own = real[prompt.media_item == j]
            first = media.mel[0, 0] if isinstance(media, AudioInput) else media.patches[0, 0]
            expected = first + prompt.media_token[prompt.media_item == j]
            np.testing.assert_array_equal(found[batch.media_index[i, own]], expected)
        rest = np.setdiff1d(np.arange(batch.tokens.shape[1]), real[prompt.media_item >= 0])
        assert (batch.media_index[i, rest] == -1).all()


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(prompts, min_size=1, max_size=3))
def test_shapes_are_bucketed_and_windows_hold_what_they_say(prompts):
    batch = collate(prompts, CONFIG)
    media = [m for prompt in prompts for m in prompt.media]
    assert batch.tokens.shape[1] == bucket(max(map(len, prompts)), 64)
    blocks = sum(-(-len(m.mel) // 200) for m in media if isinstance(m, AudioInput))
    assert (batch.audio is None) == (blocks == 0)
    if batch.audio is not None:
        assert batch.audio.mel.shape == (bucket(blocks), 200, 2)
        assert batch.audio.length.sum() == sum(len(m.mel) for m in media if isinstance(m, AudioInput))
    widths = [frames.patches.shape[1] for frames in batch.vision]
    assert widths == sorted(set(widths)) and all(w == bucket_windows(w) for w in widths)
    patches = sum(len(m.patches) for m in media if isinstance(m, VisionInput))
    assert sum(int(frames.valid.sum()) for frames in batch.vision) == patches
    for frames in batch.vision:
        assert frames.patches.shape[2] == 64
        assert not frames.patches[~frames.valid].any() and not frames.row[~frames.valid].any()
        # real slots come first in their entry
        assert (frames.valid[..., :-1] >= frames.valid[..., 1:]).all()


def test_windows_of_a_picture():
    """3 x 5 cells in windows of 4 x 4, one of 12 cells and one of 3 (docs/reference.md, 4)."""
    prompt = lay_out(marked(sight(0, 1, 3, 5)), [sight(0, 1, 3, 5)], CONFIG.thinker_config)
    (frames,) = collate([prompt], CONFIG).vision
    assert frames.patches.shape == (1, 1, 64, 1)
    order = [0, 1, 2, 3, 5, 6, 7, 8, 10, 11, 12, 13, 4, 9, 14]
    np.testing.assert_array_equal(frames.patches[frames.valid][::4, 0], order)
    assert frames.valid.sum() == 60
    row, column = frames.row[frames.valid].reshape(15, 4), frames.column[frames.valid].reshape(15, 4)
    np.testing.assert_array_equal(row, 2 * (np.array(order) // 5)[:, None] + [0, 0, 1, 1])
    np.testing.assert_array_equal(column, 2 * (np.array(order) % 5)[:, None] + [0, 1, 0, 1])


def test_windows_at_the_edges_share_an_entry() -> None:
    """5 x 9 cells: two whole windows, one of 4 x 1, two of 1 x 4 and one of a single cell."""
    prompt = lay_out(marked(sight(0, 1, 5, 9)), [sight(0, 1, 5, 9)], CONFIG.thinker_config)
    (frames,) = collate([prompt], CONFIG).vision
    assert frames.patches.shape == (1, 3, 64, 1)
    np.testing.assert_array_equal(frames.valid[0].sum(-1), [64, 64, 52])
    shared = frames.patches[0, 2, :52:4, 0]
    np.testing.assert_array_equal(shared, [8, 17, 26, 35, 36, 37, 38, 39, 40, 41, 42, 43, 44])


@pytest.mark.parametrize("side", [2, 4])
def test_entries_of_many_sizes(side: int) -> None:
    """A window lies in one entry and is whole there; few slots are empty."""
    for height, width in ((1, 1), (3, 4), (5, 9), (17, 23), (9, 40), (2, 33), (38, 38), (51, 7)):
        layout = _lay_out_windows(height, width, side, 2)
        assert len(set(zip(layout.entry, layout.slot, strict=True))) == height * width  # no slot is taken twice
        assert layout.slot.max() < side**2 and set(layout.entry) == set(range(layout.num_entries))
        row, column = np.divmod(np.arange(height * width), width)
        window = row // side * width + column // side
        for number in np.unique(window):
            own = window == number
            assert len(set(layout.entry[own])) == 1
            np.testing.assert_array_equal(np.diff(layout.slot[own]), 1)
        full = height // side * (width // side)
        # of what shares entries at least half of each is taken, but for the last
        assert layout.num_entries <= full + 1 + 2 * (height * width - full * side**2) // side**2


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(prompts, min_size=2, max_size=2))
def test_ids_are_the_same_alone_and_in_a_batch(prompts):
    batch = collate(prompts, CONFIG)
    ids, _ = expand_table(batch.spans, batch.segment_ids)
    for i, prompt in enumerate(prompts):
        alone = collate([prompt], CONFIG)
        expected, _ = expand_table(alone.spans, alone.segment_ids)
        np.testing.assert_array_equal(ids[:, i, : len(prompt)], expected[:, 0, : len(prompt)])

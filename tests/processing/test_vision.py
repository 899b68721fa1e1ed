import numpy as np
import pytest
from PIL import Image

from omni_jax.errors import InputError
from omni_jax.processing.vision import (
    PixelSettings,
    frame_indices,
    image_input,
    smart_nframes,
    smart_resize,
    video_input,
    video_size,
)

PIXELS = PixelSettings()


def noise(height, width, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


@pytest.mark.parametrize(
    ("size", "grid"),
    [
        ((56, 56), (1, 4, 4)),
        ((10, 10), (1, 4, 4)),
        ((100, 100), (1, 8, 8)),
        ((480, 640), (1, 34, 46)),
        ((720, 1280), (1, 52, 92)),
        ((1080, 1920), (1, 78, 138)),
        ((2160, 3840), (1, 154, 274)),
        ((4000, 6000), (1, 208, 312)),
        ((14, 700), (1, 2, 30)),
        ((1000, 5001), (1, 72, 358)),
    ],
)
def test_image_grids(size, grid):
    height, width = smart_resize(*size, PIXELS.cell, PIXELS.min_pixels, PIXELS.max_pixels)
    assert (1, height // 14, width // 14) == grid


@pytest.mark.parametrize(
    ("size", "frames", "resized"),
    [
        ((720, 1280), 4, (560, 1008)),
        ((720, 1280), 240, (560, 1008)),
        ((720, 1280), 768, (336, 644)),
        ((240, 320), 20, (280, 392)),
    ],
)
def test_video_sizes(size, frames, resized):
    assert video_size(*size, frames, PIXELS, {}) == resized


def test_pixel_budgets_of_the_user():
    small = image_input(noise(500, 500), PIXELS, {"max_pixels": 50_000})
    assert 4 * 14 * 14 <= np.prod(small.grid) * 14 * 14 <= 50_000
    large = image_input(noise(60, 60), PIXELS, {"min_pixels": 90_000})
    assert np.prod(large.grid) * 14 * 14 >= 90_000
    height, width = video_size(720, 1280, 4, PIXELS, {"max_pixels": 60_000})
    assert height * width <= 60_000  # under the least that is usual
    height, width = video_size(720, 1280, 4, PIXELS, {"max_pixels": 10**9})
    assert (height, width) == (560, 1008)  # never over the most that is usual
    height, width = video_size(120, 160, 4, PIXELS, {"min_pixels": 200_000})
    assert height * width >= 200_000


def test_pictures_that_are_refused():
    with pytest.raises(InputError, match="2010 x 10 pixels: one side is over 200 times the other"):
        image_input(noise(10, 2010), PIXELS, {})
    with pytest.raises(InputError, match="min_pixels 9000 is over max_pixels 5000"):
        image_input(noise(50, 50), PIXELS, {"min_pixels": 9000, "max_pixels": 5000})


@pytest.mark.parametrize(
    ("total", "fps", "options", "frames"),
    [
        (30, 10.0, {}, 6),
        (25, 10.0, {}, 4),
        (5, 30.0, {}, 4),
        (3, 30.0, {}, 2),
        (300, 30.0, {"fps": 1.0}, 10),
        (100_000, 30.0, {}, 768),
        (30, 10.0, {"fps": 100.0}, 30),
        (31, 10.0, {"nframes": 7}, 8),
        (31, 10.0, {"nframes": 30}, 30),
    ],
)
def test_number_of_frames(total, fps, options, frames):
    assert smart_nframes(total, fps, PIXELS, options) == frames
    indices = frame_indices(total, frames)
    assert indices[0] == 0 and indices[-1] == total - 1 and len(indices) == frames and (np.diff(indices) > 0).all()


def test_too_few_frames_are_refused():
    with pytest.raises(InputError, match="the video has 1 frames to look at; at least 2 are needed"):
        smart_nframes(1, 10.0, PIXELS, {})
    with pytest.raises(InputError, match="nframes is 12; this video allows 2 to 10"):
        smart_nframes(11, 10.0, PIXELS, {"nframes": 12})


def test_an_odd_number_of_frames_shows_the_last_twice():
    frames = [noise(56, 56, seed) for seed in range(3)]
    seen = video_input(frames, 3, 4.0, PIXELS, {"min_pixels": 56 * 56})
    assert seen.grid == (2, 4, 4) and seen.seconds_per_grid == 0.5 and seen.seconds == 1.0
    last = seen.patches.reshape(2, 16, 3, 2, 14 * 14)[1]
    np.testing.assert_array_equal(last[:, :, 0], last[:, :, 1])


def test_a_patch_holds_its_pixels():
    """The patch at row 2, column 1 of a picture stands where the 2 x 2 blocks put it."""
    levels = np.zeros((56, 84, 3), np.uint8)
    levels[28:42, 14:28] = [255, 0, 128]
    seen = image_input(Image.fromarray(levels), PIXELS, {})
    assert seen.grid == (1, 4, 6)
    lit = np.flatnonzero(seen.patches[:, 0] > 0)
    block = 1 * 3 + 0  # second row of blocks, first column
    np.testing.assert_array_equal(lit, [block * 4 + 0 * 2 + 1])
    mean, std = PIXELS.image_mean, PIXELS.image_std
    patch = seen.patches[lit[0]].reshape(3, 2 * 14 * 14)
    expected = [(level / 255 - m) / s for level, m, s in zip([255, 0, 128], mean, std, strict=True)]
    np.testing.assert_allclose(patch, np.repeat(np.array(expected)[:, None], 392, 1), rtol=1e-6)

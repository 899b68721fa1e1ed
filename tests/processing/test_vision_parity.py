"""Patches against the reference's image and video processors."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor
from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize as reference_smart_resize
from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor

from omni_jax.errors import InputError
from omni_jax.processing import media, vision
from omni_jax.processing.vision import PixelSettings
from tests.processing.conftest import MEDIA

PIXELS = PixelSettings()
# of the reference's class; given each time, for its constructor writes into the dictionary of the class
VIDEO_SIZE = {"shortest_edge": 128 * 28 * 28, "longest_edge": 28 * 28 * 768}
# levels of 255: Pillow and torchvision round the same filter at different places
RESIZE_TOLERANCE = 2


@settings(max_examples=300, deadline=None)
@given(st.integers(1, 5000), st.integers(1, 5000), st.integers(1, 10**6), st.integers(0, 10**7))
def test_smart_resize(height, width, low, more):
    try:
        ours = vision.smart_resize(height, width, 28, low, low + more)
    except InputError:
        with pytest.raises(ValueError, match="aspect ratio"):
            reference_smart_resize(height, width, 28, low, low + more)
        return
    assert ours == reference_smart_resize(height, width, 28, low, low + more)


@pytest.mark.parametrize("frames", [2, 4, 6, 30, 124, 256, 768])
def test_frame_indices(frames):
    for total in range(frames, 3 * frames + 40):
        expected = torch.linspace(0, total - 1, frames).round().long().numpy()
        np.testing.assert_array_equal(vision.frame_indices(total, frames), expected)


def picture(name):
    return media.read_image(MEDIA / name)


@pytest.mark.parametrize(
    "limits",
    [(3136, 12_845_056), (3136, 20_000), (100_000, 12_845_056)],
    ids=["published", "smaller", "larger"],
)
@pytest.mark.parametrize("name", ["picture.jpg", "picture.png", 0, 1, 2])
def test_images_are_exact(name, limits):
    if isinstance(name, int):
        rng = np.random.default_rng(name)
        shape = (*rng.integers(20, 300, 2), 3)
        image = Image.fromarray(rng.integers(0, 256, shape, np.uint8))
    else:
        image = picture(name)
    reference = Qwen2VLImageProcessor(min_pixels=limits[0], max_pixels=limits[1])(image, return_tensors="np")
    ours = vision.image_input(image, PixelSettings(min_pixels=limits[0], max_pixels=limits[1]), {})
    np.testing.assert_array_equal([ours.grid], reference["image_grid_thw"])
    np.testing.assert_array_equal(ours.patches, reference["pixel_values"])


@pytest.mark.parametrize("size", [(120, 160), (333, 251), (720, 1280)])
@pytest.mark.parametrize("count", [4, 5])
def test_videos_through_the_resize(size, count):
    rng = np.random.default_rng(count)
    coarse = [Image.fromarray(rng.integers(0, 256, (9, 12, 3), np.uint8)) for _ in range(count)]
    frames = [image.resize(size[::-1], Image.Resampling.BILINEAR) for image in coarse]
    compare_videos(frames)


@pytest.mark.parametrize("name", ["video.mp4", "silent.mp4"])
def test_real_videos(name):
    compare_videos(list(media.read_video(MEDIA / name, PIXELS, {}).frames))


def compare_videos(frames):
    ours = vision.video_input(frames, len(frames), 2.0, PIXELS, {})
    pixels = torch.from_numpy(np.stack([np.asarray(frame) for frame in frames])).permute(0, 3, 1, 2)
    reference = Qwen2VLVideoProcessor(size=dict(VIDEO_SIZE))(videos=[pixels], return_tensors="pt")
    np.testing.assert_array_equal([ours.grid], reference["video_grid_thw"].numpy())
    difference = levels(ours.patches) - levels(reference["pixel_values_videos"].numpy())
    assert np.abs(difference).max() <= RESIZE_TOLERANCE + 1e-3


def levels(patches):
    std = np.float32(PIXELS.image_std)[:, None]
    return patches.reshape(len(patches), 3, -1) * std * 255

"""Whole prompts against ``Qwen2_5OmniProcessor`` over the same files."""

import numpy as np
import pytest
from transformers import Qwen2_5OmniProcessor, WhisperFeatureExtractor
from transformers.models.qwen2 import Qwen2TokenizerFast
from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor
from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor

from omni_jax.processing import media
from omni_jax.processing.audio import MelSettings
from omni_jax.processing.chat import BUILT_IN_TEMPLATE, SPEECH_SYSTEM_PROMPT
from omni_jax.processing.layout import AudioInput
from omni_jax.processing.vision import PixelSettings
from tests.processing.conftest import MEDIA
from tests.processing.test_audio_parity import TOLERANCE as MEL_TOLERANCE
from tests.processing.test_vision_parity import RESIZE_TOLERANCE, levels

MEL, PIXELS = MelSettings(), PixelSettings()
TEXT = {"type": "text", "text": "What does the system say?\n\n 123 hello world"}
SOUNDS = [{"type": "audio", "audio": MEDIA / name} for name in ("speech.wav", "speech2.mp3")]
PICTURES = [{"type": "image", "image": MEDIA / name} for name in ("picture.jpg", "picture.png")]
SILENT, VIDEO = ({"type": "video", "video": MEDIA / name} for name in ("silent.mp4", "video.mp4"))
MUTED = {**VIDEO, "use_audio_in_video": False}

# the reference has one flag for every video of a call, so a case holds either silent videos or videos with sound
CASES = {
    "text": [TEXT],
    "two sounds": [*SOUNDS, TEXT],
    "two pictures": [PICTURES[0], TEXT, PICTURES[1]],
    "silent video": [SILENT, TEXT],
    "muted videos": [TEXT, MUTED, SILENT],
    "video with sound": [VIDEO, TEXT],
    "two videos with sound": [VIDEO, VIDEO],
    "everything": [PICTURES[1], SOUNDS[1], VIDEO, TEXT, SOUNDS[0], PICTURES[0], VIDEO],
    "everything, silent": [SOUNDS[1], SILENT, TEXT, PICTURES[0], SOUNDS[0], MUTED],
}


@pytest.fixture(scope="module")
def reference(folder):
    """With the published numbers; the video processor has none of its own in the published files."""
    return Qwen2_5OmniProcessor(
        image_processor=Qwen2VLImageProcessor(min_pixels=PIXELS.min_pixels, max_pixels=PIXELS.max_pixels),
        video_processor=Qwen2VLVideoProcessor(),
        feature_extractor=WhisperFeatureExtractor(feature_size=128, chunk_length=300),
        tokenizer=Qwen2TokenizerFast.from_pretrained(folder),
        chat_template=BUILT_IN_TEMPLATE,
    )


def process(reference, content, fps):
    """What the reference makes of the same decoded media."""
    with_sound = any(part is VIDEO for part in content)
    sources = [(part["type"], part[part["type"]]) for part in content if part["type"] != "text"]
    audio, images, videos = [], [], []
    for kind, source in sources:
        if kind == "image":
            images.append(media.read_image(source))
        if kind == "video":
            frames = media.read_video(source, PIXELS, {}).frames
            videos.append(np.stack([np.asarray(frame).transpose(2, 0, 1) for frame in frames]))
        if kind == "audio" or (kind == "video" and with_sound):
            audio.append(media.read_audio(source, MEL))
    messages = [{"role": "system", "content": [{"type": "text", "text": SPEECH_SYSTEM_PROMPT}]}]
    messages += [{"role": "user", "content": [{"type": p["type"], "text": p.get("text", "")} for p in content]}]
    text = reference.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    options = {"audio": audio or None, "images": images or None, "videos": videos or None}
    extra = {"fps": fps} if videos else {}
    out = reference(text=text, use_audio_in_video=with_sound, return_tensors="pt", padding=True, **options, **extra)
    return {name: np.asarray(value) for name, value in out.items()}


@pytest.mark.parametrize("fps", [2.0, 1.3])
@pytest.mark.parametrize("case", CASES)
def test_prompt(processor, reference, case, fps):
    content = CASES[case]
    messages = [{"role": "system", "content": SPEECH_SYSTEM_PROMPT}, {"role": "user", "content": content}]
    ours = processor(messages, assume_fps=fps)
    theirs = process(reference, content, fps)
    np.testing.assert_array_equal(ours.tokens, theirs["input_ids"][0])
    compare_features(ours.media, theirs)


def compare_features(items, theirs):
    mels = [item.mel for item in items if isinstance(item, AudioInput)]
    for ours, features, mask in zip(
        mels, theirs.get("input_features", []), theirs.get("feature_attention_mask", []), strict=True
    ):
        np.testing.assert_allclose(ours, features.T[mask == 1], atol=MEL_TOLERANCE, rtol=0)
    for kind, name, tolerance in (("image", "pixel_values", 0), ("video", "pixel_values_videos", RESIZE_TOLERANCE)):
        seen = [item for item in items if not isinstance(item, AudioInput) and item.kind == kind]
        np.testing.assert_array_equal([item.grid for item in seen], theirs.get(f"{kind}_grid_thw", []))
        if seen:
            patches = np.concatenate([item.patches for item in seen])
            difference = levels(patches) - levels(theirs[name])
            assert np.abs(difference).max() <= tolerance + 1e-3

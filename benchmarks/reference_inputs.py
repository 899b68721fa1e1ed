"""The reference's processor on media files, for the PyTorch side of ``bench.py data``.

The reference has no decoders of its own: files are decoded for it by the code that does it for omni_jax.
"""

from __future__ import annotations

import functools
import importlib
from pathlib import Path
from typing import Any

import numpy as np
from transformers import Qwen2_5OmniProcessor, WhisperFeatureExtractor
from transformers.models.qwen2 import Qwen2TokenizerFast
from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor

from benchmarks.media import WITH_SOUND
from omni_jax.processing import media
from omni_jax.processing.audio import MelSettings
from omni_jax.processing.chat import BUILT_IN_TEMPLATE
from omni_jax.processing.vision import PixelSettings

MEL = MelSettings()
PIXELS = PixelSettings()
KINDS = {".wav": "audio", ".jpg": "image", ".mp4": "video"}


@functools.cache
def load_processor(folder: Path) -> Any:
    """transformers' processor with the published settings, the slow image processor and torchvision's for videos."""
    # not at the top: it needs torchvision
    video = importlib.import_module("transformers.models.qwen2_vl.video_processing_qwen2_vl")
    return Qwen2_5OmniProcessor(
        image_processor=Qwen2VLImageProcessor(min_pixels=PIXELS.min_pixels, max_pixels=PIXELS.max_pixels),
        video_processor=video.Qwen2VLVideoProcessor(),
        feature_extractor=WhisperFeatureExtractor(feature_size=128, chunk_length=300),
        tokenizer=Qwen2TokenizerFast.from_pretrained(folder),
        chat_template=BUILT_IN_TEMPLATE,
    )


def prepare_file(processor: Any, file: Path) -> Any:
    """What the reference's model takes of a dialogue about one file."""
    kind = KINDS[file.suffix]
    with_sound = file.name == WITH_SOUND
    audio = images = videos = None
    # decoding is omni_jax's on both sides, so that the processors are what differs
    if kind == "image":
        images = [media.read_image(file)]
    if kind == "video":
        frames = media.read_video(file, PIXELS, {}).frames
        # [frames, 3, height, width], as torchvision has it
        videos = [np.stack([np.asarray(frame).transpose(2, 0, 1) for frame in frames])]
    if kind == "audio" or with_sound:
        audio = [media.read_audio(file, MEL)]
    # the dialogue that our side reads as a row
    question = [{"type": kind, "text": ""}, {"type": "text", "text": "What is it?"}]
    answer = [{"type": "text", "text": "It is noise."}]
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    text = processor.apply_chat_template(messages, tokenize=False)
    return processor(
        text=text,
        audio=audio,
        images=images,
        videos=videos,
        use_audio_in_video=with_sound,
        return_tensors="pt",
        padding=True,
    )

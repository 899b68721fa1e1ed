"""The reference processor for ``bench.py data``; files are decoded for it by the code that does it for omni_jax."""

from __future__ import annotations

import tests.torchvision_stub  # noqa: F401, first: transformers looks for torchvision once, when it is imported

# isort: split
import functools
import importlib
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from transformers import Qwen2_5OmniProcessor, WhisperFeatureExtractor
from transformers.models.qwen2 import Qwen2TokenizerFast
from transformers.models.qwen2_vl.image_processing_qwen2_vl import Qwen2VLImageProcessor

from benchmarks.bench_sizes import middle_config
from benchmarks.data_ours import write_processor
from omni_jax.processing import media
from omni_jax.processing.audio import MelSettings
from omni_jax.processing.chat import BUILT_IN_TEMPLATE
from omni_jax.processing.vision import PixelSettings

MEL, PIXELS = MelSettings(), PixelSettings()


@functools.cache
def _processor() -> Any:
    """With the published numbers."""
    with tempfile.TemporaryDirectory() as folder:
        write_processor(Path(folder), middle_config())
        tokenizer = Qwen2TokenizerFast.from_pretrained(folder)
    # here, for it needs torchvision, which the other benchmarks do without
    video = importlib.import_module("transformers.models.qwen2_vl.video_processing_qwen2_vl").Qwen2VLVideoProcessor
    return Qwen2_5OmniProcessor(
        image_processor=Qwen2VLImageProcessor(min_pixels=PIXELS.min_pixels, max_pixels=PIXELS.max_pixels),
        video_processor=video(),
        feature_extractor=WhisperFeatureExtractor(feature_size=128, chunk_length=300),
        tokenizer=tokenizer,
        chat_template=BUILT_IN_TEMPLATE,
    )


def make(files: tuple[Path, ...]) -> float:
    """Seconds from files to what the model takes, one prompt for each."""
    processor = _processor()
    started = time.perf_counter()
    for file in files:
        _one(processor, file)
    return time.perf_counter() - started


def _one(processor: Any, file: Path) -> Any:
    kind = {".wav": "audio", ".jpg": "image", ".mp4": "video"}[file.suffix]
    audio = images = videos = None
    heard = file.name == "video.mp4"
    if kind == "image":
        images = [media.read_image(file)]
    if kind == "video":
        frames = media.read_video(file, PIXELS, {}).frames
        videos = [np.stack([np.asarray(frame).transpose(2, 0, 1) for frame in frames])]
    if kind == "audio" or heard:
        audio = [media.read_audio(file, MEL)]
    user = [{"type": kind, "text": ""}, {"type": "text", "text": "What is it?"}]
    messages = [{"role": "user", "content": user}]
    messages.append({"role": "assistant", "content": [{"type": "text", "text": "It is noise."}]})
    text = processor.apply_chat_template(messages, tokenize=False)
    options = dict(audio=audio, images=images, videos=videos, use_audio_in_video=heard)
    return processor(text=text, return_tensors="pt", padding=True, **options)

"""Prompts of ours as what PyTorch's Thinker takes."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from omni_jax.processing.layout import AudioInput, Prompt, VisionInput
from omni_jax.segments import Interleaved


def reference_arguments(prompt: Prompt) -> dict[str, Any]:
    """Arguments of ``Qwen2_5OmniThinkerForConditionalGeneration`` for a prompt, as a batch of one.

    Its tokens and media are those of our processor, so that nothing but the models can differ.
    """
    out: dict[str, Any] = dict(input_ids=torch.tensor(prompt.tokens[None].astype(np.int64)))  # [1, S]
    out["attention_mask"] = torch.ones_like(out["input_ids"])
    sounds = [m for m in prompt.media if isinstance(m, AudioInput)]
    if sounds:
        longest = max(len(m.mel) for m in sounds)
        mel = np.stack([np.pad(m.mel, ((0, longest - len(m.mel)), (0, 0))) for m in sounds])  # [sounds, frames, bins]
        out["input_features"] = torch.tensor(mel.transpose(0, 2, 1))
        out["feature_attention_mask"] = torch.tensor(np.stack([np.arange(longest) < len(m.mel) for m in sounds]))
    pictures = [m for m in prompt.media if isinstance(m, VisionInput)]
    for kind, pixels, grid in (
        ("image", "pixel_values", "image_grid_thw"),
        ("video", "pixel_values_videos", "video_grid_thw"),
    ):
        own = [m for m in pictures if m.kind == kind]
        if own:
            out[pixels] = torch.tensor(np.concatenate([m.patches for m in own]))
            out[grid] = torch.tensor([m.grid for m in own])
    videos = [m for m in pictures if m.kind == "video"]
    if videos:
        out["video_second_per_grid"] = torch.tensor([m.seconds_per_grid for m in videos])
    # a sound may also follow a silent video
    out["use_audio_in_video"] = any(isinstance(segment, Interleaved) for segment in prompt.segments)
    return out

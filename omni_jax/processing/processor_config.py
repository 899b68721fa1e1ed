"""The settings of ``preprocessor_config.json``: sizes of what the encoders are given."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from omni_jax.checks import check_float, check_int, shown
from omni_jax.config import OmniConfig
from omni_jax.errors import ConfigError, InputError
from omni_jax.plain_files import read_object
from omni_jax.processing.audio import MelSettings
from omni_jax.processing.layout import FRAMES_PER_SECOND
from omni_jax.processing.vision import PixelSettings

# keys of preprocessor_config.json that no part reads: names of classes, and sizes that follow from other keys
_IGNORED = frozenset(
    """feature_extractor_type image_processor_type video_processor_type processor_class auto_map nb_max_frames n_samples
    return_attention_mask size default_to_square crop_size data_format input_data_format device return_tensors
    disable_grouping pad_size do_pad""".split()
)
# the model was trained with these alone
_FIXED = {
    "padding_side": "right",
    "padding_value": 0.0,
    "dither": 0.0,
    "do_resize": True,
    "do_rescale": True,
    "do_normalize": True,
    "do_convert_rgb": True,
    "do_center_crop": False,
    "resample": 3,
    "rescale_factor": 1 / 255,
}

# the largest numbers that a file may have: memory follows from them
_MAX_SETTING = 2**16
_LARGEST_SETTINGS = {
    "sampling_rate": 2**20,
    "patch_size": 64,
    "temporal_patch_size": 16,
    "merge_size": 16,
    # those of the published file are 12,845,056 and 90,316,800
    **dict.fromkeys(("min_pixels", "max_pixels", "video_min_pixels", "video_max_pixels"), 2**26),
    "video_total_pixels": 2**28,
}


@dataclass(frozen=True)
class ProcessorConfig:
    """Sizes of what the encoders are given."""

    mel: MelSettings = field(default_factory=MelSettings)
    pixels: PixelSettings = field(default_factory=PixelSettings)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], where: str = "preprocessor_config.json") -> Self:
        """Reads the published file; a key that it does not have keeps the published value.

        Raises:
          ConfigError: for an unknown key, or a value that the model was not made for.
        """
        parts: dict[str, dict[str, Any]] = {"mel": {}, "pixels": {}}
        # one flat file has the settings of sound and of pictures
        names = {f.name: "mel" for f in dataclasses.fields(MelSettings)}
        names |= {f.name: "pixels" for f in dataclasses.fields(PixelSettings)}
        # later releases of transformers spell the bounds as edges of a size
        size = values.get("size") or {}
        if not isinstance(size, Mapping):
            raise ConfigError(f"{where}: size must be an object, got {shown(size)}")
        edges = {"min_pixels": size.get("shortest_edge"), "max_pixels": size.get("longest_edge")}
        # a key of its own outweighs the edges of later releases
        for key, value in (*edges.items(), *values.items()):
            if value is None:
                continue
            if key in names:
                parts[names[key]][key] = _check_setting(f"{where}: {key}", key, value)
            elif key in _FIXED:
                if value != _FIXED[key]:
                    raise ConfigError(f"{where}: {key} is {shown(value)}; only {_FIXED[key]!r} is supported")
            elif key not in _IGNORED:
                known = ", ".join(sorted(names))
                raise ConfigError(f"{where}: unknown key {shown(key)} (value {shown(value)}); known: {known}")
        return cls(MelSettings(**parts["mel"]), PixelSettings(**parts["pixels"]))

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Reads preprocessor_config.json of a checkpoint folder."""
        return cls.from_dict(read_object(folder / "preprocessor_config.json"))

    def check(self, config: OmniConfig) -> None:
        """Raises ConfigError if the model's encoders are not made for these sizes."""
        audio = config.thinker_config.audio_config
        vision = config.thinker_config.vision_config
        pairs = {
            "feature_size": (self.mel.feature_size, audio.num_mel_bins),
            "sampling_rate / hop_length": (self.mel.sampling_rate / self.mel.hop_length, FRAMES_PER_SECOND),
            "patch_size": (self.pixels.patch_size, vision.patch_size),
            "temporal_patch_size": (self.pixels.temporal_patch_size, vision.temporal_patch_size),
            "merge_size": (self.pixels.merge_size, vision.spatial_merge_size),
        }
        for name, (value, expected) in pairs.items():
            if value != expected:
                raise ConfigError(f"preprocessor_config.json: {name} is {value}, but the model takes {expected}")


def _check_setting(where: str, key: str, value: Any) -> Any:
    """A number of the preprocessor, or three for the colours, within what any model could have."""
    try:
        if key in ("image_mean", "image_std"):
            if not isinstance(value, list | tuple) or len(value) != 3:
                raise InputError(f"{where} must be three numbers, got {shown(value)}")
            return tuple(check_float(where, number, 0, 100, above=key == "image_std") for number in value)
        if key in ("max_seconds", "fps"):
            return check_float(where, value, 0, _MAX_SETTING, above=True)
        return check_int(where, value, 1, _LARGEST_SETTINGS.get(key, _MAX_SETTING))
    except InputError as e:  # it is a file that is wrong here, and no request
        raise ConfigError(str(e)) from None

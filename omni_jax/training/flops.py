"""FLOPs that devices can do, and what a model has of parameters, whatever it is trained on."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

# dense bfloat16 FLOPs a second of a device, as the makers state them; by jax's name of the device
_PEAKS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "TPU7x": 2307e12 / 2,  # jax counts two devices a chip
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H200": 989e12,
}


def peak_flops(device: Any) -> float | None:
    """FLOPs a second of a device in bfloat16; None where it is not known, as of a CPU."""
    return _PEAKS.get(device.device_kind)


def parameter_sizes(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
    """Elements of each parameter."""
    return {path: math.prod(shape) for path, shape in shapes.items()}

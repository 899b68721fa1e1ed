"""What the vocoder and its discriminators compute for a mel frame or a sample, and keep of it.

Of a convolution every element of the kernel is multiplied once for each place of its output, of a transposed one for
each place of its input.
"""

from __future__ import annotations

import math
import re

from omni_jax.config import BigVGANConfig
from omni_jax.models.conv_table import make_conv_table
from omni_jax.models.discriminators import PERIOD_LAYERS, PERIODS, RESOLUTION_LAYERS, RESOLUTIONS

# of a discriminator's layers in a step: for its own loss forward and twice that backward, of recorded and of generated
# sound; for the vocoder's forward on both, and back to the generated sound alone
_PASSES = 2 * 3 + 2 + 1


def vocoder_flops(config: BigVGANConfig, name: str, size: int) -> float:
    """Forward, for a mel frame.

    Args:
      config: of the vocoder.
      name: of a kernel, like ``stage_0/upsample/kernel``.
      size: of it.
    """
    found = re.match(r"stage_(\d+)/(upsample)?", name)
    if found is None:
        places = 1 if name.startswith("conv_in/") else math.prod(config.upsample_rates)
    else:
        # a transposed convolution is counted at the rate before it
        num_rates = int(found[1]) + (found[2] is None)
        places = math.prod(config.upsample_rates[:num_rates])
    return 2.0 * size * places


def discriminator_flops(name: str, size: int) -> float:
    """Of a step, for a sample of sound.

    Args:
      name: of a kernel, like ``period_0/conv_1/kernel``.
      size: of it.
    """
    found = re.match(r"(\w+)_(\d+)/conv_(\d+|out)/", name)
    assert found is not None, name
    places = _places(found[1], int(found[2]))
    return 2.0 * size * places[-1 if found[3] == "out" else int(found[3])] * _PASSES


def discriminator_floats(channels: int) -> float:
    """Outputs of all layers of all discriminators, for a sample of sound."""
    total = 0.0
    for place, (multiple, _) in zip(_places("period", 0), PERIOD_LAYERS, strict=True):
        # those of all periods have as many
        total += len(PERIODS) * place * multiple * channels
    for number in range(len(RESOLUTIONS)):
        total += sum(_places("resolution", number)) * channels
    return total


def vocoder_floats(config: BigVGANConfig) -> int:
    """Inputs of the convolutions of all residual blocks, for a mel frame."""
    num_convs = len(make_conv_table(config).num_taps)
    total = 0
    places = 1
    channels = config.upsample_initial_channel
    for rate in config.upsample_rates:
        places *= rate
        channels //= 2
        total += num_convs * places * channels
    return total


def _places(kind: str, number: int) -> list[float]:
    """Of the output of each layer but the last, which has those of the one before, for a sample of sound."""
    if kind == "period":
        places = 1.0
        strides = [stride for _, stride in PERIOD_LAYERS]
    else:
        resolution = RESOLUTIONS[number]
        places = (resolution.fft // 2 + 1) / resolution.hop
        strides = [stride for _, stride in RESOLUTION_LAYERS]
    found = []
    for stride in strides:
        places /= stride
        found.append(places)
    return found

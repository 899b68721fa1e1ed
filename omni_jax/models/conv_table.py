"""The convolutions of the vocoder's residual blocks as a table, for a loop over them."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from omni_jax.config import BigVGANConfig
from omni_jax.layers.conv import same_padding


class ConvTable(NamedTuple):
    """The convolutions of a stage's blocks, one entry for each, block by block.

    Attributes:
      num_taps, dilation: of each.
      first_tap: where its kernel begins among all.
      before: frames of padding in front.
      ends_round: whether it is the second of its round.
      ends_block: whether it is the last of its block.
    """

    num_taps: np.ndarray
    dilation: np.ndarray
    first_tap: np.ndarray
    before: np.ndarray
    ends_round: np.ndarray
    ends_block: np.ndarray


def make_conv_table(config: BigVGANConfig) -> ConvTable:
    """The table of the blocks of any stage; all stages have the same."""
    num_taps = []
    dilation = []
    before = []
    ends_block = []
    for kernel, dilations in zip(config.resblock_kernel_sizes, config.resblock_dilation_sizes, strict=True):
        for i, of_round in enumerate(dilations):
            # the first convolution of a round is dilated, the second is not
            for half, of_conv in enumerate((of_round, 1)):
                num_taps.append(kernel)
                dilation.append(of_conv)
                before.append(same_padding(kernel, of_conv)[0])
                ends_block.append(half == 1 and i + 1 == len(dilations))
    first_tap = np.cumsum([0, *num_taps[:-1]])
    ends_round = np.arange(len(num_taps)) % 2 == 1
    return ConvTable(
        np.array(num_taps), np.array(dilation), first_tap, np.array(before), ends_round, np.array(ends_block)
    )

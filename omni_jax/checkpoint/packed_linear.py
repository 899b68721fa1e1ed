"""Linear maps in 4 bits, as AWQ and GPTQ folders hold them: widened when they are read.

Such a folder has in place of ``NAME.weight``: whole numbers, packed eight to an int32 (``NAME.qweight``); a zero point
and a scale for each output and each group of inputs (``NAME.qzeros``, ``NAME.scales``); maybe the group of each input
(``NAME.g_idx``). A weight is (number - zero point) * scale. What is packed together:

====  ====================  =====================  ==========================================
      qweight               qzeros                 order of the eight numbers in an int32
====  ====================  =====================  ==========================================
AWQ   [in, out / 8]         [groups, out / 8]      0, 2, 4, 6, 1, 3, 5, 7
GPTQ  [in / 8, out]         [groups, out / 8]      0, 1, 2, 3, 4, 5, 6, 7; zero points less one
====  ====================  =====================  ==========================================

GPTQ's second format (``checkpoint_format`` "gptq_v2") has its zero points as they are.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from omni_jax.checkpoint.name_map import describe_list
from omni_jax.checkpoint.tensor_file import StoredTensor
from omni_jax.checks import shown
from omni_jax.errors import CheckpointError

CONFIG_KEY = "quantization_config"

_SUFFIX = ".qweight"
_BITS = 4
_PER_INT = 32 // _BITS
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


@dataclass(frozen=True)
class Packing:
    """How a folder packs its linear maps.

    Attributes:
      method: whose format.
      zero_offset: that is added to a zero point as it is stored.
    """

    method: Literal["awq", "gptq"]
    zero_offset: int


@dataclass(frozen=True)
class PackedTensor(StoredTensor):
    """A weight [out, in] that is read from its packed parts; stands where a ``StoredTensor`` would.

    Attributes:
      packing: of the folder.
      qweight, qzeros, scales: its parts.
      g_idx: group of each input, if the folder says so.
    """

    packing: Packing
    qweight: StoredTensor
    qzeros: StoredTensor
    scales: StoredTensor
    g_idx: StoredTensor | None

    def read(self) -> np.ndarray:
        """The weight in the dtype of its scales, float32 until the last rounding."""
        num_outputs, num_inputs = self.shape
        packed = self.qweight.read()
        zeros = _unpack(self.qzeros.read(), self.packing, axis=1)  # [groups, out]
        values = _unpack(packed, self.packing, axis=1 if self.packing.method == "awq" else 0)  # [in, out]
        scales = self.scales.read().astype(np.float32)  # [groups, out]
        if self.g_idx is None:
            group = np.arange(num_inputs) // (num_inputs // len(scales))
        else:
            group = self.g_idx.read()
            if group.min() < 0 or group.max() >= len(scales):
                raise CheckpointError(f"{self.file}: the groups of a weight are out of range; fetch the file again")
        offset = zeros.astype(np.float32) + self.packing.zero_offset
        widened = values.astype(np.float32)
        widened -= offset[group]
        widened *= scales[group]
        return np.ascontiguousarray(widened.T.astype(self.dtype)).reshape(num_outputs, num_inputs)


def find_packing(config_values: Mapping[str, Any]) -> Packing | None:
    """How a folder's config.json says that it is packed; None where it says nothing.

    Raises:
      CheckpointError: for another format than these two in 4 bits.
    """
    about = config_values.get(CONFIG_KEY)
    if about is None:
        return None
    if not isinstance(about, Mapping):
        raise CheckpointError(f"config.json: {CONFIG_KEY} is {shown(about)}; it must be an object")
    method = about.get("quant_method")
    bits = about.get("bits", about.get("w_bit"))
    if method not in ("awq", "gptq") or bits != _BITS:
        raise CheckpointError(
            f"the folder is quantised by {shown(method)} in {shown(bits)} bits; AWQ and GPTQ in {_BITS} bits are read"
        )
    if method == "awq":
        if about.get("version", "gemm") not in ("gemm", "GEMM"):
            raise CheckpointError(f"the folder is of AWQ's version {shown(about.get('version'))}; only gemm is read")
        return Packing("awq", 0)
    # the first format stores zero points less one
    return Packing("gptq", 0 if about.get("checkpoint_format") == "gptq_v2" else 1)


def widen_packed(tensors: Mapping[str, StoredTensor], packing: Packing | None) -> dict[str, StoredTensor]:
    """The tensors of a folder with a weight in place of each packed one.

    Raises:
      CheckpointError: where the parts of a weight are missing or do not fit each other, or there are packed weights in
        a folder whose config.json does not say how.
    """
    unpacked = dict(tensors)
    names = [name.removesuffix(_SUFFIX) for name in tensors if name.endswith(_SUFFIX)]
    if names and packing is None:
        raise CheckpointError(
            f"the folder has packed weights ({names[0]}{_SUFFIX} and others), but its config.json has no {CONFIG_KEY}"
        )
    wrong = []
    for name in names:
        assert packing is not None
        parts = {part: unpacked.pop(f"{name}.{part}", None) for part in ("qweight", "qzeros", "scales", "g_idx")}
        weight = _join_parts(parts, packing)
        if weight is None:
            wrong.append(name)
        else:
            unpacked[f"{name}.weight"] = weight
    whole = [name for name, tensor in unpacked.items() if tensor.dtype.kind == "i"]
    trouble = describe_list("packed weights whose parts are missing or do not fit each other", wrong)
    trouble += describe_list("tensors of whole numbers that are no part of one", whole)
    if trouble:
        raise CheckpointError(f"the folder does not hold what its {CONFIG_KEY} says:{trouble}")
    return unpacked


def _join_parts(parts: Mapping[str, StoredTensor | None], packing: Packing) -> PackedTensor | None:
    qweight, qzeros, scales, g_idx = (parts[name] for name in ("qweight", "qzeros", "scales", "g_idx"))
    if qweight is None or qzeros is None or scales is None:
        return None
    if any(len(part.shape) != 2 for part in (qweight, qzeros, scales)):
        return None
    rows, columns = qweight.shape
    num_groups, num_outputs = scales.shape
    # the axis that the eight lie on
    num_inputs = rows if packing.method == "awq" else rows * _PER_INT
    width = num_outputs // _PER_INT if packing.method == "awq" else num_outputs
    fits = columns == width and qzeros.shape == (num_groups, num_outputs // _PER_INT) and num_outputs % _PER_INT == 0
    fits = fits and num_groups > 0 and (g_idx is not None or num_inputs % num_groups == 0)
    fits = fits and (g_idx is None or g_idx.shape == (num_inputs,))
    kinds = [part.dtype.kind for part in (qweight, qzeros, g_idx) if part is not None]
    if not fits or kinds != ["i"] * len(kinds) or scales.dtype.kind == "i":
        return None
    shape = (num_outputs, num_inputs)
    fields = {field.name: getattr(scales, field.name) for field in dataclasses.fields(StoredTensor)}
    return PackedTensor(
        **{**fields, "shape": shape}, packing=packing, qweight=qweight, qzeros=qzeros, scales=scales, g_idx=g_idx
    )


def _unpack(packed: np.ndarray, packing: Packing, axis: int) -> np.ndarray:
    """The numbers of each int32 side by side along an axis, as bytes."""
    words = packed.view(np.uint32)  # the highest bits are a number's, and no sign
    order = _AWQ_ORDER if packing.method == "awq" else range(_PER_INT)
    pieces: dict[int, np.ndarray] = {}
    for place, number in enumerate(order):
        pieces[number] = ((words >> np.uint32(_BITS * place)) & np.uint32(2**_BITS - 1)).astype(np.uint8)
    in_order = [pieces[number] for number in range(_PER_INT)]
    stacked = np.stack(in_order, axis=axis + 1)  # [..., words, 8, ...]
    shape = list(packed.shape)
    shape[axis] *= _PER_INT
    assert math.prod(shape) == stacked.size
    return stacked.reshape(shape)

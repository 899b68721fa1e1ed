"""Which parts of a model are served in 8 or 4 bits, and their parameters made of those of a checkpoint.

int8: every linear map of Thinker and Talker. int4: the same, and the layers of the Thinker's decoder in 4 bits.
Embeddings, norms and convolutions keep their dtype, and so does all of Token2Wav, whose errors add up over the
evaluations of the flow. Keys and values of the decoders' caches may be in 8 bits too, by an option of their own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import jax
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import NamedSharding, PartitionSpec

from omni_jax.checkpoint.lora import find_linear_maps
from omni_jax.config import OmniConfig
from omni_jax.errors import InputError
from omni_jax.layers.quantized import Bits, QuantizedKernel, quantize_kernel

Quantization: TypeAlias = Literal["int8", "int4"]
CacheDtype: TypeAlias = Literal["int8"]
Path: TypeAlias = tuple[str, ...]
QUANTIZATIONS = ("int8", "int4")


@dataclass(frozen=True)
class NumberFormat:
    """What the numbers of Thinker and Talker are kept in.

    Attributes:
      dtype: "bfloat16" or "float32", of parameters and computation; what the checkpoint holds if None.
      quantization: "int8" or "int4", of the kernels of linear maps; None: as ``dtype``.
      kv_cache_dtype: "int8", of keys and values while decoding; None: as ``dtype``.

    Raises:
      InputError: for a quantisation that there is not.
    """

    dtype: str | None = None
    quantization: Quantization | None = None
    kv_cache_dtype: CacheDtype | None = None

    def __post_init__(self) -> None:
        if self.quantization not in (None, *QUANTIZATIONS):
            raise InputError(f"quantization is {self.quantization!r}; there are {' and '.join(QUANTIZATIONS)}")
        if self.kv_cache_dtype not in (None, "int8"):
            raise InputError(f"kv_cache_dtype is {self.kv_cache_dtype!r}; there is int8, and None for the model's own")


def choose_bits(component: str, path: Path, quantization: Quantization) -> Bits:
    """Of a linear map of Thinker or Talker, by its path."""
    is_decoder_layer = component == "thinker" and path[0] == "decoder" and "layers" in path
    return 4 if quantization == "int4" and is_decoder_layer else 8


def quantize_params(component: str, config: OmniConfig, params: Mapping[str, Any], quantization: Quantization) -> Any:
    """A component's parameters with the kernels of its linear maps quantised.

    Args:
      component: its name.
      config: of the whole model.
      params: arrays, or abstract ones, layers stacked. Where they lie over a mesh, what is made of them does too.
      quantization: which.
    """
    if component == "token2wav":
        return params
    linear_maps = count_inputs(config, component)
    return quantize_linear_maps(linear_maps, params, lambda path: choose_bits(component, path, quantization))


def count_inputs(config: OmniConfig, component: str) -> dict[Path, int]:
    """How many axes of its kernel are inputs, of each linear map of a component, by its path there."""
    found = {}
    for path, linear_map in find_linear_maps(config, [component]).items():
        found[tuple(path.split("/")[1:])] = linear_map.num_inputs
    return found


def quantize_linear_maps(
    linear_maps: Mapping[Path, int], params: Mapping[str, Any], choose: Callable[[Path], Bits | None]
) -> Any:
    """``params`` with kernels in as many bits as ``choose`` says of each path; None leaves one.

    Args:
      linear_maps: from ``count_inputs``.
      params: of the component; some kernels may be missing.
      choose: the bits of a linear map.
    """
    flat = flatten_dict(params)
    for path, num_inputs in linear_maps.items():
        bits = choose(path)
        name = (*path, "kernel")
        if bits is not None and name in flat:
            flat[name] = quantize_leaf(flat[name], num_inputs, bits, is_stacked="layers" in path)
    return unflatten_dict(flat)


def quantize_leaf(kernel: Any, num_inputs: int, bits: Bits, *, is_stacked: bool) -> Any:
    """A kernel in 8 or 4 bits; where it lies over a mesh, what is made of it does too.

    Args:
      kernel: an array or an abstract one, inputs + outputs, behind an axis of layers where ``is_stacked``.
      num_inputs: axes of a layer's kernel that are inputs.
      bits: see ``quantize_kernel``.
      is_stacked: whether it is of several layers.
    """

    def quantize(kernel: jax.Array) -> QuantizedKernel:
        if not is_stacked:
            return quantize_kernel(kernel, num_inputs, bits)
        # layer by layer, so that no more than one is held in float32
        return jax.lax.map(lambda layer: quantize_kernel(layer, num_inputs, bits), kernel)

    made = jax.eval_shape(quantize, kernel)
    sharding = getattr(kernel, "sharding", None)
    shardings = None
    if isinstance(sharding, NamedSharding):
        shardings = _place_quantized(made, sharding, num_inputs, is_stacked=is_stacked)
    if not isinstance(kernel, jax.ShapeDtypeStruct):
        return jax.jit(quantize, out_shardings=shardings)(kernel)
    if shardings is None:
        return made
    return jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), made, shardings)


def _place_quantized(made: QuantizedKernel, sharding: NamedSharding, num_inputs: int, *, is_stacked: bool) -> Any:
    """The values lie where the kernel's did; scales where the outputs, and groups of inputs, lie."""
    spec = [*sharding.spec, *[None] * (made.values.ndim - len(sharding.spec))]
    leading = spec[:1] if is_stacked else []
    inputs = spec[len(leading) : len(leading) + num_inputs]
    outputs = spec[len(leading) + num_inputs :]
    groups = made.scale.shape[len(leading)]
    axes = inputs[0]
    names = (axes,) if isinstance(axes, str) else tuple(axes or ())
    num_parts = 1
    for name in names:
        num_parts *= sharding.mesh.shape[name]
    # a single group, or groups that the mesh does not divide, lie in full on every device
    of_groups = axes if groups % num_parts == 0 and groups > 1 else None
    scale = PartitionSpec(*leading, of_groups, *outputs)
    return dataclasses.replace(made, values=sharding, scale=NamedSharding(sharding.mesh, scale))

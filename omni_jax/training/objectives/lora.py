"""An objective whose linear maps have low-rank adapters, which alone train (LoRA, https://arxiv.org/abs/2106.09685).

The kernels that have an adapter may be kept in 8 or 4 bits while it trains (QLoRA, https://arxiv.org/abs/2305.14314).
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from omni_jax.checkpoint.lora import (
    LORA,
    LORA_FILE,
    LinearMap,
    LoRAConfig,
    choose_modules,
    find_linear_maps,
)
from omni_jax.config import OmniConfig
from omni_jax.data.config import DataConfig
from omni_jax.data.packing_protocol import Packing
from omni_jax.errors import ConfigError
from omni_jax.generation.quantization import quantize_leaf
from omni_jax.layers.lora import attach_adapters
from omni_jax.layers.quantized import Bits
from omni_jax.processing.processor import Processor
from omni_jax.training.objective import Batch, Loss, Metrics, Objective, Params, Sample, SampleRequest
from omni_jax.training.recipe import LoRAOptions

_BITS: dict[str, Bits] = {"int8": 8, "int4": 4}
# the loss takes its kernel as a matrix, a piece of a row at a time
_UNADAPTED = "thinker/decoder/head"


# compared and hashed by identity, as the step that holds it
@dataclass(frozen=True, eq=False)
class LoRA(Objective):
    """Another objective, with adapters; see ``Objective`` for its methods.

    Attributes:
      inner: the objective.
      adapter: what adapters are like.
      linear_maps: that have one, by path.
      bits: of the kernels that have one; None: they keep their dtype.
    """

    inner: Objective
    adapter: LoRAConfig
    linear_maps: Mapping[str, LinearMap]
    bits: Bits | None = None

    @property
    def components(self) -> tuple[str, ...]:
        return (*self.inner.components, LORA)

    @property
    def dtype(self) -> Any:
        return self.inner.dtype

    def abstract_params(self) -> dict[str, Any]:
        params = self.inner.abstract_params()
        flat: dict[str, Any] = flatten_dict(params, sep="/")
        adapters = {}
        for module, linear_map in self.linear_maps.items():
            names = flat[f"{module}/kernel"].names
            split = len(linear_map.layers) + linear_map.num_inputs
            axes = {"a": (*names[:split], "rank"), "b": (*names[: len(linear_map.layers)], "rank", *names[split:])}
            for name, shape in linear_map.adapter_shapes(self.adapter.rank).items():
                leaf = jax.ShapeDtypeStruct(shape, jnp.float32)
                adapters[f"{module}/{name}"] = nn.LogicallyPartitioned(leaf, axes[name])  # type: ignore[arg-type]
        return {**params, LORA: unflatten_dict(adapters, sep="/")}

    def init_params(self, component: str, key: jax.Array) -> Any:
        if component != LORA:
            return self.inner.init_params(component, key)
        adapters = {}
        for module, linear_map in self.linear_maps.items():
            shapes = linear_map.adapter_shapes(self.adapter.rank)
            # by its name, so that the values do not depend on which others there are
            own_key = jax.random.fold_in(key, zlib.crc32(module.encode()))
            limit = 1 / math.sqrt(math.prod(linear_map.inputs))
            adapters[f"{module}/a"] = jax.random.uniform(own_key, shapes["a"], jnp.float32, -limit, limit)
            # so that the model begins as it is without adapters
            adapters[f"{module}/b"] = jnp.zeros(shapes["b"], jnp.float32)
        return unflatten_dict(adapters, sep="/")

    def convert_frozen(self, frozen: Params) -> Params:
        if self.bits is None:
            return self.inner.convert_frozen(frozen)
        flat: dict[str, Any] = flatten_dict(self.inner.convert_frozen(frozen), sep="/")
        for module, linear_map in self.linear_maps.items():
            path = f"{module}/kernel"
            is_stacked = bool(linear_map.layers)
            flat[path] = quantize_leaf(flat[path], linear_map.num_inputs, self.bits, is_stacked=is_stacked)
        return unflatten_dict(flat, sep="/")

    def extra_files(self) -> dict[str, str]:
        return {**self.inner.extra_files(), LORA_FILE: self.adapter.to_json()}

    def make_packing(self, data: DataConfig, processor: Processor, num_streams: int) -> Packing:
        return self.inner.make_packing(data, processor, num_streams)

    def abstract_row(self, data: DataConfig) -> Batch:
        return self.inner.abstract_row(data)

    def denominators(self, batch: Batch) -> Metrics:
        return self.inner.denominators(batch)

    def loss(
        self, params: Params, batch: Batch, denominators: Metrics, key: jax.Array, trained: Collection[str]
    ) -> Loss:
        return self.inner.loss(self._attach(params), batch, denominators, key, trained)

    def count_work(self, batch: Batch) -> Metrics:
        return self.inner.count_work(batch)

    def count_flops(self, sizes: Mapping[str, int], trained: Collection[str], counts: Mapping[str, float]) -> float:
        kernels = {f"{module}/kernel" for module in self.linear_maps}
        own_sizes = {path: size for path, size in sizes.items() if not path.startswith(f"{LORA}/")}
        # gradients pass where adapters train, but none is taken of a kernel
        total = self.inner.count_flops(own_sizes, kernels, counts)
        without_weights = self.inner.count_flops({}, (), counts)
        for module in self.linear_maps:
            path = f"{module}/kernel"
            forward = self.inner.count_flops({path: sizes[path]}, (), counts) - without_weights
            adapter_size = sizes[f"{LORA}/{module}/a"] + sizes[f"{LORA}/{module}/b"]
            # forward and both gradients of the adapter, and less the gradient of the kernel
            total += forward * (3 * adapter_size / sizes[path] - 1)
        return total

    def sample(self, params: Params, request: SampleRequest) -> list[Sample]:
        return self.inner.sample(self._attach(params), request)

    def estimate_activations(
        self, data: DataConfig, row_parts: int, sequence: int, tensor: int, trained: Collection[str]
    ) -> dict[str, int]:
        return self.inner.estimate_activations(data, row_parts, sequence, tensor, trained)

    def _attach(self, params: Params) -> dict[str, Any]:
        model = {name: tree for name, tree in params.items() if name != LORA}
        return attach_adapters(model, params[LORA], self.adapter.scale)


def add_lora(inner: Objective, config: OmniConfig, options: LoRAOptions) -> LoRA:
    """An objective with adapters as the options say.

    Args:
      inner: the objective without.
      config: of the whole model.
      options: with a rank.

    Raises:
      ConfigError: if no linear map of its components is among the targets, or one that can have no adapter.
    """
    linear_maps = find_linear_maps(config, inner.components)
    modules = choose_modules(linear_maps, options.targets)
    if _UNADAPTED in modules:
        raise ConfigError(
            f"lora.targets: {options.targets!r} matches {_UNADAPTED}, which can have no adapter; "
            "thinker/decoder/layers/.* are the language model's layers"
        )
    adapter = LoRAConfig(options.rank, options.alpha, modules)
    bits = None if options.base is None else _BITS[options.base]
    return LoRA(inner, adapter, {module: linear_maps[module] for module in modules}, bits)

"""Adapters (LoRA) of a loaded model, which the requests of a batch choose by name.

All adapters of a model lie in one ``LoRAKernel`` for each linear map, their ranks one after the other; factors of a row
are 1 for the ranks of its adapter and 0 for those of others.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Sharding
from jaxtyping import Float

from omni_jax.layers.lora import LoRAKernel

_MAX_KEPT = 64  # choices of rows whose parameters stay put together


@dataclass(frozen=True)
class AdapterTable:
    """The adapters of a model.

    Attributes:
      names: that requests choose by.
      ranks: of each.
    """

    names: tuple[str, ...] = ()
    ranks: tuple[int, ...] = ()

    def row_factors(self, rows: Sequence[str | None]) -> Float[np.ndarray, "B R"]:
        """Factors of all ranks for rows with these adapters; None: the model without any."""
        factors = np.zeros((len(rows), sum(self.ranks)), np.float32)
        ends = np.cumsum(self.ranks)
        for row, name in enumerate(rows):
            if name is not None:
                i = self.names.index(name)
                factors[row, ends[i] - self.ranks[i] : ends[i]] = 1
        return factors


class AdaptedParams:
    """A component's parameters, for rows with these or those adapters."""

    def __init__(self, params: Any, table: AdapterTable, placement: Sharding):
        """Moves nothing yet.

        Args:
          params: with a ``LoRAKernel`` where there is an adapter.
          table: of the adapters.
          placement: of small arrays from the host.
        """
        self._params = params
        self._table = table
        self._placement = placement
        self._kept: dict[tuple[str | None, ...], Any] = {}

    def select(self, rows: Sequence[str | None]) -> Any:
        """The parameters for rows with these adapters; one name counts for all rows."""
        key = tuple(rows)
        if key not in self._kept:
            if len(self._kept) == _MAX_KEPT:
                self._kept.clear()
            self._kept[key] = self._place(self._table.row_factors(rows))
        return self._kept[key]

    def _place(self, factors: Float[np.ndarray, "B R"]) -> Any:
        flat: dict[tuple[str, ...], Any] = flatten_dict(self._params)
        placed: dict[int, jax.Array] = {}  # by the number of layers of a stack; 0: of a single map
        for path, leaf in flat.items():
            if not isinstance(leaf, LoRAKernel):
                continue
            num_layers = len(leaf.a) if "layers" in path else 0
            if num_layers not in placed:
                # a scan takes a slice of each array along its layers; made on the host, so that nothing is compiled
                array = np.broadcast_to(factors, (num_layers, *factors.shape)) if num_layers else factors
                placed[num_layers] = jax.device_put(array, self._placement)
            flat[path] = dataclasses.replace(leaf, row_factors=placed[num_layers])
        return unflatten_dict(flat)

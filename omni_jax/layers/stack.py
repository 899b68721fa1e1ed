"""A stack of equal layers: scanned over parameters stacked on a leading axis, or one by one over parameters of each.

Scanning compiles one layer whatever the depth; it is the form of checkpoints and of TPUs. On a CPU the slice of a
layer's weights is a copy, which makes a decoding step wait for twice its memory traffic and more; there the layers are
unstacked and called one by one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeAlias

import flax.linen as nn
import jax
import jax.numpy as jnp

# what is kept of a layer for the backward pass: everything; nothing but its input; or the products with its weights
Remat: TypeAlias = Literal["none", "full", "dots"]
_POLICIES = {"full": None, "dots": jax.checkpoint_policies.checkpoint_dots_with_no_batch_dims}


def layer_stack(
    layer: type[nn.Module],
    fields: Mapping[str, Any],
    depth: int,
    scan: bool,
    shared: int,
    methods: Sequence[str] = ("__call__",),
    remat: Remat = "none",
) -> Any:
    """The layers of a tower, to be assigned in its ``setup`` as ``self.layers``.

    Each is called as ``layer(**fields)(carry, index, *shared) -> (carry, None)``, with ``shared`` further arguments;
    so are its other ``methods``, whose second result may be an array (``map_layers``). ``remat`` says what is kept of a
    layer that is differentiated.
    """
    # prevent_cse keeps XLA from merging the recomputed layer with the first one; across a scan it cannot
    if remat != "none":
        layer = nn.remat(layer, prevent_cse=not scan, policy=_POLICIES[remat], methods=list(methods))
    if not scan:
        return [layer(**fields) for _ in range(depth)]
    return nn.scan(
        layer,
        # parameters have a leading axis; its logical name is "layers"
        variable_axes={"params": 0},
        split_rngs={"params": True},
        # the layer's index comes along the scan; the shared arguments are the same for each layer
        in_axes=(0, *[nn.broadcast] * shared),  # type: ignore[arg-type]
        length=depth,
        metadata_params={nn.PARTITION_NAME: "layers"},
        methods=list(methods),
    )(**fields)


def call_layers(layers: Any, depth: int, carry: Any, *shared: Any) -> Any:
    """Passes ``carry`` through the layers; ``index`` is a traced scalar where they are scanned, else a Python int."""
    if isinstance(layers, nn.Module):
        # one module stands for all layers where they are scanned; else they are a list
        return layers(carry, jnp.arange(depth), *shared)[0]
    for i, layer in enumerate(layers):
        carry, _ = layer(carry, i, *shared)
    return carry


def map_layers(layers: Any, depth: int, method: str, *shared: Any) -> jax.Array:
    """The results of ``method`` of each layer for ``shared`` alone, stacked on a leading axis. [depth, ...]"""
    if isinstance(layers, nn.Module):
        return getattr(layers, method)((), jnp.arange(depth), *shared)[1]
    return jnp.stack([getattr(layer, method)((), i, *shared)[1] for i, layer in enumerate(layers)])


def unstack_layers(params: Mapping[str, Any]) -> dict[str, Any]:
    """Turns every ``layers`` of a tree into ``layers_0``, ``layers_1``, ..."""
    unstacked: dict[str, Any] = {}
    for name, value in params.items():
        if name == "layers":
            leaves, tree = jax.tree.flatten(value)
            # each array to a list of its slices, then one slice of each array to a layer
            for i, layer in enumerate(zip(*map(list, leaves), strict=True)):
                # Linen's own names for a list of modules that is assigned in ``setup``
                unstacked[f"layers_{i}"] = tree.unflatten(layer)
        elif isinstance(value, Mapping):
            unstacked[name] = unstack_layers(value)
        else:
            unstacked[name] = value
    return unstacked

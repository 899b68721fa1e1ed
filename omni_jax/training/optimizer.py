"""Which parameters train, at which rate, and how a gradient changes them."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.typing import ArrayLike
from jaxtyping import Float

from omni_jax.errors import ConfigError
from omni_jax.training.recipe import Optimizer, Phase

Tree = Mapping[str, Any]


def rates(phase: Phase, paths: Collection[str]) -> dict[str, float]:
    """The parameters that train, each with what its learning rate is multiplied with.

    Args:
      phase: its groups.
      paths: of all parameters, like ``decoder/norm/scale``.

    Raises:
      ConfigError: for a group that no parameter is in, and for an expression that is none.
    """
    found: dict[str, float] = {}
    for group in phase.train:
        try:
            members = [path for path in paths if re.fullmatch(group.paths, path)]
        except re.error as e:
            raise ConfigError(f"phase {phase.name}: {group.paths!r} is no regular expression: {e}") from e
        if not members:
            some = ", ".join(list(paths)[:3])
            raise ConfigError(
                f"phase {phase.name}: no parameter's whole path matches {group.paths!r}; paths: {some} ..."
            )
        found = dict.fromkeys(members, group.rate) | found
    return {path: found[path] for path in paths if path in found}


def flat(tree: Tree) -> dict[str, Any]:
    """The leaves of a tree by their paths, like ``decoder/norm/scale``."""
    return flatten_dict(tree, sep="/")


def split(params: Tree, names: Collection[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """A tree of those leaves whose paths are in ``names``, and a tree of the others."""
    leaves = flat(params)
    ours = {path: leaf for path, leaf in leaves.items() if path in names}
    others = {path: leaf for path, leaf in leaves.items() if path not in names}
    return unflatten_dict(ours, sep="/"), unflatten_dict(others, sep="/")


def merge(one: Tree, other: Tree) -> dict[str, Any]:
    """What ``split`` took apart."""
    return unflatten_dict(flat(one) | flat(other), sep="/")


def adam(config: Optimizer) -> optax.GradientTransformation:
    """The part of the optimizer that has a state: both moments, in float32."""
    return optax.scale_by_adam(b1=config.b1, b2=config.b2, eps=config.eps)


def learning_rate(config: Optimizer, count: ArrayLike, steps: int) -> Float[jax.Array, ""]:
    """The rate of the update that follows ``count`` others in a phase of so many steps."""
    warmup = min(config.warmup, max(steps - 1, 0))
    schedule = optax.warmup_cosine_decay_schedule(
        init_value=config.learning_rate / (warmup + 1),
        peak_value=config.learning_rate,
        warmup_steps=warmup,
        decay_steps=max(steps, warmup + 1),
        end_value=config.learning_rate * config.final_share,
    )
    return jnp.asarray(schedule(count), jnp.float32)


def update(
    config: Optimizer,
    grads: Tree,
    moments: Any,
    params: Tree,
    *,
    rates: Mapping[str, float],
    steps: int,
) -> tuple[Any, Any, dict[str, jax.Array]]:
    """One step of AdamW.

    Args:
      config: its numbers.
      grads: of the parameters that train.
      moments: the state of ``adam`` (``optax.ScaleByAdamState``).
      params: what trains.
      rates: of each of them, by path.
      steps: of the phase.

    Returns:
      The new parameters, the new moments, and the norm of the gradients and the learning rate by name.
    """
    norm = optax.tree.norm(grads)
    scale = jnp.minimum(1.0, config.clip / jnp.maximum(norm, 1e-12)) if config.clip else 1.0
    rate = learning_rate(config, moments.count, steps)
    scaled = jax.tree.map(lambda g: g * scale, grads)
    directions, changed_moments = adam(config).update(scaled, moments)

    def changed(path: tuple[Any, ...], param: jax.Array, direction: jax.Array) -> jax.Array:
        name = "/".join(key.key for key in path)
        decay = 0.0 if re.fullmatch(config.no_decay, name) else config.weight_decay
        return param - rate * rates[name] * (direction + decay * param)

    params = jax.tree_util.tree_map_with_path(changed, params, directions)
    return params, changed_moments, {"grad_norm": norm, "learning_rate": rate}

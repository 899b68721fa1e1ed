"""Which parameters train, at which learning rate, and the optimizer that changes them."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import optax
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.typing import ArrayLike
from jaxtyping import Float

from omni_jax.errors import ConfigError
from omni_jax.training.recipe import OptimizerConfig, Phase

Tree: TypeAlias = Mapping[str, Any]
# fields: ``count``, and trees of arrays with the paths of the parameters that train
Moments: TypeAlias = optax.ScaleByAdamState | optax.FactoredState
OptimizerState: TypeAlias = dict[str, Any]  # of each link of the chain, by name

MOMENTS = "moments"
SCHEDULE = "schedule"
# of Adafactor, as https://arxiv.org/abs/1804.04235 has them
_MIN_FACTORED = 128  # length of the second largest axis of a parameter from where its second moment is factored
_MAX_UPDATE = 1.0  # root mean square of a parameter's update before the learning rate


def learning_rate_scales(phase: Phase, paths: Collection[str]) -> dict[str, float]:
    """The parameters that train, each with the factor of its learning rate.

    Args:
      phase: its groups.
      paths: of all parameters, like ``decoder/norm/scale``.

    Raises:
      ConfigError: for a group that no parameter is in, and for an expression that is none.
    """
    scales: dict[str, float] = {}
    for group in phase.train:
        try:
            members = [path for path in paths if re.fullmatch(group.paths, path)]
        except re.error as e:
            raise ConfigError(f"phase {phase.name}: {group.paths!r} is no regular expression: {e}") from e
        if not members:
            examples = ", ".join(list(paths)[:3])
            raise ConfigError(
                f"phase {phase.name}: no parameter's whole path matches {group.paths!r}; paths: {examples} ..."
            )
        for path in members:
            scales.setdefault(path, group.learning_rate_scale)  # the first group counts
    # in the order of ``paths`` and not of the groups
    return {path: scales[path] for path in paths if path in scales}


def flatten_params(tree: Tree) -> dict[str, Any]:
    """The leaves of a tree by their paths, like ``decoder/norm/scale``."""
    return flatten_dict(tree, sep="/")


def split_params(params: Tree, paths: Collection[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """A tree of those leaves whose paths are in ``paths``, and a tree of the others."""
    selected = {}
    others = {}
    for path, leaf in flatten_params(params).items():
        if path in paths:
            selected[path] = leaf
        else:
            others[path] = leaf
    return unflatten_dict(selected, sep="/"), unflatten_dict(others, sep="/")


def merge_params(one: Tree, other: Tree) -> dict[str, Any]:
    """What ``split_params`` took apart."""
    return unflatten_dict(flatten_params(one) | flatten_params(other), sep="/")


def learning_rate(config: OptimizerConfig, count: ArrayLike, num_steps: int) -> Float[jax.Array, ""]:
    """The learning rate of the update that follows ``count`` others in a phase of ``num_steps``."""
    # a phase shorter than the warm-up ends with it
    warmup = min(config.warmup, max(num_steps - 1, 0))
    schedule = optax.warmup_cosine_decay_schedule(
        # not 0, with which the first update would change nothing
        init_value=config.learning_rate / (warmup + 1),
        peak_value=config.learning_rate,
        warmup_steps=warmup,
        # optax counts the warm-up in, and wants at least one step after it
        decay_steps=max(num_steps, warmup + 1),
        end_value=config.learning_rate * config.final_fraction,
    )
    return jnp.asarray(schedule(count), jnp.float32)


def make_optimizer(
    config: OptimizerConfig, scales: Mapping[str, float], num_steps: int
) -> optax.GradientTransformation:
    """AdamW (https://arxiv.org/abs/1711.05101) or Adafactor (https://arxiv.org/abs/1804.04235).

    Gradients are clipped by their global norm first. The second moment is float32. Adafactor has no first one, and of
    the second sums of rows and of columns.

    Args:
      config: its hyperparameters.
      scales: factor of the learning rate of each parameter that trains, by path.
      num_steps: of the phase.
    """

    def scale_by_group(updates: Any, params: Any) -> Any:
        # frozen parameters are in no tree that the optimizer sees, so every path has a factor
        return jax.tree_util.tree_map_with_path(lambda path, update: update * scales[_path_name(path)], updates)

    def decays(params: Any) -> Any:
        return jax.tree_util.tree_map_with_path(
            lambda path, _: re.fullmatch(config.no_decay, _path_name(path)) is None, params
        )

    if config.kind == "adafactor":
        scale = optax.scale_by_factored_rms(min_dim_size_to_factor=_MIN_FACTORED)
        clip_update = optax.clip_by_block_rms(_MAX_UPDATE)
    else:
        scale = optax.scale_by_adam(config.b1, config.b2, config.eps, mu_dtype=jnp.dtype(config.first_moment))
        clip_update = optax.identity()
    # Only the moments and the schedule have arrays in their states; ``with_moments`` relies on it. The order matters:
    # decay is added after the moments, so that it is not divided by the second one (AdamW). It is added before the
    # groups and the schedule, so that both scale it.
    return optax.named_chain(
        ("clip", optax.clip_by_global_norm(config.clip) if config.clip else optax.identity()),
        (MOMENTS, scale),
        ("clip_update", clip_update),
        ("decay", optax.add_decayed_weights(config.weight_decay, mask=decays)),
        ("groups", optax.stateless(scale_by_group)),
        (SCHEDULE, optax.scale_by_learning_rate(lambda count: learning_rate(config, count, num_steps))),
    )


def select_moments(moments: Moments, paths: Collection[str]) -> Moments:
    """Those of some of the parameters that train."""
    trees = {}
    for name, tree in moments._asdict().items():
        if name != "count":
            trees[name], _ = split_params(tree, paths)
    return moments._replace(**trees)


def merge_moments(parts: Sequence[Moments]) -> Moments:
    """Those of groups of parameters, each with as many updates, as those of all."""
    first = parts[0]
    trees: dict[str, Any] = {}
    for name in first._fields:
        if name == "count":
            continue
        trees[name] = {}
        for part in parts:
            trees[name] = merge_params(trees[name], getattr(part, name))
    return first._replace(**trees)


def with_moments(state: OptimizerState, moments: Moments, count: Any) -> OptimizerState:
    """An optimizer's state with these moments and ``count`` updates of the phase behind it; or the shapes of one."""
    # the moments' own count, for the correction of their bias, is a part of them
    changed = state.copy()
    changed[MOMENTS] = moments
    changed[SCHEDULE] = optax.ScaleByScheduleState(count=count)
    return changed


def _path_name(path: tuple[Any, ...]) -> str:
    return "/".join(key.key for key in path)

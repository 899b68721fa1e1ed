"""Rules that integrate the flow of Token2Wav: which velocities are evaluated, when, and how they add up.

A rule is a table of numbers: of each evaluation its time, and what of the slopes before it is added to the value; of
each step, what of all slopes is added at its end. Runge and Kutta's rules use the slopes of one step. Those of Adams
keep the slopes of the steps before, so that a step costs one evaluation.

The reference's rule and grid (``Qwen2_5OmniToken2WavDiTModel.sample``, ``RungeKutta4ODESolver``) are the default; no
published file holds them. A checkpoint whose DiT was distilled says in ``token2wav.json`` how it is to be integrated.

Letters: T steps, S stages of a step, K slopes that are kept.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from jaxtyping import Float, Int

from omni_jax.checkpoint.model_files import TOKEN2WAV_FILE
from omni_jax.checks import check_int, check_names, shown
from omni_jax.errors import CheckpointError, InputError
from omni_jax.plain_files import has_file, read_object

Method = Literal["rk4", "midpoint", "euler", "adams"]
MAX_STEPS = 1000
_ADAMS_ORDER = 3

# of Runge and Kutta's rules: the time of each stage within its step, its coefficients of the slopes before it, and the
# weights of their sum. rk4 is the 3/8 rule; the numbers are float32's, as the reference's are
_STAGES = {
    "rk4": (
        [0, 1 / 3, 2 / 3, 1],
        [[0, 0, 0, 0], [1 / 3, 0, 0, 0], [-1 / 3, 1, 0, 0], [1, -1, 1, 0]],
        [1 / 8, 3 / 8, 3 / 8, 1 / 8],
    ),
    "midpoint": ([0, 1 / 2], [[0, 0], [1 / 2, 0]], [0, 1]),
    "euler": ([0], [[0]], [1]),
}


@dataclass(frozen=True)
class SolverTable:
    """A rule over a grid.

    Attributes:
      sizes: of the steps.
      times: of each evaluation.
      coefficients: of each evaluation, what of the kept slopes is added to the value, in sizes of the step.
      slots: where each evaluation's slope is kept.
      weights: of each step, what of the kept slopes is added at its end, in sizes of the step.
    """

    sizes: Float[np.ndarray, " T"]
    times: Float[np.ndarray, "T S"]
    coefficients: Float[np.ndarray, "T S K"]
    slots: Int[np.ndarray, "T S"]
    weights: Float[np.ndarray, "T K"]


@dataclass(frozen=True)
class Solver:
    """How the flow is integrated.

    Attributes:
      method: "rk4" (four evaluations a step, fourth order), "midpoint" (two, second), "euler" (one, first) or "adams"
        (one, third order, from the slopes of the last three steps).
      steps: of the grid from noise to mel.
      guidance: whether each velocity is made of one with conditions and one without. False where the network was
        distilled so that it gives the result at once (``training.objectives.flow_distillation``).
    """

    method: Method = "rk4"
    steps: int = 9
    guidance: bool = True

    @classmethod
    def load(cls, folder: Path) -> Solver:
        """The one that the DiT of a checkpoint was trained for: the published, unless ``token2wav.json`` is there.

        Raises:
          CheckpointError: if that file does not describe a solver.
        """
        path = folder / TOKEN2WAV_FILE
        if not has_file(path):
            return cls()
        values = read_object(path)
        try:
            check_names(f"key of {path}", values, ["solver", "steps", "guidance"])
            if not isinstance(values.get("guidance"), bool):
                raise InputError(f"guidance is {shown(values.get('guidance'))}; it must be true or false")
            return cls(values.get("solver"), values.get("steps"), values["guidance"])  # type: ignore[arg-type]
        except InputError as e:
            raise CheckpointError(f"{path}: {e}") from e

    def to_json(self) -> str:
        """The text of ``token2wav.json``."""
        return json.dumps({"solver": self.method, "steps": self.steps, "guidance": self.guidance}, indent=2) + "\n"

    def override(self, options: Mapping[str, Any]) -> Solver:
        """With ``{"solver": "midpoint", "steps": 8}`` in place of its own; what is left out or None stays.

        Raises:
          InputError: for an unknown name, a value out of range, or guidance, which was decided by training.
        """
        if "guidance" in options:
            raise InputError(
                "guidance is no option of token2wav: whether the network needs it was decided when it was trained "
                f"({TOKEN2WAV_FILE} of the checkpoint)"
            )
        check_names("option of token2wav", options, ["solver", "steps"])
        changed = self
        if options.get("solver") is not None:
            changed = dataclasses.replace(changed, method=options["solver"])
        if options.get("steps") is not None:
            changed = dataclasses.replace(changed, steps=options["steps"])
        return changed

    def __post_init__(self) -> None:
        if self.method not in get_args(Method):
            raise InputError(f"solver is {shown(self.method)}; it must be one of {', '.join(get_args(Method))}")
        check_int("steps of the solver", self.steps, 1, MAX_STEPS)

    @property
    def num_evaluations(self) -> int:
        """Of the velocity, for each block."""
        return self.table.times.size

    @property
    def num_halves(self) -> int:
        """Evaluations of the network that a velocity takes."""
        return 2 if self.guidance else 1

    @property
    def table(self) -> SolverTable:
        """Over the grid of so many steps."""
        return make_table(self.method, self.steps)


@functools.cache
def make_table(method: Method, steps: int) -> SolverTable:
    """The table of a rule over ``sway_grid(steps)``."""
    return make_table_over(method, sway_grid(steps))


def make_table_over(method: Method, grid: Float[np.ndarray, " T+1"]) -> SolverTable:
    """The table of a rule over any rising times. float32"""
    steps = len(grid) - 1
    if method == "adams":
        return _make_adams_table(grid)
    stage_times, coefficients, weights = (np.array(numbers, np.float32) for numbers in _STAGES[method])
    num_stages = len(stage_times)
    return SolverTable(
        sizes=np.diff(grid),
        times=evaluation_times(grid, stage_times),
        coefficients=np.tile(coefficients, (steps, 1, 1)),
        slots=np.tile(np.arange(num_stages, dtype=np.int32), (steps, 1)),
        weights=np.tile(weights, (steps, 1)),
    )


def sway_grid(steps: int) -> Float[np.ndarray, " T+1"]:
    """Times from 0 to 1, close together at the beginning: 1 - cos(pi u / 2) of even ones. float32"""
    u = np.linspace(0, 1, steps + 1, dtype=np.float32)
    # in the reference's order of operations, so that the times are its times to the last bit
    return u - (np.cos(np.float32(np.pi / 2) * u) - 1 + u)


def evaluation_times(grid: Float[np.ndarray, " T+1"], stage_times: Float[np.ndarray, " S"]) -> Float[np.ndarray, "T S"]:
    """The times at which the velocity is evaluated. float32"""
    times = grid[:-1, None] + np.diff(grid)[:, None] * stage_times
    # exactly the grid's, and not a rounding beside it
    times[:, stage_times == 1] = grid[1:, None]
    return times.astype(np.float32)


def _make_adams_table(grid: Float[np.ndarray, " T+1"]) -> SolverTable:
    """Adams and Bashforth's rule for steps of any sizes: the integral of a polynomial through the last slopes."""
    steps = len(grid) - 1
    slots = np.arange(steps) % _ADAMS_ORDER
    weights = np.zeros((steps, _ADAMS_ORDER), np.float32)
    for step in range(steps):
        # the first steps have fewer slopes behind them
        known = range(max(0, step + 1 - _ADAMS_ORDER), step + 1)
        weights[step, slots[known]] = _extrapolation_weights(grid[known], grid[step], grid[step + 1])
    return SolverTable(
        sizes=np.diff(grid),
        times=grid[:-1, None],
        coefficients=np.zeros((steps, 1, _ADAMS_ORDER), np.float32),
        slots=slots[:, None].astype(np.int32),
        weights=weights,
    )


def _extrapolation_weights(times: np.ndarray, begin: float, end: float) -> np.ndarray:
    """What the value at each of ``times`` contributes to the mean, from begin to end, of the polynomial through all."""
    times = times.astype(np.float64)
    # exact for polynomials of twice the degree
    points, point_weights = np.polynomial.legendre.leggauss(len(times))
    points = begin + (end - begin) * (points + 1) / 2
    weights = []
    for time in times:
        others = times[times != time]
        # Lagrange's polynomial: 1 at this time, 0 at the others
        values = np.prod((points[:, None] - others) / (time - others), axis=1)
        weights.append(np.sum(point_weights / 2 * values))
    return np.array(weights)

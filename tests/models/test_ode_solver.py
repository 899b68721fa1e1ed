"""The rules that integrate the flow, on equations whose solutions are known."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from omni_jax.errors import CheckpointError, InputError
from omni_jax.models.flow_matching import integrate
from omni_jax.models.ode_solver import Method, Solver, SolverTable, make_table, sway_grid

ORDERS: dict[Method, int] = {"rk4": 4, "midpoint": 2, "euler": 1, "adams": 3}
PUBLISHED = Solver()


def integrate_growth(table: SolverTable) -> float:
    """dy/dt = y cos(3 t) from 1, at time 1."""
    end, _ = integrate(
        lambda value, time, carry: (value * jnp.cos(3 * time), carry), jnp.ones(1), table, jnp.asarray(table.times), ()
    )
    return float(end[0])


def test_the_published_grid() -> None:
    """The numbers of docs/reference.md, 8.8."""
    expected = [0, 0.015192, 0.060307, 0.133975, 0.233956, 0.357212, 0.5, 0.657980, 0.826352, 1]
    np.testing.assert_allclose(sway_grid(9), expected, atol=1e-6)
    times = PUBLISHED.table.times
    assert times.shape == (9, 4) and PUBLISHED.num_evaluations == 36
    np.testing.assert_array_equal(times[1:, 0], times[:-1, -1])


@pytest.mark.parametrize("power", [0, 1, 2, 3])
def test_the_published_solver_follows_a_cubic_exactly(power: int) -> None:
    def velocity(value: jax.Array, time: jax.Array, calls: int) -> tuple[jax.Array, int]:
        return jnp.ones_like(value) * (power + 1) * time**power, calls + 1

    end, calls = integrate(velocity, jnp.zeros(3), PUBLISHED.table, jnp.asarray(PUBLISHED.table.times), 0)
    assert calls == PUBLISHED.num_evaluations
    np.testing.assert_allclose(end, np.ones(3), rtol=1e-6)


def test_the_published_solver_uses_each_stage() -> None:
    """dy/dt = y over one step of size 1: the fourth-order polynomial, exact for any rule of this order."""
    table = make_table("rk4", 1)
    end, _ = integrate(lambda value, *_: (value, ()), jnp.ones(2), table, jnp.asarray(table.times), ())
    np.testing.assert_allclose(end, 1 + 1 + 1 / 2 + 1 / 6 + 1 / 24, rtol=1e-6)


@pytest.mark.parametrize("method", ORDERS)
def test_the_error_falls_by_the_order(method: Method) -> None:
    """Twice the steps, 2 to the power of the order less error."""
    exact = np.exp(np.sin(3) / 3)
    # few enough that the error is above the roundings of float32
    few = 4 if method == "rk4" else 16
    errors = [abs(integrate_growth(make_table(method, steps)) - exact) for steps in (few, 2 * few)]
    assert np.log2(errors[0] / errors[1]) == pytest.approx(ORDERS[method], abs=0.6)


def test_adams_extrapolates_a_parabola_exactly() -> None:
    """From the third step on; before it there are fewer slopes."""
    table = make_table("adams", 6)
    times = table.times[:, 0]
    for step in range(2, 6):
        kept = np.array([3 * times[step - (step - slot) % 3] ** 2 for slot in range(3)])
        end = table.sizes[step] * np.sum(table.weights[step] * kept)
        assert end == pytest.approx((times[step] + table.sizes[step]) ** 3 - times[step] ** 3, rel=1e-4)
    assert table.weights[0].tolist() == [1, 0, 0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"solver": "heun"}, "solver is 'heun'; it must be one of rk4, midpoint, euler, adams"),
        ({"steps": 0}, "steps of the solver is 0; it must be from 1 to 1000"),
        ({"steps": 2.5}, "steps of the solver"),
        ({"stepz": 3}, "stepz"),
        ({"guidance": False}, r"guidance is no option of token2wav: .* was decided when it was trained"),
    ],
)
def test_other_solvers_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Solver().override(options)


def test_what_is_left_out_is_published() -> None:
    assert Solver().override({}) == Solver("rk4", 9)
    assert Solver().override({"solver": "euler"}) == Solver("euler", 9)
    distilled = Solver("euler", 4, guidance=False)
    assert distilled.override({"solver": None, "steps": 8}) == Solver("euler", 8, guidance=False)


def test_a_checkpoint_says_how_it_is_to_be_integrated(tmp_path: Path) -> None:
    assert Solver.load(tmp_path) == PUBLISHED
    distilled = Solver("midpoint", 3, guidance=False)
    (tmp_path / "token2wav.json").write_text(distilled.to_json())
    assert Solver.load(tmp_path) == distilled


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"solver": "euler", "steps": 4}', "guidance is None; it must be true or false"),
        ('{"solver": "euler", "steps": 4, "guidance": 0}', "guidance is 0"),
        ('{"solver": "heun", "steps": 4, "guidance": false}', "solver is 'heun'; it must be one of"),
        ('{"solver": "euler", "guidance": false}', "steps of the solver is None"),
        ('{"solver": "euler", "steps": 4, "guidance": false, "grid": 1}', "grid"),
        ("[]", "token2wav.json"),
    ],
)
def test_a_description_that_is_none(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "token2wav.json").write_text(text)
    with pytest.raises(CheckpointError, match=message):
        Solver.load(tmp_path)

"""What Token2Wav promises beside its numbers: names, precision, cost, and what padding may not do."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from operator import attrgetter
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from jax.extend.core import jaxprs_in_params

from omni_jax.checkpoint.name_map import make_name_table
from omni_jax.config import OmniConfig
from omni_jax.models import bigvgan
from omni_jax.models.dit import Blocks, Conditions, Modulations, block_attention, pack
from omni_jax.models.flow_matching import EVALUATIONS, POINTS, evaluation_times, integrate, sway_grid
from omni_jax.models.token2wav import Token2Wav, abstract_params
from omni_jax.sharding import RULES

SIZES = {"tiny": OmniConfig.tiny(), "3B": OmniConfig.qwen2_5_omni_3b(), "7B": OmniConfig.qwen2_5_omni_7b()}


@pytest.mark.parametrize("size", SIZES)
def test_parameters_are_the_table(size: str) -> None:
    boxed = abstract_params(Token2Wav(SIZES[size].token2wav_config))
    ours = {path: leaf.shape for path, leaf in flatten_dict(nn.unbox(boxed)).items()}
    assert ours == {entry.path[1:]: entry.leaf_shape for entry in make_name_table(SIZES[size], ["token2wav"])}
    for leaf in flatten_dict(boxed).values():
        assert len(leaf.names) == leaf.value.ndim
        assert set(leaf.names) <= set(RULES)


def _shapes(config: OmniConfig, blocks: int) -> tuple[Token2Wav, Any, tuple[Any, ...]]:
    """The model, its abstract parameters and the arguments of one evaluation over so many blocks."""
    model, c = Token2Wav(config.token2wav_config), config.token2wav_config.dit_config

    def array(*shape: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype)

    width, frames = c.hidden_size, c.block_size
    conditions = Conditions(array(blocks, frames, width), array(blocks, 1, width))
    modulations = Modulations(array(c.num_hidden_layers, 6, width), array(2, width))
    numbers = array(blocks, dtype=jnp.int32)
    listed = Blocks(numbers, array(blocks, frames, dtype=bool), numbers, numbers)
    arguments = (array(blocks, frames, c.mel_dim), conditions, modulations, listed)
    return model, nn.unbox(abstract_params(model)), arguments


def _method(model: Token2Wav, name: str) -> Any:
    """A method of one of the two networks as a function of parameters and arguments."""
    return lambda params, *a: model.apply({"params": params}, *a, method=lambda m, *a: attrgetter(name)(m)(*a))


def _equations(jaxpr: Any) -> Iterator[Any]:
    for equation in jaxpr.eqns:
        yield equation
        for inner in jaxprs_in_params(equation.params):
            yield from _equations(inner)


def test_products_are_computed_in_float32() -> None:
    """Also where nobody asked for it: a TPU's default would be bfloat16 passes."""
    model, params, arguments = _shapes(SIZES["tiny"], 2)
    zeros = jnp.zeros
    clip, cond = zeros((1, 30, 80)), zeros((2, 12))
    # a method, its arguments, and how many products there must be for the search to have gone into its loops
    calls = {
        "dit.velocity": (arguments, 12),
        "dit.speakers": ((clip,), 19),
        "dit.modulations": ((zeros(4),), 4),
        "dit.conditions": ((zeros((2, 24), int), zeros((2, 2, 8)), cond), 2),
        "bigvgan.__call__": ((clip, zeros(1, int)), 6 * 18 + 8),
    }
    with jax.default_matmul_precision("bfloat16"):
        for name, (inputs, least) in calls.items():
            jaxpr = jax.make_jaxpr(_method(model, name))(params, *inputs).jaxpr
            products = [e for e in _equations(jaxpr) if e.primitive.name in ("dot_general", "conv_general_dilated")]
            found = [equation.params["precision"] for equation in products]
            assert len(found) >= least and all(p == (jax.lax.Precision.HIGHEST,) * 2 for p in found)


def test_cost_is_linear_in_length() -> None:
    """At the published size, eight times the blocks make the largest array of an evaluation eight times larger."""
    work = []
    for blocks in (16, 128):
        model, params, arguments = _shapes(SIZES["7B"], blocks)
        jaxpr = jax.make_jaxpr(_method(model, "dit.velocity"))(params, *arguments).jaxpr
        frames = blocks * 24
        for equation in _equations(jaxpr):
            for out in equation.outvars:
                assert sorted(out.aval.shape)[-2:] != [frames, frames]
        largest = max(out.aval.size for e in _equations(jaxpr) for out in e.outvars if out.aval.shape[:1] != (22,))
        work.append(largest)
    assert work[1] == 8 * work[0]


def test_a_request_sees_nothing_of_its_neighbours_or_of_padding() -> None:
    rng = np.random.default_rng(0)
    blocks, parts = pack([50, 7, 24], 24, 7)
    assert [p.stop - p.start for p in parts] == [3, 1, 1]
    assert blocks.index.tolist() == [0, 1, 2, 0, 0, 0, 0]
    assert blocks.valid.sum(axis=1).tolist() == [24, 24, 2, 7, 24, 0, 0]
    q, k, v = rng.standard_normal((3, 7, 24, 2, 4)).astype(np.float32)
    hidden = ~blocks.valid[..., None, None]
    for behind in (False, True):
        for ahead in (False, True):
            out = block_attention(q, k, v, blocks, behind=behind, ahead=ahead)
            other = [np.where(hidden, np.float32(1e3), a) for a in (k, v)]
            np.testing.assert_array_equal(
                np.asarray(out)[blocks.valid],
                np.asarray(block_attention(q, *other, blocks, behind=behind, ahead=ahead))[blocks.valid],
            )
            for part, length in zip(parts, (50, 7, 24), strict=True):
                alone, _ = pack([length], 24, part.stop - part.start)
                single = block_attention(q[part], k[part], v[part], alone, behind=behind, ahead=ahead)
                np.testing.assert_allclose(
                    np.asarray(single)[alone.valid], np.asarray(out)[part][alone.valid], rtol=1e-6, atol=1e-6
                )


def test_sway_grid() -> None:
    """Section 8.8's numbers."""
    expected = [0, 0.015192, 0.060307, 0.133975, 0.233956, 0.357212, 0.5, 0.657980, 0.826352, 1]
    np.testing.assert_allclose(sway_grid(), expected, atol=1e-6)
    times = evaluation_times(sway_grid())
    assert times.shape == (POINTS - 1, 4)
    np.testing.assert_array_equal(times[1:, 0], times[:-1, -1])


@pytest.mark.parametrize("power", [0, 1, 2, 3])
def test_the_solver_is_of_fourth_order(power: int) -> None:
    """A cubic in time is followed exactly."""
    grid = sway_grid()
    moments = jnp.asarray(evaluation_times(grid))

    def velocity(value: jax.Array, time: jax.Array, calls: int) -> tuple[jax.Array, int]:
        return jnp.ones_like(value) * (power + 1) * time**power, calls + 1

    end, calls = integrate(velocity, jnp.zeros(3), grid, moments, 0)
    assert calls == EVALUATIONS
    np.testing.assert_allclose(end, np.ones(3), rtol=1e-6)


def test_the_solver_uses_each_stage() -> None:
    """dy/dt = y over one step of size h: the fourth-order polynomial, exact for any rule of this order."""
    grid = np.array([0, 0.5], np.float32)
    end, _ = integrate(lambda value, *_: (value, ()), jnp.ones(2), grid, jnp.zeros((1, 4)), ())
    np.testing.assert_allclose(end, 1 + 0.5 + 0.5**2 / 2 + 0.5**3 / 6 + 0.5**4 / 24, rtol=1e-6)


def test_low_pass_filter() -> None:
    """Section 8.9's numbers."""
    half = [0.00202896, 0.00938947, -0.02554346, -0.05765738, 0.12857258, 0.44320980]
    np.testing.assert_allclose(bigvgan.low_pass(), half + half[::-1], atol=1e-7)


def test_sine_squared() -> None:
    x = np.concatenate([np.linspace(-10, 10, 10_001), np.linspace(-1e4, 1e4, 10_001)]).astype(np.float32)
    # what an argument's own rounding does to the result, plus one of the result
    allowed = np.spacing(np.abs(x)) + 3e-7
    assert (np.abs(bigvgan.sine_squared(x) - np.sin(x.astype(np.float64)) ** 2) < allowed).all()


def test_vocoder_rows_are_independent_of_padding() -> None:
    """Rows of several lengths, and several in a row, equal themselves alone but for the order of sums; no NaN leaks."""
    config = dataclasses.replace(SIZES["tiny"].token2wav_config.bigvgan_config, upsample_rates=(5, 3, 2))
    config = dataclasses.replace(config, upsample_kernel_sizes=(11, 7, 4))
    model, rng = bigvgan.BigVGAN(config), np.random.default_rng(0)
    lengths = np.array([1, 9, 12], np.int32)
    mel = rng.standard_normal((3, 12, 80)).astype(np.float32)
    abstract = nn.unbox(jax.eval_shape(model.init, jax.random.key(0), mel, lengths)["params"])
    params = jax.tree.map(lambda a: rng.standard_normal(a.shape).astype(np.float32) / a.size**0.5, abstract)
    mel[np.arange(12)[None] >= lengths[:, None]] = np.nan
    vocode = jax.jit(lambda *inputs: model.apply({"params": params}, *inputs))
    together = np.asarray(vocode(mel, lengths))
    for row, n in enumerate(lengths[:2]):
        alone = np.asarray(vocode(mel[row : row + 1, :n], lengths[row : row + 1]))[0]
        assert np.abs(alone).max() > 0
        np.testing.assert_allclose(together[row, : 30 * n], alone, rtol=1e-5, atol=1e-5 * np.abs(alone).max())
        assert not together[row, 30 * n :].any()
    assert np.isfinite(together).all()
    apart = bigvgan.gap(config)
    assert apart == 5  # 25 samples on either side of the widest convolution, at 5 samples a frame
    begins = np.array([[0, 1 + apart, 10 + 2 * apart, bigvgan.NOWHERE]])
    row = np.full((1, 40, 80), np.nan, np.float32)
    for begin, n, one in zip(begins[0], lengths, mel, strict=False):
        row[0, begin : begin + n] = one[:n]
    in_a_row = np.array(vocode(row, np.array([[*lengths, 0]]), begins))[0]
    for begin, n, alone in zip(30 * begins[0], 30 * lengths, together, strict=False):
        np.testing.assert_allclose(in_a_row[begin : begin + n], alone[:n], rtol=1e-5, atol=1e-5 * np.abs(alone).max())
        in_a_row[begin : begin + n] = 0
    assert not in_a_row.any()

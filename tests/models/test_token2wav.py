"""What Token2Wav promises beside its numbers: names, precision, cost, and what padding may not do."""

from __future__ import annotations

import functools
import itertools
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
from omni_jax.config import BigVGANConfig, OmniConfig
from omni_jax.models import bigvgan, snake_beta
from omni_jax.models.dit import Conditions, Modulations
from omni_jax.models.dit_blocks import Blocks, block_attention, pack
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
    model = Token2Wav(config.token2wav_config)
    c = config.token2wav_config.dit_config

    def array(*shape: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype)

    conditions = Conditions(array(blocks, c.block_size, c.hidden_size), array(blocks, 1, c.hidden_size))
    modulations = Modulations(array(c.num_hidden_layers, 6, c.hidden_size), array(2, c.hidden_size))
    places = array(blocks, dtype=jnp.int32)
    listed = Blocks(places, array(blocks, c.block_size, dtype=bool), places, places)
    arguments = (array(blocks, c.block_size, c.mel_dim), conditions, modulations, listed)
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
    clip = zeros((1, 30, 80))
    cond = zeros((2, 12))
    # a method, its arguments, and how many products there must be for the search to have gone into its loops
    calls = {
        "dit.velocity": (arguments, 12),
        "dit.speakers": ((clip, zeros(1, int)), 19),
        "dit.modulations": ((zeros(4),), 4),
        "dit.conditions": ((zeros((2, 24), int), zeros((2, 2, 8)), cond), 2),
        "bigvgan.__call__": ((clip, zeros(1, int)), 1 + 2 * 2),  # each stage loops over one product of each kind
    }
    with jax.default_matmul_precision("bfloat16"):
        for name, (inputs, least) in calls.items():
            jaxpr = jax.make_jaxpr(_method(model, name))(params, *inputs).jaxpr
            products = [e for e in _equations(jaxpr) if e.primitive.name in ("dot_general", "conv_general_dilated")]
            precisions = {equation.params["precision"] for equation in products}
            assert len(products) >= least, name
            assert precisions == {(jax.lax.Precision.HIGHEST,) * 2}, name


def test_cost_is_linear_in_length() -> None:
    """At the published size, eight times the blocks make the largest array of an evaluation eight times larger."""
    largest = []
    for blocks in (16, 128):
        model, params, arguments = _shapes(SIZES["7B"], blocks)
        jaxpr = jax.make_jaxpr(_method(model, "dit.velocity"))(params, *arguments).jaxpr
        frames = blocks * 24
        for equation in _equations(jaxpr):
            for out in equation.outvars:
                assert sorted(out.aval.shape)[-2:] != [frames, frames]
        outputs = [out.aval for equation in _equations(jaxpr) for out in equation.outvars]
        largest.append(max(aval.size for aval in outputs if aval.shape[:1] != (22,)))  # but the layers' weights
    assert largest[1] == 8 * largest[0]


def test_a_request_sees_nothing_of_its_neighbours_or_of_padding() -> None:
    rng = np.random.default_rng(0)
    blocks, parts = pack([50, 7, 24], 24, 7)
    assert [p.stop - p.start for p in parts] == [3, 1, 1]
    assert blocks.index.tolist() == [0, 1, 2, 0, 0, 0, 0]
    assert blocks.valid.sum(axis=1).tolist() == [24, 24, 2, 7, 24, 0, 0]
    q, k, v = rng.standard_normal((3, 7, 24, 2, 4)).astype(np.float32)
    padding = ~blocks.valid[..., None, None]
    other_k, other_v = (np.where(padding, np.float32(1e3), a) for a in (k, v))
    for behind, ahead in itertools.product((False, True), repeat=2):
        attend = functools.partial(block_attention, behind=behind, ahead=ahead)
        out = np.asarray(attend(q, k, v, blocks))
        with_other_padding = np.asarray(attend(q, other_k, other_v, blocks))
        np.testing.assert_array_equal(out[blocks.valid], with_other_padding[blocks.valid])
        for part, length in zip(parts, (50, 7, 24), strict=True):
            alone, _ = pack([length], 24, part.stop - part.start)
            single = np.asarray(attend(q[part], k[part], v[part], alone))
            np.testing.assert_allclose(single[alone.valid], out[part][alone.valid], rtol=1e-6, atol=1e-6)


def test_low_pass_filter() -> None:
    """The numbers of docs/reference.md, 8.9."""
    half = [0.00202896, 0.00938947, -0.02554346, -0.05765738, 0.12857258, 0.44320980]
    np.testing.assert_allclose(snake_beta.low_pass(), half + half[::-1], atol=1e-7)


def test_sine_squared() -> None:
    x = np.concatenate([np.linspace(-10, 10, 10_001), np.linspace(-1e4, 1e4, 10_001)]).astype(np.float32)
    # what an argument's own rounding does to the result, plus one of the result
    allowed = np.spacing(np.abs(x)) + 3e-7
    assert (np.abs(snake_beta.sine_squared(x) - np.sin(x.astype(np.float64)) ** 2) < allowed).all()


def _two_stages(single_convs: bool = False) -> Any:
    """A vocoder of two stages with random parameters, jitted."""
    config = BigVGANConfig(upsample_initial_channel=64, upsample_rates=(5, 3), upsample_kernel_sizes=(11, 7))
    model = bigvgan.BigVGAN(config, single_convs=single_convs)
    rng = np.random.default_rng(0)
    abstract = jax.eval_shape(model.init, jax.random.key(0), np.zeros((1, 9, 80)), np.array([9]))["params"]
    params = jax.tree.map(lambda a: rng.standard_normal(a.shape).astype(np.float32) / a.size**0.5, nn.unbox(abstract))
    return jax.jit(lambda *inputs: model.apply({"params": params}, *inputs))


def test_both_forms_of_the_vocoder_agree() -> None:
    """Loops over taps, and single convolutions as on a CPU."""
    mel = np.random.default_rng(1).standard_normal((2, 4, 80)).astype(np.float32)
    by_taps, single = (np.asarray(_two_stages(form)(mel, np.array([4, 3]))) for form in (False, True))
    assert np.abs(by_taps).max() > 0
    np.testing.assert_allclose(single, by_taps, atol=1e-5 * np.abs(by_taps).max())


def test_vocoder_rows_are_independent_of_padding() -> None:
    """Rows of several lengths equal themselves alone but for the order of sums; no NaN leaks."""
    vocode = _two_stages()
    samples = 15  # of a frame
    lengths = np.array([1, 9, 12], np.int32)
    mel = np.random.default_rng(1).standard_normal((3, 12, 80)).astype(np.float32)
    mel[np.arange(12)[None] >= lengths[:, None]] = np.nan

    def assert_close(ours: np.ndarray, expected: np.ndarray) -> None:
        np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())

    together = np.asarray(vocode(mel, lengths))
    assert np.isfinite(together).all()
    for row, length in enumerate(lengths[:2]):
        alone = np.asarray(vocode(mel[row : row + 1, :length], lengths[row : row + 1]))[0]
        assert np.abs(alone).max() > 0
        assert_close(together[row, : samples * length], alone)
        assert not together[row, samples * length :].any()

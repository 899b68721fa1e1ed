"""The flow by blocks: the contract, a plainly written solve, and the offline solve."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from omni_jax.checkpoint import store
from omni_jax.config import DiTConfig, OmniConfig
from omni_jax.layers.stack import unstack_layers
from omni_jax.layers.streaming import Block
from omni_jax.models.dit import DiT
from omni_jax.models.dit_blocks import pack
from omni_jax.models.dit_streaming import CarriedDiT, NoisyCodes, Speaker
from omni_jax.models.flow_matching import solve
from omni_jax.models.ode_solver import Solver
from tests.plain_flow import cut, plainly_carried
from tests.streaming import Case, check_contract

# the same sums, cut into pieces by the shape of the list, 36 times over
TOLERANCE = 1e-4

CONFIG = OmniConfig.tiny().token2wav_config.dit_config
DISTILLED = Solver("euler", 4, guidance=False)
LENGTHS = (38, 1, 13)  # codes: four blocks, the last of them partial; less than a block; two blocks


@pytest.fixture(scope="module")
def params(tiny_model: Path) -> Any:
    return store.load(tiny_model, ["token2wav"])["token2wav"]["dit"]


def random_request(config: DiTConfig, lengths: tuple[int, ...], seed: int = 0) -> Block:
    """Rows of so many random codes and as much noise, each in a voice of its own."""
    rng = np.random.default_rng(seed)
    batch = len(lengths)
    units = max(lengths)
    codes = rng.integers(0, config.num_embeds - 1, (batch, units))
    noise = rng.standard_normal((batch, units, config.repeats, config.mel_dim), np.float32)
    speakers = rng.standard_normal((batch, 2, config.enc_dim), np.float32)
    cond = rng.standard_normal((batch, config.enc_emb_dim), np.float32)
    valid = np.arange(units) < np.array(lengths)[:, None]
    return Block(NoisyCodes(codes, noise), valid, Speaker(speakers, cond))


def take_row(x: Block, row: int) -> tuple[np.ndarray, np.ndarray, tuple[np.ndarray, np.ndarray]]:
    """The frames' codes and noise of a row up to its end, and its voice."""
    length = int(np.asarray(x.valid[row]).sum())
    noise = x.values.noise[row, :length]
    frames = np.repeat(x.values.codes[row, :length], noise.shape[1])
    return frames, noise.reshape(len(frames), -1), (x.row.rows[row], x.row.cond[row])


def assert_close(ours: np.ndarray, expected: np.ndarray) -> None:
    np.testing.assert_allclose(ours, expected, rtol=0, atol=TOLERANCE * np.abs(expected).max())


@pytest.mark.parametrize("solver", [Solver(), DISTILLED], ids=["published", "distilled"])
def test_contract(params: Any, solver: Solver) -> None:
    check_contract(Case(CarriedDiT(DiT(CONFIG), solver), params, random_request(CONFIG, LENGTHS), TOLERANCE))


def test_declared_numbers() -> None:
    streaming = CarriedDiT(DiT(DiTConfig())).streaming
    assert streaming.latency == pytest.approx(0.48)
    assert streaming.receptive_field is None


@pytest.mark.parametrize("solver", [Solver(), DISTILLED], ids=["published", "distilled"])
def test_against_a_plain_solve(params: Any, solver: Solver) -> None:
    x = random_request(CONFIG, LENGTHS, seed=1)
    dit = DiT(CONFIG)
    mel = np.asarray(jax.jit(CarriedDiT(dit, solver).apply_sequence)(params, x).values)
    for row, length in enumerate(LENGTHS):
        assert_close(mel[row, : 2 * length], plainly_carried(dit, params, *take_row(x, row), solver))


def test_single_layers(params: Any) -> None:
    """As on a CPU; and with other layers that look back and ahead."""
    config = dataclasses.replace(CONFIG, look_backward_layers=(2,), look_ahead_layers=(0, 2))
    x = random_request(config, (30, 17))
    scanned = jax.jit(CarriedDiT(DiT(config)).apply_sequence)(params, x)
    single = jax.jit(CarriedDiT(DiT(config, scan_layers=False)).apply_sequence)(unstack_layers(params), x)
    valid = np.asarray(scanned.valid)
    assert (valid == np.asarray(single.valid)).all() and valid.sum() == 2 * 47
    assert_close(np.asarray(single.values)[valid], np.asarray(scanned.values)[valid])


@pytest.mark.parametrize("solver", [Solver(), DISTILLED], ids=["published", "distilled"])
def test_two_blocks_are_the_offline_ones(params: Any, solver: Solver) -> None:
    """Up to there every frame sees all of the request."""
    lengths = (1, 12, 13, 24)
    x = random_request(CONFIG, lengths)
    dit = DiT(CONFIG)
    mel = np.asarray(jax.jit(CarriedDiT(dit, solver).apply_sequence)(params, x).values)

    @jax.jit
    def solve_offline(params: Any, codes: Any, noise: Any, voices: Any, blocks: Any) -> Any:
        conditions: Any = dit.apply({"params": params}, codes, *voices, solver.guidance, method="conditions")
        return solve(dit, params, noise, conditions, blocks, solver=solver)[0]

    for row in range(len(lengths)):
        codes, noise, speaker = take_row(x, row)
        blocks, _ = pack([len(codes)], 24, 2)
        voices = [np.repeat(a[None], 2, axis=0) for a in speaker]
        expected = solve_offline(params, cut(codes, 2, 24), cut(noise, 2, 24), voices, blocks)
        expected = np.asarray(expected).reshape(-1, CONFIG.mel_dim)[: len(codes)]
        assert_close(mel[row, : len(codes)], expected)


def test_the_first_step_leaves_out_what_is_not_there(params: Any) -> None:
    """From the beginning both kinds of step give the same mel and the same state, bit for bit."""
    part = CarriedDiT(DiT(CONFIG))
    x = random_request(CONFIG, (36, 20, 5))
    active = np.array([True, True, False])
    usual, usual_state = jax.jit(part.step)(params, part.init_state(3), x, active)
    first, first_state = jax.jit(part.first_step)(params, part.init_state(3), x, active)
    assert not np.asarray(usual.valid)[:, : CONFIG.block_size].any()
    np.testing.assert_array_equal(first.valid, np.asarray(usual.valid)[:, CONFIG.block_size :])
    np.testing.assert_array_equal(first.values, np.asarray(usual.values)[:, CONFIG.block_size :])
    assert np.asarray(first.valid).sum() == 48 + 40
    for ours, expected in zip(jax.tree.leaves(first_state), jax.tree.leaves(usual_state), strict=True):
        np.testing.assert_array_equal(ours, expected)


def test_a_step_keeps_one_state(params: Any) -> None:
    """The keys and values of all evaluations are written in place: no second set of them is made."""
    part = CarriedDiT(DiT(CONFIG))
    state = part.init_state(2)
    cache_bytes = sum(a.nbytes for a in jax.tree.leaves(state.cache))
    assert state.cache.keys.shape == (2, 36, 2, 2, 24, 2, 16)
    # a ninth of the evaluations, and half of each
    assert CarriedDiT(part.dit, DISTILLED).init_state(2).cache.keys.shape == (2, 4, 2, 1, 24, 2, 16)
    block = random_request(CONFIG, (12, 12))
    step = jax.jit(part.step, donate_argnums=1).lower(params, state, block, np.ones(2, bool)).compile()
    analysis = step.memory_analysis()
    assert analysis.alias_size_in_bytes >= cache_bytes
    assert analysis.temp_size_in_bytes < cache_bytes

"""The flow by blocks: the contract, and both ways against plainly written solves."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from omni_jax.checkpoint import store
from omni_jax.config import DiTConfig, OmniConfig
from omni_jax.layers.stack import unstack_layers
from omni_jax.layers.streaming import Block
from omni_jax.models.dit import DiT, pack
from omni_jax.models.dit_streaming import CarriedDiT, NoisyCodes, Speaker, WindowedDiT
from omni_jax.models.flow_matching import EVALUATIONS, solve
from tests.plain_flow import cut, plainly_carried, plainly_windowed
from tests.streaming import Case, check_contract

# the same sums, cut into pieces by the shape of the list, 36 times over
TOLERANCE = 1e-4

CONFIG = OmniConfig.tiny().token2wav_config.dit_config
LENGTHS = (62, 1, 36, 13)  # codes
PARTS = {"windowed": WindowedDiT, "carried": CarriedDiT}


@pytest.fixture(scope="module")
def params(tiny_model: Path) -> Any:
    return store.load(tiny_model, ["token2wav"])["token2wav"]["dit"]


def request(config: DiTConfig, lengths: tuple[int, ...], seed: int = 0) -> Block:
    """Rows of so many random codes and as much noise, each in a voice of its own."""
    rng = np.random.default_rng(seed)
    batch, units = len(lengths), max(lengths)
    codes = rng.integers(0, config.num_embeds - 1, (batch, units))
    noise = rng.standard_normal((batch, units, config.repeats, config.mel_dim), np.float32)
    rows, cond = (
        rng.standard_normal((batch, *shape), np.float32) for shape in ((2, config.enc_dim), (config.enc_emb_dim,))
    )
    return Block(NoisyCodes(codes, noise), np.arange(units) < np.array(lengths)[:, None], Speaker(rows, cond))


@pytest.mark.parametrize("mode", PARTS)
def test_contract(params: Any, mode: str) -> None:
    part = PARTS[mode](DiT(CONFIG))
    check_contract(Case(part, params, request(CONFIG, LENGTHS), TOLERANCE))


def test_declared_numbers() -> None:
    windowed, carried = (part(DiT(DiTConfig())).streaming for part in PARTS.values())
    assert windowed.latency == carried.latency == pytest.approx(0.48)
    assert windowed.receptive_field == 48 and carried.receptive_field is None


def row_of(x: Block, row: int) -> tuple[np.ndarray, np.ndarray, tuple[np.ndarray, np.ndarray]]:
    """The frames' codes and noise of a row up to its end, and its voice."""
    n = int(np.asarray(x.valid[row]).sum())
    noise = x.values.noise[row, :n]
    frames = np.repeat(x.values.codes[row, :n], noise.shape[1])
    return frames, noise.reshape(len(frames), -1), (x.row.rows[row], x.row.cond[row])


@pytest.mark.parametrize(("mode", "plain"), [("windowed", plainly_windowed), ("carried", plainly_carried)])
def test_against_a_plain_solve(params: Any, mode: str, plain: Callable[..., np.ndarray]) -> None:
    x, dit = request(CONFIG, LENGTHS, seed=1), DiT(CONFIG)
    whole = jax.jit(PARTS[mode](dit).apply_sequence)(params, x)
    for row, length in enumerate(LENGTHS):
        codes, noise, speaker = row_of(x, row)
        wanted = plain(dit, params, codes, noise, speaker)
        ours = np.asarray(whole.values)[row, : 2 * length]
        np.testing.assert_allclose(ours, wanted, rtol=0, atol=TOLERANCE * np.abs(wanted).max())


@pytest.mark.parametrize("mode", PARTS)
def test_layers_one_by_one(params: Any, mode: str) -> None:
    """As on a CPU; and with other layers that look back and ahead."""
    config = dataclasses.replace(CONFIG, look_backward_layers=(2,), look_ahead_layers=(0, 2))
    x = request(config, (30, 17))
    scanned, single = (PARTS[mode](DiT(config, scan_layers=scan)) for scan in (True, False))
    one = jax.jit(scanned.apply_sequence)(params, x)
    other = jax.jit(single.apply_sequence)(unstack_layers(params), x)
    valid = np.asarray(one.valid)
    assert (valid == np.asarray(other.valid)).all() and valid.sum() == 2 * 47
    ours, wanted = (np.asarray(made.values)[valid] for made in (other, one))
    np.testing.assert_allclose(ours, wanted, rtol=0, atol=TOLERANCE * np.abs(wanted).max())


@pytest.mark.parametrize("mode", PARTS)
def test_two_blocks_are_the_offline_ones(params: Any, mode: str) -> None:
    """Up to there every frame sees all of the request."""
    lengths = (1, 12, 13, 24)
    x, dit = request(CONFIG, lengths), DiT(CONFIG)
    made = np.asarray(jax.jit(PARTS[mode](dit).apply_sequence)(params, x).values)
    offline = jax.jit(functools.partial(solve, dit))
    for row in range(len(lengths)):
        codes, noise, speaker = row_of(x, row)
        blocks, _ = pack([len(codes)], 24, 2)
        voices = (np.repeat(a[None], 2, axis=0) for a in speaker)
        conditions: Any = dit.apply({"params": params}, cut(codes, 2, 24), *voices, method="conditions")
        wanted, _ = offline(params, cut(noise, 2, 24), conditions, blocks)
        wanted = np.asarray(wanted).reshape(-1, CONFIG.mel_dim)[: len(codes)]
        np.testing.assert_allclose(made[row, : len(codes)], wanted, rtol=0, atol=TOLERANCE * np.abs(wanted).max())


def test_a_step_keeps_one_state(params: Any) -> None:
    """The keys and values of all evaluations are written in place: no second set of them is made."""
    part = CarriedDiT(DiT(CONFIG))
    state = part.init_state(2)
    memory = sum(a.nbytes for a in jax.tree.leaves(state.memory))
    assert state.memory.keys.shape == (2, EVALUATIONS, 2, 2, 24, 2, 16)
    block = jax.tree.map(lambda a: a[:, :12], request(CONFIG, (12, 12)))
    block = Block(block.values, block.valid, request(CONFIG, (12, 12)).row)
    step = jax.jit(part.step, donate_argnums=1).lower(params, state, block, np.ones(2, bool)).compile()
    analysis = step.memory_analysis()
    assert analysis.alias_size_in_bytes >= memory
    assert analysis.temp_size_in_bytes < memory

"""Which whole replies are voiced in one list. A recorder stands in for Token2Wav, so that nothing is computed."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from omni_jax.engine.outputs import Timings, Utilization
from omni_jax.engine.pace import Pace
from omni_jax.engine.vocoder_stage import VocoderStage

CODES_PER_BLOCK = 12


def voice_all(num_blocks: list[int], block_sizes: tuple[int, ...], num_lists: int = 1) -> list[list[int]]:
    """The numbers of the replies of each call, where all of them wait."""
    calls = []

    def synthesize(codes: list[np.ndarray], *_: Any) -> list[np.ndarray]:
        calls.append([int(of_reply[0]) for of_reply in codes])
        return [np.zeros(1, np.float32)] * len(codes)

    engine = SimpleNamespace(
        num_lists=num_lists,
        codes_per_block=CODES_PER_BLOCK,
        count_blocks=lambda num_codes: -(-num_codes // CODES_PER_BLOCK),
        synthesize=synthesize,
        pace=Pace(),
    )
    engines: Any = SimpleNamespace(token2wav=engine, clock=lambda: 0.0)
    stage = VocoderStage(engines, block_sizes, Timings(), Utilization())
    for number, count in enumerate(num_blocks):
        codes = np.full(count * CODES_PER_BLOCK, number)
        speech = SimpleNamespace(voice=None, noise_seed=0)
        state: Any = SimpleNamespace(
            num_codes=len(codes), all_codes=lambda c=codes: c, request=SimpleNamespace(speech=speech), audio=[]
        )
        stage.enqueue(state)
    while stage.waiting:
        stage.step(is_idle=True)
    return calls


@pytest.mark.parametrize(
    ("num_blocks", "block_sizes", "calls"),
    [
        # 36 blocks would be padded to 48: seven replies fill 31 of 32
        ([4, 5, 4, 5, 4, 5, 4, 5], (), [[0, 1, 2, 3, 4, 5, 6], [7]]),
        # or to 64
        ([4, 5, 4, 5, 4, 5, 4, 5], (16, 32, 64), [[0, 1, 2, 3, 4, 5, 6], [7]]),
        # 56 of 64 are an eighth too few, and no more
        ([28, 28], (16, 32, 64), [[0, 1]]),
        ([28, 27], (16, 32, 64), [[0], [1]]),
        # no number of them fills any list
        ([2, 2, 2], (16, 32), [[0, 1, 2]]),
        # one that does not fit waits for the next list
        ([15, 14, 1], (16,), [[0, 2], [1]]),
    ],
)
def test_replies_of_a_list(num_blocks: list[int], block_sizes: tuple[int, ...], calls: list[list[int]]) -> None:
    assert voice_all(num_blocks, block_sizes) == calls


@pytest.mark.parametrize("num_lists", [1, 4])
def test_each_reply_is_voiced_once(num_lists: int) -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        num_blocks = rng.integers(1, 20, rng.integers(1, 12)).tolist()
        calls = voice_all(num_blocks, (16, 32, 64, 128), num_lists)
        assert sorted(number for call in calls for number in call) == list(range(len(num_blocks)))

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


class _State:
    """What the stage reads of a whole reply: its codes, which all are its number."""

    def __init__(self, number: int, num_blocks: int) -> None:
        self._codes = np.full(num_blocks * CODES_PER_BLOCK, number)
        self.num_codes = len(self._codes)
        self.request = SimpleNamespace(speech=SimpleNamespace(voice=None, noise_seed=0))
        self.audio: list[np.ndarray] = []

    def all_codes(self) -> np.ndarray:
        return self._codes


class _Recorder:
    """A stage whose Token2Wav notes the numbers of the replies of each call."""

    def __init__(self, block_sizes: tuple[int, ...], num_lists: int = 1) -> None:
        self.calls: list[list[int]] = []
        self.time = 0.0
        engine = SimpleNamespace(
            num_lists=num_lists,
            codes_per_block=CODES_PER_BLOCK,
            count_blocks=lambda num_codes: -(-num_codes // CODES_PER_BLOCK),
            synthesize=self._synthesize,
            pace=Pace(),
        )
        engines: Any = SimpleNamespace(token2wav=engine, clock=lambda: self.time)
        self.stage = VocoderStage(engines, block_sizes, Timings(), Utilization())

    def _synthesize(self, codes: list[np.ndarray], *_: Any) -> list[np.ndarray]:
        self.calls.append([int(of_reply[0]) for of_reply in codes])
        return [np.zeros(1, np.float32)] * len(codes)

    def enqueue(self, number: int, num_blocks: int) -> None:
        state: Any = _State(number, num_blocks)
        self.stage.enqueue(state)


def voice_all(num_blocks: list[int], block_sizes: tuple[int, ...], num_lists: int = 1) -> list[list[int]]:
    """The numbers of the replies of each call, where all of them wait."""
    recorder = _Recorder(block_sizes, num_lists)
    for number, count in enumerate(num_blocks):
        recorder.enqueue(number, count)
    while recorder.stage.waiting:
        recorder.stage.step(is_idle=True)
    return recorder.calls


def test_a_reply_beside_a_stream_that_has_no_time_is_voiced_at_last() -> None:
    """Not while it waits for less than 20 seconds; then alone."""
    recorder = _Recorder((16, 32))
    listener: Any = _State(9, 0)
    recorder.stage.open_stream(listener)
    recorder.enqueue(0, 4)
    recorder.enqueue(1, 4)
    for _ in range(3):
        recorder.stage.step(is_idle=False)
        recorder.time += 9.0
    assert recorder.calls == []
    recorder.stage.step(is_idle=False)
    assert recorder.calls == [[0]]


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

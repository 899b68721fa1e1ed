"""What is known of how long Token2Wav takes, and what is planned by it."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from omni_jax.engine.pace import Pace
from omni_jax.engine.request import SchedulerConfig
from omni_jax.engine.scheduler import Scheduler
from omni_jax.generation.model import OmniModel
from omni_jax.generation.options import Options
from tests.generation.test_stream import GREEDY, QUESTIONS, SPEAK, endless


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> OmniModel:
    return endless(tiny_model)


def test_hold_back_covers_the_longest_of_the_last_pauses() -> None:
    pace = Pace()
    assert pace.hold_back(0.14) is None
    for seconds in (0.2, 0.5, 0.3):
        pace.add_interval(seconds)
    assert pace.hold_back(0.14) == pytest.approx(0.36)
    assert pace.hold_back(0.6) == 0.0
    for _ in range(16):  # what is long ago does not count
        pace.add_interval(0.1)
    assert pace.hold_back(0.0) == 0.1


def test_lists_are_known_better_than_streams() -> None:
    pace = Pace()
    assert pace.seconds_per_block is None
    pace.add_piece(0.4, 2)
    assert pace.seconds_per_block == 0.2
    pace.add_list(1.6, 16)
    pace.add_piece(0.4, 2)
    assert pace.seconds_per_block == 0.1


@pytest.mark.parametrize("seconds_per_block", [1e6, None])
def test_lists_leave_streams_their_time(model: OmniModel, seconds_per_block: float | None) -> None:
    """A whole reply is voiced beside a stream where its list is done before the stream's listener has heard all."""
    engine = model.engines.token2wav
    assert engine is not None
    engine.pace = Pace()
    if seconds_per_block is not None:
        engine.pace.add_list(seconds_per_block, 1)
    # time stands still: a listener never hears what there is for him
    scheduler = Scheduler(dataclasses.replace(model.engines, clock=lambda: 0.0), SchedulerConfig(2, 2, (4,)))

    def submit(live: bool, num_codes: int):
        options = dict(**SPEAK, max_tokens=200, talker=dict(max_tokens=num_codes, **GREEDY))
        prompt = model.processor(QUESTIONS["text"])
        return model.submit(scheduler, prompt, Options.create(**options), live=live)

    live = submit(True, 300)
    whole = submit(False, 20)
    first_audio = None
    order = []
    for state, event in scheduler.run():
        if event.audio is not None and state is live and first_audio is None:
            first_audio = event
        if event.reply is not None:
            assert event.reply.error is None
            order.append(state)
    # a stream tells how fast blocks are, so nothing is known for its first pieces alone
    assert order == ([live, whole] if seconds_per_block == 1e6 else [whole, live])
    assert first_audio is not None and first_audio.hold_back is None
    assert engine.pace.hold_back(0.0) == 0.0

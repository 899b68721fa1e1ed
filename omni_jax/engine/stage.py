"""What the stages of Thinker and Talker share: slots that requests come into and leave, and what a step gives back."""

from __future__ import annotations

import abc
from collections.abc import Sequence
from dataclasses import dataclass, field

from omni_jax.engine.decode_state import DecodedTokens, DecodeResult, is_deleted, read_results, wait_for_result
from omni_jax.engine.outputs import Event
from omni_jax.engine.prefill import Clock, Stopwatch
from omni_jax.engine.request import RequestState


@dataclass
class StageOutput:
    """What came of a step of a stage.

    Attributes:
      events: pieces of replies.
      finished: requests that the stage is done with.
      failed: requests that it could not serve, and why.
    """

    events: list[tuple[RequestState, Event]] = field(default_factory=list)
    finished: list[RequestState] = field(default_factory=list)
    failed: list[tuple[RequestState, Exception]] = field(default_factory=list)

    def fail(self, states: Sequence[RequestState], error: Exception) -> None:
        """Adds requests that an error has ended."""
        self.failed += [(state, error) for state in states]

    def extend(self, other: StageOutput) -> None:
        """Adds what came of another step."""
        self.events += other.events
        self.finished += other.finished
        self.failed += other.failed


class SlotStage(abc.ABC):
    """A fixed number of slots on the device, some of them taken by requests.

    A subclass holds the device state in ``_device_state``, None while no slot is taken, and a record for each slot.
    """

    def __init__(self, num_slots: int):
        self._slots: list[RequestState | None] = [None] * num_slots
        self._device_state: object | None = None

    @property
    def num_slots(self) -> int:
        return len(self._slots)

    @property
    def num_free(self) -> int:
        return self._slots.count(None)

    @property
    def states(self) -> list[RequestState]:
        """The requests that have a slot."""
        return [state for state in self._slots if state is not None]

    @property
    def decoding(self) -> list[RequestState]:
        """Those of them that a call of the decode loop is for."""
        return self.states

    def slot_of(self, state: RequestState) -> int | None:
        """The slot of a request, or None."""
        # two requests are never equal, so this is a search by identity
        for slot, other in enumerate(self._slots):
            if other is state:
                return slot
        return None

    def remove(self, state: RequestState) -> None:
        """Frees the slot of a request, if it has one; the device state goes with the last one."""
        slot = self.slot_of(state)
        if slot is not None:
            self._slots[slot] = None
        # without a request the caches would only hold memory
        if not self.states:
            self._device_state = None

    def take_lost(self) -> list[RequestState]:
        """Removes and returns the requests whose device state a failed call has used up."""
        if not is_deleted(self._device_state):
            return []
        # a call is given the arrays of all slots to write in; when it fails, they are lost for all slots
        lost = self.states
        for state in lost:
            self.remove(state)
        return lost

    @abc.abstractmethod
    def dispatch(self) -> DecodeResult | None:
        """Starts a call of the decode loop on the device; None where there is nothing to decode."""
        ...

    @abc.abstractmethod
    def collect(self, decoded: DecodedTokens) -> StageOutput:
        """Takes what that call has decoded."""
        ...

    @abc.abstractmethod
    def add_seconds(self, seconds: float) -> None:
        """Adds to the time that the stage has taken."""
        ...


def decode_together(stages: Sequence[SlotStage], clock: Clock) -> StageOutput:
    """One call of each stage's decode loop. All are dispatched before one transfer brings their results to the host.

    An error of a call fails the requests that it was for, and any other whose arrays it has used up.
    """
    output = StageOutput()

    def fail(stage: SlotStage, error: Exception) -> None:
        # one call serves all slots that decode, so its error is theirs
        output.fail(stage.take_lost() or stage.decoding, error)

    results: list[tuple[SlotStage, DecodeResult]] = []
    stopwatch = Stopwatch(clock)
    # dispatching returns at once: the device computes for one stage while the host prepares the next
    for stage in stages:
        try:
            result = stage.dispatch()
        except Exception as error:
            fail(stage, error)
            continue
        if result is not None:
            results.append((stage, result))
    # waited for one by one, so that an error is laid at the right stage, and time too
    healthy = []
    for stage, result in results:
        try:
            wait_for_result(result)  # of the device; errors of the computation show here
        except Exception as error:
            fail(stage, error)
        else:
            healthy.append((stage, result))
        stage.add_seconds(stopwatch.lap())
    # one transfer for all of them
    decoded = read_results([result for _, result in healthy])
    for (stage, _), tokens in zip(healthy, decoded, strict=True):
        output.extend(stage.collect(tokens))
    return output

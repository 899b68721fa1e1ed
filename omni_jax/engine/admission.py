"""Which requests may be prefilled now, and when the Talker had better wait for more of them."""

from __future__ import annotations

from collections.abc import Iterable

from omni_jax.engine.request import RequestState
from omni_jax.engine.talker_stage import TalkerStage
from omni_jax.engine.thinker_stage import ThinkerStage


class AdmissionPolicy:
    """Live requests are admitted as slots get free; those that are spoken when their text is complete, in bursts.

    A step of the Thinker costs the same for one slot as for many, and speech takes so much longer than text that slots
    would be taken one at a time. So the policy waits until little is left to speak, and then fills all slots.
    """

    def __init__(self, thinker: ThinkerStage, talker: TalkerStage):
        self._thinker = thinker
        self._talker = talker
        # whether requests that are spoken as a whole are admitted now
        self._is_filling = True

    def choose(self, waiting: Iterable[RequestState]) -> RequestState | None:
        """The first request that there is room for, live ones before the others."""
        self._update_filling()
        # the sort is stable: among live requests, and among the others, the first to come is the first
        for state in sorted(waiting, key=lambda state: not state.request.live):
            if self._has_room(state):
                return state
        return None

    def is_talker_early(self, prefilling: Iterable[RequestState], waiting: Iterable[RequestState]) -> bool:
        """Whether slots of the Talker's are free, nobody listens, and texts are on their way to them."""
        # for a listener a pause of the Talker's is a gap in the sound
        if not self._talker.num_free or any(state.is_live for state in self._talker.states):
            return False
        coming = [*self._thinker.states, *prefilling]
        # requests that wait count only while they are going to be admitted
        if self._is_filling:
            coming += waiting
        return any(map(_is_spoken_whole, coming))

    def _update_filling(self) -> None:
        # the texts ahead of the Talker: those that are complete, and those that are being decoded
        num_waiting = len(self._talker.waiting)
        num_ahead = num_waiting + sum(map(_is_spoken_whole, self._thinker.states))
        # two thresholds, far apart: with one alone, requests would be admitted one by one again
        if num_ahead >= self._talker.num_slots + self._thinker.num_slots:
            self._is_filling = False
        elif num_waiting <= self._talker.num_slots // 2:
            self._is_filling = True

    def _has_room(self, state: RequestState) -> bool:
        if not self._thinker.num_free:
            return False
        # both stages serve a live request from its beginning, so it needs a slot of each
        if state.is_live:
            return self._talker.num_free > 0
        # a request without speech never waits for the Talker
        return self._is_filling or not state.speaks


def _is_spoken_whole(state: RequestState) -> bool:
    """Whether a request is spoken when its text is complete."""
    return state.speaks and not state.is_live

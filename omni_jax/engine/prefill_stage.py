"""The stage in which prompts are prefilled: one alone where somebody waits for it, those of a batch together."""

from __future__ import annotations

from collections.abc import Sequence

from omni_jax.engine.decode_state import Context
from omni_jax.engine.outputs import Timings, Utilization
from omni_jax.engine.prefill import Engines, Prefix
from omni_jax.engine.prefix_cache import PrefixCache
from omni_jax.engine.request import RequestState, SchedulerConfig, Stage
from omni_jax.engine.slot_prefill import SlotPrefill
from omni_jax.engine.stage import StageOutput
from omni_jax.engine.thinker_stage import ThinkerStage
from omni_jax.processing.prefill_plan import CALL_BLOCKS, PromptPiece, cut_piece


class PrefillStage:
    """Prefills prompts, a call at a time.

    A prompt goes right into a slot of the Thinker's where there are several slots, nobody hears the reply while it is
    made, and nothing of it has been prefilled. Any other goes through a prefix of its own, one at a time.
    """

    def __init__(
        self,
        engines: Engines,
        thinker: ThinkerStage,
        config: SchedulerConfig,
        timings: Timings,
        utilization: Utilization,
    ):
        self._engines = engines
        self._cache = PrefixCache(config.prefix_bytes)
        self._thinker = thinker
        self._timings = timings
        self._utilization = utilization
        self._alone: RequestState | None = None  # whose prompt goes through a prefix
        self._prefixes: dict[RequestState, Prefix] = {}  # of that request, and of some that wait
        self._slots = SlotPrefill(engines, thinker, timings)

    @property
    def states(self) -> list[RequestState]:
        alone = [] if self._alone is None else [self._alone]
        return [*alone, *self._slots.states]

    @property
    def has_room(self) -> bool:
        """Whether another request may be started: blocks that wait for the next call are one call at most."""
        return self._alone is None and self._slots.num_blocks < CALL_BLOCKS[-1]

    def keep(self, state: RequestState, prefix: Prefix) -> None:
        """Takes what has been prefilled of a request before it is started."""
        self._prefixes[state] = prefix

    def start(self, state: RequestState) -> None:
        """Begins with a request."""
        state.stage = Stage.PREFILL
        pieces = self._skip_cached(state)
        if self._goes_into_slot(state):
            self._slots.start(state)
            return
        self._alone = state
        # of a live dialogue there is a prefix already, with what came before it was answered
        if state not in self._prefixes:
            capacity = state.request.initial_capacity
            # a reply that is not live is spoken when its text is complete; the Talker prefills then
            self._prefixes[state] = Prefix(
                self._engines, capacity, self._timings, with_talker=state.is_live, adapter=state.request.adapter
            )
        self._prefixes[state].add(pieces)

    def step(self) -> StageOutput:
        """One call for the request that is alone, or for those that go into slots.

        Returns:
          ``finished`` has the requests that have been given to the Thinker, their prompts complete;
          ``take_talker_prefix`` is to be called for each.
        """
        if self._alone is None:
            return self._step_slots()
        output = StageOutput()
        try:
            if self._step_alone(self._alone):
                output.finished.append(self._alone)
        except Exception as error:
            output.fail([self._alone], error)
        return output

    def take_talker_prefix(self, state: RequestState) -> Context | None:
        """What the Talker has prefilled of a request that the Thinker has."""
        # a reference here would keep its caches from being freed
        prefix = self._prefixes.get(state)
        self.remove(state)
        return None if prefix is None else prefix.talker

    def _skip_cached(self, state: RequestState) -> Sequence[PromptPiece]:
        """The pieces of a request that remain behind a prefix that was kept, which becomes its own."""
        request = state.request
        if request.key is None or state in self._prefixes:
            return request.pieces
        prefix = self._cache.find(request.key, with_talker=state.is_live, timings=self._timings)
        if prefix is None:
            return request.pieces
        self._prefixes[state] = prefix
        state.num_cached = prefix.length
        (piece,) = request.pieces  # of a whole prompt
        return [cut_piece(piece, prefix.length)]

    def _goes_into_slot(self, state: RequestState) -> bool:
        return prefills_slots(self._engines, self._thinker) and not state.request.live and state not in self._prefixes

    def _step_alone(self, state: RequestState) -> bool:
        """Whether its prompt is complete, and the Thinker has it."""
        prefix = self._prefixes[state]
        if prefix.pending:
            use = prefix.step()
            self._utilization.prefill.add(use.used, use.computed)
        if prefix.pending:
            return False
        self._thinker.admit(state, prefix)
        if state.request.key is not None:
            self._cache.add(state.request.key, prefix)
        return True

    def _step_slots(self) -> StageOutput:
        output = StageOutput()
        try:
            use = self._slots.step()
        except Exception as error:
            # one call serves all of its prompts, so its error is theirs
            output.fail(list(self._slots.current), error)
            return output
        self._utilization.prefill.add(use.used, use.computed)
        for state, chunks in self._slots.take_complete():
            try:
                self._thinker.begin(state, chunks)
                output.finished.append(state)
            except Exception as error:
                output.fail([state], error)
        return output

    def remove(self, state: RequestState) -> None:
        """Forgets a request, if it is here."""
        self._prefixes.pop(state, None)
        self._slots.remove(state)
        if self._alone is state:
            self._alone = None


def prefills_slots(engines: Engines, thinker: ThinkerStage) -> bool:
    """Whether prompts of a batch are read right into slots."""
    # over a mesh's batch axes blocks of any slots would be gathered between devices
    return thinker.num_slots > 1 and engines.slot_multiple == 1

"""The scheduler: requests come in, pieces of replies come out, as many at once as there are slots.

A request is prefilled, its text decoded by the Thinker, its codes by the Talker, and these become sound in Token2Wav.
A step does a little of each, so a request may join or leave between two steps.

Where sound is to come as it is made, Thinker, Talker and Token2Wav take turns. Any other reply is spoken when its text
is complete, so that a slot of the Thinker's is not kept while the Talker takes its many more steps, and the sound of
several such replies is made at once.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterator, Sequence

from omni_jax.engine.admission import AdmissionPolicy
from omni_jax.engine.outputs import Event, Reply, Timings, Utilization
from omni_jax.engine.prefill import Engines, Prefix
from omni_jax.engine.prefill_stage import PrefillStage
from omni_jax.engine.request import RequestState, SchedulerConfig, Stage
from omni_jax.engine.stage import StageOutput, decode_together
from omni_jax.engine.talker_stage import TalkerStage
from omni_jax.engine.thinker_stage import ThinkerStage
from omni_jax.engine.vocoder_stage import VocoderStage

Events = list[tuple[RequestState, Event]]


class Scheduler:
    """Requests at work on one model. An error of a call fails those that it was for, or whose arrays it used up.

    Attributes:
      timings: where the time went.
      utilization: how much of the work was padding.
      clock: of the timings.
    """

    def __init__(self, engines: Engines, config: SchedulerConfig | None = None):
        config = config or SchedulerConfig()
        self.timings = Timings()
        self.utilization = Utilization()
        self.clock = engines.clock
        self._waiting: deque[RequestState] = deque()
        self._thinker = ThinkerStage(engines, config.thinker_slots, self.timings, self.utilization)
        self._prefill = PrefillStage(engines, self._thinker, config, self.timings, self.utilization)
        self._talker = TalkerStage(engines, config.talker_slots, self._thinker, self.timings, self.utilization)
        self._vocoder = VocoderStage(engines, config.block_sizes, self.timings, self.utilization)
        self._stages = (self._prefill, self._thinker, self._talker, self._vocoder)
        self._policy = AdmissionPolicy(self._thinker, self._talker)
        self._events: Events = []

    @property
    def busy(self) -> bool:
        """Whether there is anything left to do."""
        return bool(self._waiting or self._talker.waiting or any(stage.states for stage in self._stages))

    @property
    def num_waiting(self) -> int:
        """Requests of which nothing has been prefilled yet."""
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        """Requests that have a slot of the Thinker's or the Talker's."""
        return len({*self._thinker.states, *self._talker.states})

    def submit(self, state: RequestState, prefix: Prefix | None = None) -> None:
        """Takes a request.

        Args:
          state: of a request that no scheduler has.
          prefix: what of its prompt has been prefilled; the Talker prefilled along if the request is live and spoken.
        """
        self._waiting.append(state)
        if prefix is not None:
            self._prefill.keep(state, prefix)

    def cancel(self, state: RequestState) -> None:
        """Ends a request without an answer; what it held is free at once."""
        self._remove(state)
        self._events = [(other, event) for other, event in self._events if other is not state]

    def run(self) -> Iterator[tuple[RequestState, Event]]:
        """Steps until nothing is left to do, and yields what comes of it."""
        while self.busy:
            yield from self.step()

    def run_alone(self, state: RequestState) -> Generator[Event, None, None]:
        """What comes of the scheduler's only request; its error is raised."""
        for _, event in self.run():
            if state.error is not None:
                raise state.error
            yield event

    def step(self) -> Events:
        """Does a little of everything; returns what came of it."""
        self._step_prefill()
        self._step_decode()
        self._step_vocoder()
        events = self._events
        self._events = []
        return events

    def _step_prefill(self) -> None:
        """Prefills until all slots of the Thinker are taken; only one chunk where somebody waits for a live reply."""
        while self._start_prefills():
            output = self._prefill.step()
            for state in output.finished:
                try:
                    self._admit(state)
                except Exception as error:
                    output.fail([state], error)
            for state, error in output.failed:
                self._fail([state], error)
            if any(state.request.live for state in [*self._thinker.states, *self._talker.states]):
                return

    def _start_prefills(self) -> bool:
        """Begins with the next requests that there is room for; whether any is being prefilled."""
        while self._prefill.has_room and (state := self._policy.choose(self._waiting)) is not None:
            self._waiting.remove(state)
            try:
                self._prefill.start(state)
            except Exception as error:
                self._fail([state], error)
        return bool(self._prefill.states)

    def _admit(self, state: RequestState) -> None:
        """Gives a prefilled request, where it is live and spoken, a slot of the Talker's; the Thinker's it has."""
        prefix = self._prefill.take_talker_prefix(state)
        if prefix is not None:
            self._talker.admit_live(state, prefix)
            self._vocoder.open_stream(state)

    def _step_decode(self) -> None:
        """Some tokens and some codes of every slot."""
        # a slot is kept for a live request that is being prefilled
        num_kept = sum(state.is_live for state in self._prefill.states)
        self._apply(self._talker.admit_waiting(num_kept))
        is_early = self._policy.is_talker_early(self._prefill.states, self._waiting)
        self._apply(decode_together([self._thinker] if is_early else [self._thinker, self._talker], self.clock))
        for state in self._talker.take_complete():
            if state.is_live:
                self._vocoder.end_stream(state)
            elif state.num_codes:
                self._vocoder.enqueue(state)
            else:
                self._finish(state)

    def _step_vocoder(self) -> None:
        others = [*self._waiting, *self._prefill.states, *self._thinker.states, *self._talker.states]
        self._apply(self._vocoder.step(is_idle=not others and not self._talker.waiting))
        for state in self._talker.states:
            if state.is_live and self._vocoder.is_stream_complete(state):
                self._talker.remove(state)
                if state.detokenizer.finished:
                    self._finish(state)

    def _apply(self, output: StageOutput) -> None:
        """Takes on what came of a stage's step."""
        for state, error in output.failed:
            self._fail([state], error)
        self._events += [(state, event) for state, event in output.events if not state.ended]
        for state in output.finished:
            if not state.ended:  # it may have failed in another stage
                self._advance(state)

    def _advance(self, state: RequestState) -> None:
        """Takes a request from the stage that is done with it to the next one."""
        if state.stage is Stage.TEXT and state.is_live:
            self._thinker.remove(state)
            state.stage = Stage.SPEECH
            if self._talker.slot_of(state) is None:  # its sound ended before its text
                self._finish(state)
        elif state.stage is Stage.TEXT and state.speaks and not state.is_mute:
            try:
                self._talker.enqueue(state)
            except Exception as error:
                self._fail([state], error)
        else:
            self._finish(state)

    def _finish(self, state: RequestState) -> None:
        self._remove(state)
        state.stage = Stage.FINISHED
        reply = state.make_reply(self.timings)
        self._events.append((state, Event(audio=None if state.request.live else reply.audio, reply=reply)))

    def _fail(self, states: Sequence[RequestState], error: Exception) -> None:
        for state in dict.fromkeys([*states, *self._thinker.take_lost(), *self._talker.take_lost()]):
            self._remove(state)
            state.stage = Stage.FAILED
            state.error = error
            self._events.append((state, Event(reply=Reply.from_error(error))))

    def _remove(self, state: RequestState) -> None:
        """Takes a request out of every stage."""
        self._waiting = deque(other for other in self._waiting if other is not state)
        for stage in self._stages:
            stage.remove(state)

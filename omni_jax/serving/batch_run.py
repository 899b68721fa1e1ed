"""Lines of requests to lines of results: decoding in worker processes, the model's scheduler, sound to files."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import Any

from omni_jax.distributed import allreduce_min, is_main_process
from omni_jax.engine.outputs import Reply
from omni_jax.engine.request import RequestState, SchedulerConfig, Utilization
from omni_jax.engine.warmup import Compilations
from omni_jax.errors import InputError
from omni_jax.generation.model import OmniModel
from omni_jax.processing.chat import SPEECH_SYSTEM_PROMPT, Message, TextPart
from omni_jax.processing.files import join_path, write_atomically
from omni_jax.processing.layout import AudioInput, Prompt
from omni_jax.serving.batch_lines import Line, LineError, parse_line, result_line
from omni_jax.serving.media_workers import MediaWorkers
from omni_jax.serving.request import ChatRequest, answer_body, confine, sound_bytes

_AHEAD = 4  # prompts that are prepared for each row of the Thinker's
_MOST_BYTES = 4 << 30  # of prompts that are prepared and wait
_BUSY, _FAILED, _DONE = range(3)  # how far a prompt is; of several hosts the lowest counts
_WRITERS = 4  # threads that write speech; a bucket takes a while


@dataclass(frozen=True)
class Places:
    """Where files are: paths, or ``gs://`` URLs.

    Attributes:
      folder: that relative paths in requests are taken from.
      root: within which media must lie.
      audio: where speech is written; it is put into the lines if None.
    """

    folder: str
    root: str
    audio: str | None = None


@dataclass(frozen=True)
class Result:
    """A line of results.

    Attributes:
      text: the line, without its end.
      failed: whether it is an error.
      tokens: of text that were made.
      seconds: of speech.
    """

    text: str
    failed: bool = False
    tokens: int = 0
    seconds: float = 0.0


@dataclass
class _Job:
    line: Line
    custom_id: str
    request: ChatRequest


@dataclass
class State:
    """How a run stands, for those who watch it."""

    load: Utilization = field(default_factory=Utilization)
    compiled: Compilations = field(default_factory=Compilations)  # since the first request
    answering: int = 0
    untrained: int = 0  # spoken requests under another system prompt than speech was trained with


class Runner:
    """Answers lines with one model. What is wrong with a line is its own result, and costs no other.

    A model that is spread over several hosts has a runner on each, which is given the same lines and makes the same
    calls; only that of the first writes speech and gives out answers.
    """

    def __init__(
        self, model: OmniModel, name: str, workers: MediaWorkers, slots: SchedulerConfig, places: Places, state: State
    ):
        """``name`` is what answers call the model; ``state`` is kept up to date."""
        self.state = state
        self._model, self._name, self._workers, self._slots, self._places = model, name, workers, slots, places
        self._ahead = _AHEAD * slots.thinker
        allreduce_min([_DONE], self._ahead)  # which compiles it

    def run(self, lines: Iterable[Line]) -> Iterator[Result]:
        """The results of lines, in the order in which they are done.

        Closing the iterator ends the work; nothing of it is lost but what had not been given out.

        Raises:
          InputError: if speech cannot be written.
        """
        with ThreadPoolExecutor(_WRITERS) as writers:
            yield from self._run(iter(lines), writers)

    def _run(self, lines: Iterator[Line], writers: ThreadPoolExecutor) -> Iterator[Result]:
        more = True
        scheduler = self._model.scheduler(self._slots)
        self.state.load = scheduler.load
        reading: dict[Future[Prompt], _Job] = {}
        ready: list[tuple[Prompt, _Job]] = []
        tasks: dict[RequestState, _Job] = {}
        writing: set[Future[Result]] = set()
        while True:
            while more and len(reading) + len(ready) < self._ahead and _bytes(ready) < _MOST_BYTES:
                line = next(lines, None)
                more = line is not None
                if line is not None:
                    yield from self._send(line, reading)
            for job, prompt in self._prepared(reading):
                if isinstance(prompt, Prompt):
                    ready.append((prompt, job))
                else:
                    yield failed(job.line, job.custom_id, prompt)
            enough = len(ready) >= 2 * self._slots.thinker or not (scheduler.busy and reading)
            if not scheduler.waiting and enough:
                ready.sort(key=_length)  # little is padding, then
                now, ready = ready[: self._slots.thinker], ready[self._slots.thinker :]
                for prompt, job in now:
                    try:
                        tasks[self._model.request(scheduler, prompt, job.request.options)] = job
                    except InputError as e:
                        yield failed(job.line, job.custom_id, e)
            for task, event in scheduler.step():
                if event.reply is not None:
                    job = tasks.pop(task)
                    if is_main_process():
                        writing.add(writers.submit(self._answered, job, event.reply))
            self.state.answering = scheduler.answering
            written = {future for future in writing if future.done()}
            writing -= written
            yield from (future.result() for future in written)
            if scheduler.busy:
                continue
            under_way: list[Future[Any]] = [*reading, *writing]
            if under_way:
                wait(under_way, timeout=1.0, return_when=FIRST_COMPLETED)
            elif not more and not ready:
                return

    def _send(self, line: Line, reading: dict[Future[Prompt], _Job]) -> Iterator[Result]:
        """Has a worker prepare a line, if it is a request."""
        context = self._model.config.thinker_config.text_config.max_position_embeddings
        custom_id = None
        try:
            custom_id, request = parse_line(line)
            self._model.check(request.options)
            self.state.untrained += request.options.speaks and not _asks_for_speech(request.messages[0])
            messages = confine(request.messages, self._places.folder, self._places.root)
        except LineError as e:
            yield failed(line, e.custom_id, e, "invalid_line")
            return
        except InputError as e:
            yield failed(line, custom_id, e)
            return
        future = self._workers.submit(messages, request.options.assume_fps, context - 1)
        reading[future] = _Job(line, custom_id, dataclasses.replace(request, messages=()))

    def _prepared(self, reading: dict[Future[Prompt], _Job]) -> Iterator[tuple[_Job, Prompt | InputError]]:
        """What the workers have done with requests. Every host has workers, and goes on with what all have done."""
        states = allreduce_min([_state(future) for future in reading], self._ahead)
        for future, state in zip(list(reading), states, strict=True):
            if state == _BUSY:
                continue
            job = reading.pop(future)
            try:
                prompt = self._workers.result(future)
            except InputError as e:
                yield job, e
            else:
                yield job, prompt if state == _DONE else InputError("its media could not be decoded on another host")

    def _answered(self, job: _Job, reply: Reply) -> Result:
        """Writes the speech of an answer, if it is to be in a file, and then makes its line."""
        if reply.error is not None:
            return failed(job.line, job.custom_id, RuntimeError(reply.error), "failed")
        name, seconds = None, 0.0
        if reply.audio is not None:
            seconds = len(reply.audio) / reply.sample_rate
            if self._places.audio is not None:
                name = join_path(self._places.audio, f"{job.line.name}.{job.request.audio_format}")
                sound = sound_bytes(reply.audio, reply.sample_rate, job.request.audio_format)
                try:
                    write_atomically(name, sound)
                except OSError as e:  # not the line's fault, and as likely to hit the next one
                    raise InputError(
                        f"cannot write {name}: {e.strerror or e}; the same command goes on from what is written"
                    ) from e
        body = answer_body(job.request, reply, job.line.name, self._name, int(time.time()), name)
        return Result(result_line(job.line, job.custom_id, body, None), False, len(reply.token_ids), seconds)


def failed(line: Line, custom_id: str | None, error: Exception, code: str = "invalid_request") -> Result:
    """What comes of a line that cannot be answered."""
    return Result(result_line(line, custom_id, None, (code, str(error))), failed=True)


def _asks_for_speech(message: Message) -> bool:
    """Whether this first message is the one that speech was trained with."""
    content = message.content if isinstance(message.content, str) else message.content[:2]
    return message.role == "system" and content in (SPEECH_SYSTEM_PROMPT, (TextPart(SPEECH_SYSTEM_PROMPT),))


def _state(future: Future[Prompt]) -> int:
    if not future.done():
        return _BUSY
    return _DONE if future.exception() is None else _FAILED


def _length(item: tuple[Prompt, _Job]) -> int:
    """How long a request is going to be, prompt and reply, at most."""
    prompt, job = item
    return len(prompt) + job.request.options.max_tokens


def _bytes(ready: list[tuple[Prompt, _Job]]) -> int:
    media = [item for prompt, _ in ready for item in prompt.media]
    return sum((item.mel if isinstance(item, AudioInput) else item.patches).nbytes for item in media)

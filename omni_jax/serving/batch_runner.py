"""Lines of requests to lines of results: decoding in worker processes, the model's scheduler, sound to files."""

from __future__ import annotations

import dataclasses
import enum
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import Any

from omni_jax.distributed import allreduce_min, is_main_process
from omni_jax.engine.outputs import Reply, Utilization
from omni_jax.engine.request import RequestState, SchedulerConfig
from omni_jax.engine.warmup import Compilations
from omni_jax.errors import InputError
from omni_jax.generation.cloned_voice import ClonedVoice
from omni_jax.generation.model import OmniModel
from omni_jax.processing.captions import CaptionFormat, make_captions, write_captions
from omni_jax.processing.chat import SPEECH_SYSTEM_PROMPT, Message, TextPart
from omni_jax.processing.files import join_path, write_atomically
from omni_jax.processing.layout import Prompt
from omni_jax.processing.media_workers import MediaWorkers
from omni_jax.processing.vision import PixelSettings
from omni_jax.processing.voice_clip import VoiceClip
from omni_jax.processing.worker_pool import WorkerStartError
from omni_jax.serving.batch_lines import Line, Result, make_error, make_result, parse_line, read_custom_id
from omni_jax.serving.chat_request import ChatRequest
from omni_jax.serving.chat_response import make_body
from omni_jax.serving.media_roots import MediaRoots
from omni_jax.serving.sound_formats import encode_sound

# enough to choose prompts of like length from, and to bridge a medium that takes long to decode
_PREPARED_PER_SLOT = 4  # prompts that are prepared for each slot of the Thinker
_MAX_BYTES = 8 << 30  # of all lines, prompts and answers that are there at once
_MAX_CLIP_BYTES = 4 << 20  # of the samples and the mel of a voice's clip
_TOKEN_BYTES = 40  # of a number in a tuple of Python's
_NUM_WRITERS = 4  # threads that write speech; a bucket takes a while


class _Preparation(enum.IntEnum):
    """How far a prompt is; of several hosts the least counts."""

    BUSY = 0
    FAILED = 1
    DONE = 2


class OutputError(InputError):
    """Speech cannot be written. That is no fault of the line, and as likely to hit the next one: it ends the run."""


@dataclass(frozen=True)
class FileLocations:
    """Where files are: paths, or ``gs://`` URLs.

    Attributes:
      media_roots: within which media must lie.
      audio_dir: where speech is written; it is put into the lines if None.
      caption_formats: of captions that are written beside it.
    """

    media_roots: MediaRoots
    audio_dir: str | None = None
    caption_formats: tuple[CaptionFormat, ...] = ()


@dataclass
class RunStatus:
    """How a run stands, for those who watch it."""

    utilization: Utilization = field(default_factory=Utilization)
    compilations: Compilations = field(default_factory=Compilations)  # since the first request
    num_running: int = 0
    num_untrained_prompts: int = 0  # spoken requests under another system prompt than speech was trained with


@dataclass(frozen=True)
class _ActiveRequest:
    """A line that is worked on."""

    line: Line
    custom_id: str
    request: ChatRequest  # without its messages, which its media process has
    num_bytes: int  # that are held for it; while it is prepared, the most that they can become
    clip: Future[VoiceClip] | None = None  # of its voice, where it brings one along


@dataclass
class _PreparedRequest:
    """A line whose prompt waits for a slot."""

    prompt: Prompt
    clip: VoiceClip | None
    active: _ActiveRequest

    @property
    def max_length(self) -> int:
        """Tokens of prompt and reply, at most."""
        return len(self.prompt) + self.active.request.options.max_tokens


class BatchRunner:
    """Answers lines with one model. Whatever goes wrong with a line is its own result, and costs no other.

    A model that is spread over several hosts has a runner on each, which is given the same lines and makes the same
    calls; only that of the main process writes speech and gives out answers.
    """

    def __init__(
        self,
        model: OmniModel,
        model_name: str,
        media_workers: MediaWorkers,
        scheduler_config: SchedulerConfig,
        locations: FileLocations,
        status: RunStatus,
    ):
        """``model_name`` is what answers call the model; ``status`` is kept up to date."""
        self.model = model
        self.model_name = model_name
        self.media_workers = media_workers
        self.scheduler_config = scheduler_config
        self.locations = locations
        self.status = status
        self.num_slots = _num_slots(scheduler_config)
        self.max_prepared = _PREPARED_PER_SLOT * self.num_slots
        self.max_prompt_bytes = self.max_prompt_length * _bytes_per_token(model.processor.settings.pixels)
        # its program is compiled before the first request
        allreduce_min([_Preparation.DONE], self.max_prepared)

    @property
    def max_prompt_length(self) -> int:
        """Tokens; a position of the context is left for the reply."""
        return self.model.config.thinker_config.text_config.max_position_embeddings - 1

    def run(self, lines: Iterable[Line]) -> Iterator[Result]:
        """The results of lines, in the order in which they are done.

        Closing the iterator ends the work; nothing of it is lost but what had not been given out.

        Raises:
          OutputError: if speech cannot be written.
          WorkerStartError: if the processes that decode media cannot be started.
        """
        with ThreadPoolExecutor(_NUM_WRITERS) as writers:
            run = _Run(self, iter(lines), writers)
            # a run hands its results out only between two steps, so it may be closed after any of them
            while not run.finished:
                yield from run.step()


class _Run:
    """The lines of one call of ``BatchRunner.run``, on their way from stage to stage."""

    def __init__(self, runner: BatchRunner, lines: Iterator[Line], writers: ThreadPoolExecutor):
        self._runner = runner
        self._lines = lines
        self._writers = writers
        self._scheduler = runner.model.scheduler(runner.scheduler_config)
        self._has_lines = True
        # the stages that a line goes through; in each it is in one of these
        self._preparing: dict[Future[Prompt], _ActiveRequest] = {}
        self._prepared: list[_PreparedRequest] = []
        self._running: dict[RequestState, _ActiveRequest] = {}
        self._writing: dict[Future[Result], int] = {}  # and the bytes that are held for each
        runner.status.utilization = _utilization(self._scheduler)

    @property
    def finished(self) -> bool:
        """Whether every line has its result."""
        work = self._preparing or self._prepared or self._writing
        return not (self._has_lines or work or self._scheduler.busy)

    def step(self) -> list[Result]:
        """Moves lines on by a stage; waits where there is nothing to do but to wait."""
        # from the first stage to the last, so that media processes have work while the model decodes
        results = self._take_lines()
        results += self._collect_prepared()
        results += self._submit()
        self._decode()
        results += self._collect_written()
        # without a busy scheduler nothing but these can bring the next result
        waiting: list[Future[Any]] = [*self._preparing, *self._writing]
        waiting += [active.clip for active in self._preparing.values() if active.clip is not None]
        waiting = [future for future in waiting if not future.done()]
        if waiting and not results and not self._scheduler.busy:
            wait(waiting, timeout=1.0, return_when=FIRST_COMPLETED)
        return results

    def _take_lines(self) -> list[Result]:
        """Has media processes prepare lines, as far ahead as slots may need them."""
        results = []
        # one line at a time, and only where there is room: the file may be larger than the memory
        while self._has_lines and self._has_room():
            line = next(self._lines, None)
            if line is None:
                self._has_lines = False
                break
            try:
                self._prepare(line)
            except WorkerStartError:
                raise
            except Exception as error:  # of whatever type: it is this line's alone
                results.append(make_error(line, read_custom_id(line), error))
        return results

    def _has_room(self) -> bool:
        if len(self._preparing) + len(self._prepared) >= self._runner.max_prepared:
            return False
        # a few long videos are gigabytes of patches, which are held until they are answered
        in_flight = [*self._preparing.values(), *(item.active for item in self._prepared), *self._running.values()]
        num_bytes = sum(active.num_bytes for active in in_flight)
        # answers wait where a bucket or a disk is slower than the model
        return num_bytes + sum(self._writing.values()) < _MAX_BYTES

    def _prepare(self, line: Line) -> None:
        """Sends a line to a media process.

        Raises:
          InputError: if it is no request that can be served.
        """
        runner = self._runner
        # what can be found wrong without its media is found here, and costs no media process anything
        custom_id, request = parse_line(line)
        runner.model.check(request.options)
        if request.options.speaks and not _is_speech_prompt(request.messages[0]):
            runner.status.num_untrained_prompts += 1
        # before any file is opened, and whatever process will open it
        messages = runner.locations.media_roots.confine(request.messages)
        options = runner.locations.media_roots.confine_voice(request.options)
        future = runner.media_workers.submit(messages, request.options.assume_fps, runner.max_prompt_length)
        clip = None
        if options.speaks and isinstance(options.voice, ClonedVoice):
            clip = runner.media_workers.submit_clip(options.voice.ref_audio, None)
        # the line itself goes, for its media may be in it; the messages have as many bytes, about
        num_bytes = len(line.data or b"")
        if any(message.media for message in messages):
            num_bytes += runner.max_prompt_bytes
        if clip is not None:
            num_bytes += _MAX_CLIP_BYTES
        request = dataclasses.replace(request, messages=(), options=options)
        line = dataclasses.replace(line, data=b"")
        self._preparing[future] = _ActiveRequest(line, custom_id, request, num_bytes, clip)

    def _collect_prepared(self) -> list[Result]:
        """Takes what media processes have done. Every host has its own, and goes on with what all have done."""
        results = []
        own = [min(_preparation(future), _preparation(active.clip)) for future, active in self._preparing.items()]
        # all hosts have the same lines in the same order here, so their states can be compared one by one
        common = allreduce_min(own, self._runner.max_prepared)
        for future, preparation in zip(list(self._preparing), common, strict=True):
            if preparation == _Preparation.BUSY:
                continue
            active = self._preparing.pop(future)
            # an error of this host says more than that another one has failed
            try:
                prompt = self._runner.media_workers.result(future)
                clip = None if active.clip is None else self._runner.media_workers.result(active.clip)
                if preparation != _Preparation.DONE:
                    raise InputError("its media could not be decoded on another host")
            except WorkerStartError:
                raise
            except Exception as error:
                results.append(make_error(active.line, active.custom_id, error))
            else:
                num_bytes = prompt.num_bytes + (0 if clip is None else clip.samples.nbytes + clip.mel.nbytes)
                active = dataclasses.replace(active, num_bytes=num_bytes, clip=None)
                self._prepared.append(_PreparedRequest(prompt, clip, active))
        return results

    def _submit(self) -> list[Result]:
        """Gives the scheduler prompts when it has taken all that it was given."""
        num_slots = self._runner.num_slots
        can_wait = self._scheduler.busy and self._preparing
        if _num_waiting(self._scheduler) or (can_wait and len(self._prepared) < 2 * num_slots):
            return []
        # prompts are held back until there are some to choose from, while others keep the scheduler busy;
        # those of like length share the slots' caches with little padding
        # the order is the same on every host: it depends on lengths and on the order of lines alone
        self._prepared.sort(key=lambda item: item.max_length)
        chosen = self._prepared[:num_slots]
        del self._prepared[:num_slots]
        results = []
        for item in chosen:
            active = item.active
            try:
                state = _submit(self._runner.model, self._scheduler, item, active.request)
            except Exception as error:
                results.append(make_error(active.line, active.custom_id, error))
            else:
                self._running[state] = active
        return results

    def _decode(self) -> None:
        """One step of the scheduler; answers go to the writers."""
        for state, event in self._scheduler.step():
            # pieces of text and sound are for streams; a line is written as a whole
            if event.reply is None:
                continue
            active = self._running.pop(state)
            # of several hosts one writes; all have made the same reply
            if is_main_process():
                result = self._writers.submit(self._write, active, event.reply)
                self._writing[result] = _reply_bytes(event.reply)
        self._runner.status.num_running = _num_running(self._scheduler)

    def _collect_written(self) -> list[Result]:
        # an OutputError comes out here, in the thread that runs the batch, and ends it
        written = [future for future in self._writing if future.done()]
        for future in written:
            del self._writing[future]
        return [future.result() for future in written]

    def _write(self, active: _ActiveRequest, reply: Reply) -> Result:
        """Makes an answer's line, after its speech is in a file, if it is to be in one.

        Raises:
          OutputError: if the file cannot be written.
        """
        try:
            if reply.error is not None:
                return make_error(active.line, active.custom_id, RuntimeError(reply.error))
            return self._write_answer(active, reply)
        except OutputError:
            raise
        except Exception as error:
            return make_error(active.line, active.custom_id, error)

    def _write_answer(self, active: _ActiveRequest, reply: Reply) -> Result:
        locations = self._runner.locations
        path = None
        seconds = 0.0
        # the file first: a result that is written must never name a sound that is not there
        if reply.audio is not None:
            seconds = len(reply.audio) / reply.sample_rate
            if locations.audio_dir is not None:
                name = join_path(locations.audio_dir, active.line.result_id)
                path = f"{name}.{active.request.audio_format}"
                _write_file(path, encode_sound(reply.audio, active.request.audio_format))
                for caption_format in locations.caption_formats:
                    captions = write_captions(make_captions(reply.text, reply.words), caption_format)
                    _write_file(f"{name}.{caption_format}", captions.encode())
        now = int(time.time())
        body = make_body(active.request, reply, active.line.result_id, self._runner.model_name, now, path)
        text = make_result(active.line, active.custom_id, body)
        return Result(text, num_tokens=len(reply.token_ids), speech_seconds=seconds)


def _write_file(path: str, data: bytes) -> None:
    try:
        write_atomically(path, data)
    except (OSError, InputError) as e:  # InputError: a bucket that cannot be reached
        reason = e.strerror if isinstance(e, OSError) and e.strerror else e
        raise OutputError(f"cannot write {path}: {reason}; the same command goes on from what is written") from e


def _is_speech_prompt(message: Message) -> bool:
    """Whether this first message is the one that speech was trained with."""
    # two parts at most are looked at, to see that there is no second one
    content = message.content if isinstance(message.content, str) else message.content[:2]
    return message.role == "system" and content in (SPEECH_SYSTEM_PROMPT, (TextPart(SPEECH_SYSTEM_PROMPT),))


def _bytes_per_token(pixels: PixelSettings) -> int:
    """Of the float32 patches of a cell, which are more than the log-mel of a token of sound."""
    return 4 * 3 * pixels.temporal_patch_size * pixels.cell**2


def _reply_bytes(reply: Reply) -> int:
    """What a reply and the line that is made of it take, about."""
    samples = 0 if reply.audio is None else len(reply.audio)
    tokens = len(reply.token_ids) + len(reply.codec_ids)
    # of a sample 4 bytes as it comes, 2 in a file, and twice 8/3 in letters, for the body and for the line
    return 12 * samples + _TOKEN_BYTES * tokens + 8 * len(reply.text)


def _preparation(future: Future[Any] | None) -> _Preparation:
    if future is None:
        return _Preparation.DONE
    if not future.done():
        return _Preparation.BUSY
    return _Preparation.DONE if future.exception() is None else _Preparation.FAILED


# all that this module asks of the engine


def _submit(model: OmniModel, scheduler: Any, item: _PreparedRequest, request: ChatRequest) -> RequestState:
    return model.submit(scheduler, item.prompt, request.options, clip=item.clip)


def _num_slots(config: SchedulerConfig) -> int:
    return config.thinker_slots


def _utilization(scheduler: Any) -> Utilization:
    return scheduler.utilization


def _num_waiting(scheduler: Any) -> int:
    return scheduler.num_waiting


def _num_running(scheduler: Any) -> int:
    return scheduler.num_running

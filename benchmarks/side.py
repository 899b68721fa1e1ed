"""What the benchmarks ask of a side, and the process that a side runs in.

A side is an implementation of the model: omni_jax (``ours.py``) or the PyTorch reference (``pytorch_side.py``). Both
load the same checkpoint and get the same inputs. Nothing here imports JAX or PyTorch, so that the process of one side
holds nothing of the other's.

Letters: B requests, S tokens, K codes, F mel frames, M mel bins, N patches, P values of a patch.
"""

from __future__ import annotations

import enum
import multiprocessing
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Concatenate, Generic, ParamSpec, TypeVar

import numpy as np
from jaxtyping import Float, Int

VOICE = "Chelsie"  # one of the two that tools/make_checkpoint.py writes
PUBLISHED = "published"  # folder, in that of the model, of the layout that PyTorch reads
CONVERTED = "converted"  # folder of the layout that omni_jax reads
TOKENS_PER_SECOND = 4  # of text, in a second of speech
CODES_PER_SECOND = 50
PARAMETER_DEVIATION = 0.02  # of parameters made on an accelerator, about that of the published initialisation

_PROCESS = Path("/proc/self")

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


@dataclass(frozen=True)
class VoiceArrays:
    """A voice of any length of clip.

    Attributes:
      cond: float32 [1, speaker embedding].
      mel: float32 [1, F, M], of the clip.
    """

    cond: np.ndarray
    mel: np.ndarray


@dataclass(frozen=True)
class PromptInputs:
    """A prompt as a model takes it; the PyTorch side is given those of ours.

    Attributes:
      tokens: int64 [S].
      mel: float32 [F, M] of the sound, or None.
    """

    tokens: Int[np.ndarray, " S"]
    mel: Float[np.ndarray, "F M"] | None = None


@dataclass(frozen=True)
class ReplyRequest:
    """A dialogue, and how long its reply is to be; the model never ends by itself (``models.write_model``).

    Attributes:
      question: in writing.
      num_tokens: of the reply.
      num_codes: of its speech.
      sound: a file that comes before the question, or None.
      inputs: what the processor makes of both, for a side that has no processor.
    """

    question: str
    num_tokens: int
    num_codes: int
    sound: Path | None = None
    inputs: PromptInputs | None = None

    def check_reply(self, num_tokens: int, num_codes: int, *, spoken: bool = True) -> None:
        """A time counts only if the reply has the length that was asked for.

        Raises:
          RuntimeError: if it has another.
        """
        # nothing ends by itself, so a reply of another length is a mistake of the benchmark
        wanted = (self.num_tokens, self.num_codes if spoken else 0)
        if (num_tokens, num_codes) != wanted:
            raise RuntimeError(
                f"{wanted[0]} tokens and {wanted[1]} codes were asked for, and {(num_tokens, num_codes)} came"
            )


class Part(enum.StrEnum):
    """The parts of the model, and of the work around it, whose calls are timed."""

    # in the order of the work
    INPUT = "input"
    ENCODERS = "encoders"
    PREFILL = "prefill"
    TALKER_PREFILL = "talker prefill"
    SPEAKER = "speaker encoder"
    TEXT = "text"
    BEGIN = "talker begin"
    CODES = "codes"
    DIT = "DiT"
    VOCODER = "vocoder"
    COPY = "copy"


@dataclass(frozen=True)
class Call:
    """One call of a part, in seconds since the request, and how much it did: steps, positions, blocks, frames."""

    part: Part
    started: float
    ended: float
    work: float

    @property
    def seconds(self) -> float:
        return self.ended - self.started


@dataclass(frozen=True)
class CompileCount:
    """Programs that were compiled, and the seconds that it took."""

    count: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class StreamedReply:
    """When the pieces of a spoken reply came, in seconds since the request.

    Attributes:
      first_text: the first piece of text, None where text does not come by itself.
      arrivals: of the packets of sound.
      num_samples: of each packet.
      first_audible: the first sample of each packet that can be heard, None in silence.
      calls: of the parts of the model; none where they are not timed.
      compiled: during the reply.
      compiled_to_first_packet: until the first packet.
    """

    first_text: float | None
    arrivals: tuple[float, ...]
    num_samples: tuple[int, ...]
    first_audible: tuple[int | None, ...]
    calls: tuple[Call, ...] = ()
    compiled: CompileCount | None = None
    compiled_to_first_packet: CompileCount | None = None


@dataclass(frozen=True)
class Throughput:
    """What it took to answer many requests.

    Attributes:
      seconds: for all of them.
      compilations: on the way; None where nothing is compiled.
      padding: by stage, the share of what was computed that was padding.
      stages: by stage, the seconds.
    """

    seconds: float
    compilations: int | None = None
    padding: dict[str, float] = field(default_factory=dict)
    stages: dict[str, float] = field(default_factory=dict)


class Side(ABC):
    """An implementation at work on one checkpoint. What a method needs is loaded when it is first called.

    Times are wall-clock seconds. They leave out loading, copying the inputs, and the compiler's time, unless a method
    says otherwise.
    """

    def __init__(self, folder: Path):
        """``folder`` is one that ``models.write_model`` has filled."""
        self.folder = folder

    @abstractmethod
    def encode_audio(self, mel: Float[np.ndarray, "F M"]) -> float:
        """Seconds of the audio encoder."""

    @abstractmethod
    def encode_image(self, patches: Float[np.ndarray, "N P"], grid: tuple[int, int, int]) -> float:
        """Seconds of the vision encoder."""

    @abstractmethod
    def prefill(self, tokens: Int[np.ndarray, " S"]) -> float:
        """Seconds until the Thinker has read a prompt of text."""

    @abstractmethod
    def decode_text(self, tokens: Int[np.ndarray, " S"], batch: int, num_tokens: int) -> float:
        """Seconds a step of greedy decoding, of so many requests with the same prompt."""

    @abstractmethod
    def decode_codes(self, batch: int, prompt_length: int, num_codes: int) -> float:
        """Seconds a step of the Talker, of so many requests."""

    @abstractmethod
    def solve_mel(self, codes: Int[np.ndarray, "B K"], voice: VoiceArrays) -> float:
        """Seconds from codes to mel: all evaluations of the DiT."""

    @abstractmethod
    def vocode(self, mel: Float[np.ndarray, "B F M"]) -> float:
        """Seconds from mel to samples."""

    @abstractmethod
    def load(self) -> float:
        """Seconds of loading all of the model."""

    @abstractmethod
    def warm_up(self, requests: Sequence[ReplyRequest], num_slots: int | None = None) -> CompileCount:
        """Prepares for these requests: for streams, or for ``answer_all`` with so many slots."""

    @abstractmethod
    def stream_reply(self, request: ReplyRequest, *, first_packet_only: bool = False) -> StreamedReply:
        """Speaks a reply; compiling counts. The stream may be closed behind its first packet."""

    @abstractmethod
    def answer_all(self, requests: Sequence[ReplyRequest], num_slots: int, *, spoken: bool) -> Throughput:
        """Answers all of the requests, ``num_slots`` at a time."""

    @abstractmethod
    def prepare_files(self, files: Sequence[Path], packed: bool) -> float:
        """Seconds from media files to what the model takes, a dialogue for each.

        Args:
          files: .wav, .jpg and .mp4.
          packed: whether a side that can pack them into one batch does so.
        """


AnySide = TypeVar("AnySide", bound=Side)


class SideProcess(Generic[AnySide]):
    """A process in which one side works, so that its memory and its compiled programs are its own.

    Attributes:
      memory: the most bytes that the process held during the last call, with interpreter and libraries; 0 where the
        system does not say (it is Linux that does).
    """

    def __init__(self, side: type[AnySide], folder: Path, *, one_core: bool = False):
        """``one_core`` holds the process, and the threads that it will start, to one core."""
        # one worker, in which everything that a side has loaded stays from call to call;
        # not forked: threads of a parent that has used JAX would be missing
        context = multiprocessing.get_context("spawn")
        self._pool = ProcessPoolExecutor(1, context, _make_side, (side, folder, one_core))
        self.memory = 0

    def __enter__(self) -> SideProcess[AnySide]:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown()

    def run(
        self,
        method: Callable[Concatenate[AnySide, Arguments], Result],
        *args: Arguments.args,
        **kwargs: Arguments.kwargs,
    ) -> Result:
        """What a method of the side returns; ``process.run(Side.vocode, mel)`` is ``side.vocode(mel)`` over there."""
        # a method goes over by its name: a subclass's, where the caller names the one of ``Side``
        result, self.memory = self._pool.submit(_run_method, method.__name__, args, kwargs).result()
        return result


_sides: list[Side] = []  # of a process that SideProcess has started: its only one


def _make_side(side: type[Side], folder: Path, one_core: bool) -> None:
    # threads that are started from here on take the affinity of this one
    if one_core:
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    _sides.append(side(folder))


def _run_method(name: str, args: tuple[object, ...], kwargs: dict[str, object]) -> tuple[Any, int]:
    """The result, and the high-water mark of this process's memory while it was made."""
    method = getattr(_sides[0], name)
    # Linux's account of a process, which other systems do not have
    if not (_PROCESS / "clear_refs").exists():
        return method(*args, **kwargs), 0
    (_PROCESS / "clear_refs").write_text("5")  # sets the mark back to what is held now
    result = method(*args, **kwargs)
    # the high-water mark, in kB
    status = (_PROCESS / "status").read_text().splitlines()
    peak = next(line for line in status if line.startswith("VmHWM"))
    return result, 1024 * int(peak.split()[1])

"""When somebody begins and stops to speak, so that the server can take turns by itself.

The default detector is WebRTC's (``webrtcvad-wheels``), which tells voice from noise in frames of 20 ms. Silero's
network, in an ONNX file, may take its place: it tells more noises from voices.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
from jaxtyping import Float

from omni_jax.errors import InputError
from omni_jax.processing.audio import Resampler
from omni_jax.serving.wav import pcm16

RATE = 16_000
_WEBRTC_FRAME = 320  # samples
_SILERO_FRAME = 512
_SILERO_CONTEXT = 64  # samples of the frame before, which the network hears too
_START_SECONDS = 0.12  # of voice within the window below: WebRTC takes 0.1 s of a click for voice
_START_WINDOW_SECONDS = 0.2


class VoiceDetector(Protocol):
    """Tells how probable it is that somebody speaks.

    Attributes:
      frame: samples that it takes at a time, at ``RATE``.
    """

    frame: int

    def probability(self, samples: Float[np.ndarray, " frame"]) -> float:
        """Of voice in the next frame."""
        ...


class WebRtcDetector:
    """WebRTC's detector, which says yes or no."""

    frame = _WEBRTC_FRAME

    def __init__(self, threshold: float):
        """``threshold`` of the session, 0 to 1, chooses how sure it must be, in four steps."""
        import webrtcvad

        self._vad = webrtcvad.Vad(min(int(threshold * 4), 3))

    def probability(self, samples: Float[np.ndarray, " frame"]) -> float:
        return float(self._vad.is_speech(pcm16(samples), RATE))


class SileroDetector:
    """Silero's network (version 5 or 6) in an ONNX file."""

    frame = _SILERO_FRAME

    def __init__(self, path: Path):
        """Loads it.

        Raises:
          InputError: if ONNX Runtime is not installed, or the file is no such network.
        """
        try:
            import onnxruntime
        except ImportError as e:
            raise InputError(f"a voice detector in an ONNX file needs: pip install onnxruntime ({e})") from e
        try:
            self._session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        except Exception as e:
            raise InputError(f"{path}: no ONNX file that can be read: {e}") from e
        names = {value.name for value in self._session.get_inputs()}
        if names != {"input", "state", "sr"}:
            raise InputError(f"{path}: its inputs are {', '.join(sorted(names))}; Silero's are input, state, sr")
        self._state = np.zeros((2, 1, 128), np.float32)
        self._context = np.zeros(_SILERO_CONTEXT, np.float32)

    def probability(self, samples: Float[np.ndarray, " frame"]) -> float:
        frame = np.concatenate([self._context, samples])[None]
        rate = np.array(RATE, np.int64)
        probability, state = self._session.run(None, {"input": frame, "state": self._state, "sr": rate})
        self._state = np.asarray(state)
        self._context = samples[-_SILERO_CONTEXT:]
        return float(np.asarray(probability).reshape(-1)[0])


@dataclass(frozen=True)
class Boundary:
    """Where speech begins or ends.

    Attributes:
      kind: which of them.
      seconds: of the sound that was pushed.
    """

    kind: Literal["start", "stop"]
    seconds: float


class TurnDetector:
    """Finds where speech begins and ends in a sound that goes on."""

    def __init__(self, detector: VoiceDetector, rate: int, *, threshold: float, silence_seconds: float):
        """Begins in silence.

        Args:
          detector: of voice in frames.
          rate: of the sound.
          threshold: of the probability that counts as voice.
          silence_seconds: without voice that end a speech.
        """
        self._detector = detector
        self._resampler = Resampler(rate, RATE)
        self._threshold = threshold
        self._seconds_per_frame = detector.frame / RATE
        self._silence_frames = max(round(silence_seconds / self._seconds_per_frame), 1)
        self._window: deque[bool] = deque(maxlen=round(_START_WINDOW_SECONDS / self._seconds_per_frame))
        self._start_frames = max(round(_START_SECONDS / self._seconds_per_frame), 1)
        self._rest = np.zeros(0, np.float32)
        self._num_frames = 0
        self._num_silent = 0
        self._speaks = False

    @property
    def speaks(self) -> bool:
        """Whether somebody speaks."""
        return self._speaks

    def push(self, samples: Float[np.ndarray, " n"]) -> list[Boundary]:
        """Takes more of the sound; returns what boundaries it has."""
        self._rest = np.concatenate([self._rest, self._resampler.push(samples)])
        boundaries = []
        while len(self._rest) >= self._detector.frame:
            frame, self._rest = np.split(self._rest, [self._detector.frame])
            has_voice = self._detector.probability(frame) >= self._threshold
            self._num_frames += 1
            boundary = self._step(has_voice)
            if boundary is not None:
                boundaries.append(boundary)
        return boundaries

    def _step(self, has_voice: bool) -> Boundary | None:
        if self._speaks:
            self._num_silent = 0 if has_voice else self._num_silent + 1
            if self._num_silent < self._silence_frames:
                return None
            self._speaks = False
            self._window.clear()
            return Boundary("stop", self._num_frames * self._seconds_per_frame)
        self._window.append(has_voice)
        if sum(self._window) < self._start_frames:
            return None
        self._speaks = True
        self._num_silent = 0
        first = len(self._window) - list(self._window).index(True)  # frames ago
        return Boundary("start", max(self._num_frames - first, 0) * self._seconds_per_frame)

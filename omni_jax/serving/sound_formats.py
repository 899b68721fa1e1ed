"""Speech as bytes of a file or of a stream, in the formats that OpenAI's API has; FFmpeg encodes them."""

from __future__ import annotations

import io
from typing import Any

import av
import numpy as np
from jaxtyping import Float

from omni_jax.models.token2wav import SAMPLE_RATE
from omni_jax.serving.wav import pcm16

# by format: the content type, and of those that FFmpeg makes the container, the codec and the rate it takes
CONTENT_TYPES = {
    "wav": "audio/wav",
    "pcm16": f"audio/L16; rate={SAMPLE_RATE}; channels=1",
    "flac": "audio/flac",
    "mp3": "audio/mpeg",
    "opus": "audio/ogg",
    "aac": "audio/aac",
}
SOUND_FORMATS = tuple(CONTENT_TYPES)
_ENCODERS = {
    "flac": ("flac", "flac", SAMPLE_RATE),
    "mp3": ("mp3", "libmp3lame", SAMPLE_RATE),
    "opus": ("ogg", "libopus", 48_000),  # it knows 24 kHz too, but players take its files for 48
    "aac": ("adts", "aac", SAMPLE_RATE),
}
_UNKNOWN_LENGTH = 0xFFFFFFFF  # of a WAV that is streamed


def encode_sound(samples: Float[np.ndarray, " n"], sound_format: str) -> bytes:
    """Speech as a file.

    Args:
      samples: float32 [n] from -1 to 1, at 24 kHz.
      sound_format: one of ``SOUND_FORMATS``; pcm16 is bare samples, the lower byte first.
    """
    if sound_format == "pcm16":
        return pcm16(samples)
    if sound_format == "wav":
        data = pcm16(samples)
        return _wav_header(len(data)) + data
    # not as a stream: FFmpeg goes back to the header and writes the length into it
    file = io.BytesIO()
    encoder = _FileEncoder(file, sound_format)
    encoder.write(samples)
    encoder.close()
    return file.getvalue()


class SoundStream:
    """Speech as bytes that come as it does; joined, they are a file that may lack its length."""

    def __init__(self, sound_format: str):
        """Begins a stream in one of ``SOUND_FORMATS``."""
        self._format = sound_format
        self._has_header = False
        self._file = _Pipe()
        self._encoder = _FileEncoder(self._file, sound_format) if sound_format in _ENCODERS else None

    def push(self, samples: Float[np.ndarray, " n"]) -> bytes:
        """The bytes that more samples add; maybe none, for an encoder works in frames."""
        if self._encoder is not None:
            self._encoder.write(samples)
            return self._file.take()
        header = b""
        if self._format == "wav" and not self._has_header:
            header = _wav_header(None)
        self._has_header = True
        return header + pcm16(samples)

    def finish(self) -> bytes:
        """The last bytes."""
        if self._encoder is not None:
            self._encoder.close()
            return self._file.take()
        return b"" if self._has_header or self._format != "wav" else _wav_header(None)


class _FileEncoder:
    """Encodes into a file that is open."""

    def __init__(self, file: Any, sound_format: str):
        container, codec, rate = _ENCODERS[sound_format]
        # so that what is encoded comes at once; of Ogg a page otherwise has a second of sound
        options = {"flush_packets": "1"} | ({"page_duration": "20000"} if container == "ogg" else {})
        self._container = av.open(file, "w", format=container, options=options)
        stream = self._container.add_stream(codec, rate=rate, layout="mono")
        assert isinstance(stream, av.AudioStream)
        self._stream = stream
        self._num_samples = 0

    def write(self, samples: Float[np.ndarray, " n"]) -> None:
        if not len(samples):
            return
        values = np.frombuffer(pcm16(samples), "<i2")[None]
        frame = av.AudioFrame.from_ndarray(values, format="s16", layout="mono")
        frame.sample_rate = SAMPLE_RATE
        frame.pts = self._num_samples
        self._num_samples += len(samples)
        self._container.mux(self._stream.encode(frame))

    def close(self) -> None:
        self._container.mux(self._stream.encode(None))
        self._container.close()


class _Pipe:
    """A file that can only be written; what was written can be taken away."""

    def __init__(self) -> None:
        self._data = bytearray()

    def write(self, data: bytes) -> int:
        self._data += data
        return len(data)

    def take(self) -> bytes:
        data = bytes(self._data)
        self._data.clear()
        return data


def _wav_header(num_bytes: int | None) -> bytes:
    """Of 16-bit samples of one channel; None: nobody knows how many follow."""
    length = _UNKNOWN_LENGTH if num_bytes is None else num_bytes
    riff_length = _UNKNOWN_LENGTH if num_bytes is None else num_bytes + 36
    fields = b"fmt " + (16).to_bytes(4, "little") + (1).to_bytes(2, "little") + (1).to_bytes(2, "little")
    fields += SAMPLE_RATE.to_bytes(4, "little") + (2 * SAMPLE_RATE).to_bytes(4, "little")
    fields += (2).to_bytes(2, "little") + (16).to_bytes(2, "little")
    return b"RIFF" + riff_length.to_bytes(4, "little") + b"WAVE" + fields + b"data" + length.to_bytes(4, "little")

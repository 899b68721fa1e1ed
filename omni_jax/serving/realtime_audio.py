"""Sound of a realtime session: its formats, and packets that come late, twice, in another order, or never."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float

from omni_jax.errors import InputError
from omni_jax.serving.wav import pcm16

PCM_RATE = 24_000
G711_RATE = 8_000
RATES = {"audio/pcm": PCM_RATE, "audio/pcmu": G711_RATE, "audio/pcma": G711_RATE}
MAX_LATE_SECONDS = 0.2  # that a packet is waited for once later ones are there
MAX_GAP_SECONDS = 5.0  # of silence in place of packets that never came

_MU_BIAS = 0x84
_MU_CLIP = 8_158  # of 14 bits


def decode_samples(data: bytes, audio_format: str) -> Float[np.ndarray, " n"]:
    """Float32 samples [n] from -1 to 1 of bytes in one of ``RATES``.

    Raises:
      InputError: for half a sample.
    """
    if audio_format == "audio/pcm":
        if len(data) % 2:
            raise InputError(f"audio has {len(data)} bytes; samples of 16 bits have two each")
        return np.frombuffer(data, "<i2").astype(np.float32) / 32768
    table = _MU_LAW if audio_format == "audio/pcmu" else _A_LAW
    return table[np.frombuffer(data, np.uint8)]


def encode_samples(samples: Float[np.ndarray, " n"], audio_format: str) -> bytes:
    """Bytes of float32 samples [n] from -1 to 1, at the rate of the format."""
    if audio_format == "audio/pcm":
        return pcm16(samples)
    values = np.round(np.clip(samples, -1, 1) * 32767).astype(np.int32)
    encoded = _encode_mu_law(values) if audio_format == "audio/pcmu" else _encode_a_law(values)
    return encoded.tobytes()


def _decode_mu_law() -> Float[np.ndarray, " 256"]:
    """ITU-T G.711: sign, three bits of exponent, four of mantissa, all inverted."""
    code = ~np.arange(256) & 0xFF
    magnitude = (((code & 0x0F) << 3) + _MU_BIAS << ((code & 0x70) >> 4)) - _MU_BIAS
    return (np.where(code & 0x80, -magnitude, magnitude) / 32768).astype(np.float32)


def _decode_a_law() -> Float[np.ndarray, " 256"]:
    """ITU-T G.711: every other bit is inverted; the lowest segment is linear."""
    code = np.arange(256) ^ 0x55
    exponent = (code & 0x70) >> 4
    mantissa = (code & 0x0F) << 4
    magnitude = np.where(exponent == 0, mantissa + 8, (mantissa + 0x108) << np.maximum(exponent - 1, 0))
    return (np.where(code & 0x80, magnitude, -magnitude) / 32768).astype(np.float32)


_MU_LAW = _decode_mu_law()
_A_LAW = _decode_a_law()


def _encode_mu_law(values: np.ndarray) -> np.ndarray:
    # of 14 bits
    magnitude = np.minimum(np.abs(values >> 2), _MU_CLIP) + (_MU_BIAS >> 2)
    exponent = np.floor(np.log2(magnitude)).astype(np.int32) - 5
    mantissa = (magnitude >> (exponent + 1)) & 0x0F
    sign = np.where(values < 0, 0x80, 0)
    return (~(sign | (exponent << 4) | mantissa) & 0xFF).astype(np.uint8)


def _encode_a_law(values: np.ndarray) -> np.ndarray:
    magnitude = np.minimum(np.where(values < 0, ~values, values), 32_767) >> 4  # 11 bits
    exponent = np.where(magnitude < 16, 0, np.floor(np.log2(np.maximum(magnitude, 1))).astype(np.int32) - 3)
    mantissa = np.where(exponent > 1, magnitude >> np.maximum(exponent - 1, 0), magnitude) & 0x0F
    sign = np.where(values < 0, 0, 0x80)
    return ((sign | (exponent << 4) | mantissa) ^ 0x55).astype(np.uint8)


class PacketBuffer:
    """Packets in their order, with silence where one never comes.

    A packet may have a number, which counts up by one from any beginning. One that comes before its turn waits for
    those before it, ``MAX_LATE_SECONDS`` of sound at most; then these count as lost, and silence as long as the packet
    that waits longest stands for each. What comes after its place was given away, or a second time, is dropped. Packets
    without a number are taken as they come.
    """

    def __init__(self, rate: int):
        self._rate = rate
        self._next: int | None = None
        self._waiting: dict[int, Float[np.ndarray, " n"]] = {}

    def push(self, samples: Float[np.ndarray, " n"], number: int | None) -> Float[np.ndarray, " m"]:
        """Takes a packet; returns the samples whose order is settled now."""
        if number is None:
            return samples
        if self._next is None:
            self._next = number
        if number < self._next or number in self._waiting:
            return samples[:0]
        self._waiting[number] = samples
        ready = self._take_next()
        while self._waiting and self._seconds_waiting() > MAX_LATE_SECONDS:
            ready += self._skip_lost()
            ready += self._take_next()
        return np.concatenate([samples[:0], *ready])

    def finish(self) -> Float[np.ndarray, " m"]:
        """What still waits, with silence in its gaps."""
        ready: list[np.ndarray] = []
        while self._waiting:
            ready += self._skip_lost()
            ready += self._take_next()
        return np.concatenate([np.zeros(0, np.float32), *ready])

    def _take_next(self) -> list[np.ndarray]:
        """The packets that are next."""
        ready = []
        while self._next in self._waiting:
            ready.append(self._waiting.pop(self._next))
            self._next += 1
        return ready

    def _skip_lost(self) -> list[np.ndarray]:
        """Silence for the packets before the first that waits."""
        assert self._next is not None
        first = min(self._waiting)
        num_lost = first - self._next
        self._next = first
        length = num_lost * len(self._waiting[first])
        return [np.zeros(min(length, int(MAX_GAP_SECONDS * self._rate)), np.float32)]

    def _seconds_waiting(self) -> float:
        return sum(map(len, self._waiting.values())) / self._rate

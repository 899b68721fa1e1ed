"""Whether a voice was made as this repository makes voices, and as the 25 Hz codec of the same family does.

Nothing in a published folder says how ``cond`` and ``ref_mel`` were made. A voice that was made in another way is
spoken without any error, and sounds wrong. So each number is compared with what the recipe can give:

* ``cond``: a speaker vector of length 1 (CAM++, normalised).
* ``ref_mel``: natural logarithms of magnitudes, 80 bins, 100 frames a second (``processing.speech_mel``), of a clip
  whose largest sample lies 6 dB under full scale (``processing.voice_clip``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from omni_jax.checkpoint.voices import Voice
from omni_jax.config import OmniConfig
from omni_jax.processing.speech_mel import FRAME_RATE, LOG_FLOOR, NUM_BINS, log_ceiling
from omni_jax.processing.voice_clip import MAX_SECONDS, MIN_SECONDS

NORM_TOLERANCE = 0.005  # of a length of 1; numbers that were kept in bfloat16 are each up to 0.004 off
_FLOOR_TOLERANCE = 0.05  # of a logarithm; bfloat16 keeps 8 bits, which at -11.5 is 0.03
_MIN_AT_FLOOR = 4  # equal values at the minimum, from which on it is taken for a floor
CLIP_TOLERANCE = 0.1  # mean difference of logarithms: another resampler gives some 0.01, another recipe over 0.5


@dataclass(frozen=True)
class Finding:
    """What one comparison of a voice has shown.

    Attributes:
      voice: its name.
      part: what was looked at.
      found: what it is.
      expected: what the recipe gives.
      fits: whether it is that.
    """

    voice: str
    part: str
    found: str
    expected: str
    fits: bool


def check_recipe(voice: Voice, config: OmniConfig) -> list[Finding]:
    """Compares a voice with the recipe.

    Args:
      voice: as ``voices.load_voices`` or ``voices.read_spk_dict`` gives it, so that its numbers are finite.
      config: of the model that is to speak in it.

    Returns:
      A finding for each part, in a fixed order, whether it fits or not.
    """
    dit = config.token2wav_config.dit_config
    vocab_size = config.thinker_config.text_config.vocab_size
    findings = []

    def add(part: str, found: str, expected: str, fits: bool) -> None:
        findings.append(Finding(voice.name, part, found, expected, fits))

    add("bos_token", f"{voice.bos_token}", f"0 to {vocab_size - 1}", 0 <= voice.bos_token < vocab_size)
    width = voice.cond.shape[1]
    add("cond: numbers", f"{width}", f"{dit.enc_emb_dim}", width == dit.enc_emb_dim)
    norm = float(np.linalg.norm(voice.cond.astype(np.float64)))
    add("cond: length", f"{norm:.4f}", "1", abs(norm - 1) <= NORM_TOLERANCE)
    frames, bins = voice.ref_mel.shape[1:]
    add("ref_mel: bins", f"{bins}", f"{NUM_BINS}", bins == NUM_BINS == dit.mel_dim)
    seconds = frames / FRAME_RATE
    add(
        "ref_mel: length",
        f"{frames} frames, {seconds:.2f} s",
        f"{MIN_SECONDS:g} to {MAX_SECONDS:g} s at {FRAME_RATE} frames a second",
        MIN_SECONDS <= seconds <= MAX_SECONDS,
    )
    add(*_check_range(voice.ref_mel))
    add(*_check_floor(voice.ref_mel))
    return findings


def _check_range(ref_mel: Float[np.ndarray, "1 T mel"]) -> tuple[str, str, str, bool]:
    low = float(ref_mel.min(initial=np.inf))
    high = float(ref_mel.max(initial=-np.inf))
    ceiling = log_ceiling()
    fits = low >= LOG_FLOOR - _FLOOR_TOLERANCE and high <= ceiling + _FLOOR_TOLERANCE
    return "ref_mel: values", f"{low:.2f} to {high:.2f}", f"{LOG_FLOOR:.2f} to {ceiling:.2f}", fits


def _check_floor(ref_mel: Float[np.ndarray, "1 T mel"]) -> tuple[str, str, str, bool]:
    """Where values pile up at the minimum, that is where they were cut off: another number is another recipe."""
    part = "ref_mel: floor"
    expected = f"{LOG_FLOOR:.2f}, or not reached"
    if not ref_mel.size:
        return part, "no values", expected, False
    low = float(ref_mel.min())
    if np.count_nonzero(ref_mel == ref_mel.min()) < _MIN_AT_FLOOR:
        return part, f"not reached; the least value is {low:.2f}", expected, True
    return part, f"{low:.2f}", expected, abs(low - LOG_FLOOR) <= _FLOOR_TOLERANCE


def compare_clip(voice: Voice, mel: Float[np.ndarray, "frames 80"]) -> Finding:
    """Compares a voice's clip with the mel of the sound that it is said to be made from.

    Args:
      voice: whose ``ref_mel`` is compared; it may be shorter than the sound, from whose beginning it then is.
      mel: of the sound, from ``voice_clip.read_clip``.
    """
    part = "ref_mel: clip"
    expected = f"a mean difference of at most {CLIP_TOLERANCE:g} from the sound"
    ref_mel = voice.ref_mel[0]
    # one frame more at most: whoever cuts a sound may round up
    if ref_mel.shape[1] != mel.shape[1] or len(ref_mel) > len(mel) + 1:
        return Finding(voice.name, part, f"{list(ref_mel.shape)}, and the sound has {list(mel.shape)}", expected, False)
    count = min(len(ref_mel), len(mel))
    difference = ref_mel[:count] - mel[:count]
    mean = float(np.abs(difference).mean())
    # the same sound at another loudness differs by one number
    loudness = float(np.median(difference))
    found = f"a mean difference of {mean:.3f}, of which {loudness:+.3f} is loudness"
    return Finding(voice.name, part, found, expected, mean <= CLIP_TOLERANCE)


def check_all(
    voices: Mapping[str, Voice], config: OmniConfig, clips: Mapping[str, Float[np.ndarray, "frames 80"]]
) -> list[Finding]:
    """The findings of all voices, in their order.

    Args:
      voices: by name.
      config: of the model.
      clips: mels of the sounds that some of them are said to be made from, by the voice's name.
    """
    findings = []
    for name, voice in voices.items():
        findings += check_recipe(voice, config)
        if name in clips:
            findings.append(compare_clip(voice, clips[name]))
    return findings

"""What a row says of the speech of its last message: ``{"messages": [...], "speech": {...}}``.

``speech`` has

* ``codec_ids``: the codes of the last message, which is the assistant's, 50 a second, without an end;
* ``voice``: the name of the voice that speaks; nobody's without it;
* ``codec``: the fingerprint of the codec that made the codes;
* ``ref``: ``{"codec_ids": [...], "text": ...}``, a clip that gives the voice, and what is said in it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Int

from omni_jax.checks import check_int, shown
from omni_jax.errors import InputError, WrongCodecError

_KEYS = ("codec_ids", "voice", "codec", "ref")
_CLIP_KEYS = ("codec_ids", "text")


@dataclass(frozen=True)
class Clip:
    """A clip that gives a voice.

    Attributes:
      codes: of its sound.
      text: what is said in it.
    """

    codes: Int[np.ndarray, " J"]
    text: str


@dataclass(frozen=True)
class Speech:
    """What is spoken, and by whom.

    Attributes:
      codes: of the message.
      voice: name of a voice of the checkpoint or of the run; None: nobody's.
      clip: that gives the voice, if one does.
    """

    codes: Int[np.ndarray, " K"]
    voice: str | None
    clip: Clip | None


def read_speech(values: Mapping[str, Any], last_code: int, codec: str | None) -> Speech:
    """The speech of a row.

    Args:
      values: of the row.
      last_code: the largest code that there is.
      codec: fingerprint of the codec of the run; None: rows may have any.

    Raises:
      InputError: if it has none, or one that is not what it should be.
      WrongCodecError: if its codes are another codec's.
    """
    speech = _check_keys("speech", values.get("speech"), _KEYS)
    if codec is not None and speech.get("codec") != codec:
        raise WrongCodecError(
            f"speech.codec is {shown(speech.get('codec'))}, and the codec of this run is {codec!r} (objective.codec); "
            "codes of another codec stand for other sounds"
        )
    voice = speech.get("voice")
    if voice is not None and not isinstance(voice, str):
        raise InputError(f"speech.voice is {shown(voice)}; it must be the name of a voice")
    clip = None
    if "ref" in speech:
        ref = _check_keys("speech.ref", speech["ref"], _CLIP_KEYS)
        if not isinstance(ref.get("text"), str):
            raise InputError(f"speech.ref.text is {shown(ref.get('text'))}; it must be what is said in the clip")
        clip = Clip(_read_codes("speech.ref.codec_ids", ref.get("codec_ids"), last_code), ref["text"])
    return Speech(_read_codes("speech.codec_ids", speech.get("codec_ids"), last_code), voice, clip)


def _check_keys(where: str, values: Any, known: tuple[str, ...]) -> Mapping[str, Any]:
    """An object with no other keys than these."""
    names = ", ".join(known)
    if not isinstance(values, Mapping):
        raise InputError(f"{where} is {shown(values)}; it must be an object with {names}")
    unknown = sorted(set(values) - set(known))
    if unknown:
        raise InputError(f"{where} has the unknown keys {', '.join(map(shown, unknown))}; it has {names}")
    return values


def _read_codes(where: str, codes: Any, last_code: int) -> Int[np.ndarray, " K"]:
    if not isinstance(codes, list) or not codes:
        raise InputError(f"{where} is {shown(codes)}; it must be a list of codes, 50 a second")
    checked = [check_int(f"a code of {where}", code, 0, last_code) for code in codes]
    return np.array(checked, np.int32)

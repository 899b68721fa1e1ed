"""What a row says of the speech of its last message: ``{"messages": [...], "speech": {...}}``.

``speech`` has

* ``codec_ids``: the codes of the last message, which is the assistant's, 50 a second, without an end;
* ``voice``: the name of the voice that speaks; nobody's without it;
* ``codec``: the fingerprint of the codec that made the codes;
* ``ref``: ``{"codec_ids": [...], "text": ...}``, a clip that gives the voice, and what is said in it.

In place of ``codec_ids`` a preference pair has two answers, each with ``codec_ids`` and whatever else was found out
about it: ``chosen`` and ``rejected``. What the reference makes of them is beside: ``reference``, with the fingerprint
of the model and the log-probability of each answer (``tools/score_pairs.py``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from omni_jax.checks import check_float, check_int, shown
from omni_jax.data.speech_examples import check_codec
from omni_jax.errors import InputError, WrongReferenceError

ANSWERS = ("chosen", "rejected")
_SHARED_KEYS = ("voice", "codec", "ref")
_CLIP_KEYS = ("codec_ids", "text")
_MAX_LOG_PROB = 1e9  # magnitude of that of an answer


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
      answers: codes of the message; of a pair those of the better answer, then those of the other.
      voice: name of a voice of the checkpoint or of the run; None: nobody's.
      clip: that gives the voice, if one does.
    """

    answers: tuple[Int[np.ndarray, " K"], ...]
    voice: str | None
    clip: Clip | None


@dataclass(frozen=True)
class SpeechReader:
    """Reads ``speech`` of rows.

    Attributes:
      last_code: the largest code that there is.
      codec: fingerprint of the codec of the run; None: rows may have any.
    """

    last_code: int
    codec: str | None = None

    def read(self, values: Mapping[str, Any]) -> Speech:
        """The speech of a row.

        Raises:
          InputError: if it has none, or one that is not what it should be.
          WrongCodecError: if its codes are another codec's.
        """
        speech = _check_keys("speech", values.get("speech"), ("codec_ids", *_SHARED_KEYS))
        return self._read_shared(speech, (self._read_codes("speech", speech),))

    def read_pair(self, values: Mapping[str, Any], max_length_gap: float) -> Speech:
        """The two answers of a row.

        Args:
          values: of the row.
          max_length_gap: how many more codes the longer one may have, as a share of the shorter one's.

        Raises:
          InputError, WrongCodecError: as ``read``; or if the answers differ too much in length, or not at all.
        """
        speech = _check_keys("speech", values.get("speech"), (*ANSWERS, *_SHARED_KEYS, "reference"))
        answers = []
        for name in ANSWERS:
            if not isinstance(speech.get(name), Mapping):
                raise InputError(f"speech.{name} is {shown(speech.get(name))}; it must be an object with codec_ids")
            answers.append(self._read_codes(f"speech.{name}", speech[name]))
        if np.array_equal(*answers):
            raise InputError("speech.chosen and speech.rejected have the same codes")
        # log-probabilities are sums, so a pair of very unequal lengths would teach lengths
        shorter, longer = sorted(map(len, answers))
        if longer > (1 + max_length_gap) * shorter:
            raise InputError(
                f"its answers have {shorter} and {longer} codes, which is more apart than objective.max_length_gap "
                f"{max_length_gap:g} allows"
            )
        return self._read_shared(speech, tuple(answers))

    def _read_shared(self, speech: Mapping[str, Any], answers: tuple[Int[np.ndarray, " K"], ...]) -> Speech:
        check_codec("speech.codec", speech, self.codec)
        voice = speech.get("voice")
        if voice is not None and not isinstance(voice, str):
            raise InputError(f"speech.voice is {shown(voice)}; it must be the name of a voice")
        if "ref" not in speech:
            return Speech(answers, voice, None)
        ref = _check_keys("speech.ref", speech["ref"], _CLIP_KEYS)
        if not isinstance(ref.get("text"), str):
            raise InputError(f"speech.ref.text is {shown(ref.get('text'))}; it must be what is said in the clip")
        return Speech(answers, voice, Clip(self._read_codes("speech.ref", ref), ref["text"]))

    def _read_codes(self, where: str, values: Mapping[str, Any]) -> Int[np.ndarray, " K"]:
        codes = values.get("codec_ids")
        if not isinstance(codes, list) or not codes:
            raise InputError(f"{where}.codec_ids is {shown(codes)}; it must be a list of codes, 50 a second")
        checked = [check_int(f"a code of {where}.codec_ids", code, 0, self.last_code) for code in codes]
        return np.array(checked, np.int32)


def read_reference(values: Mapping[str, Any], fingerprint: str) -> Float[np.ndarray, "2"]:
    """Log-probabilities of the two answers of a pair.

    Args:
      values: of the row, whose answers have been read.
      fingerprint: of the model that they must be of.

    Raises:
      InputError: if they are no log-probabilities.
      WrongReferenceError: if there are none, or they are another model's.
    """
    reference = values["speech"].get("reference")
    if not isinstance(reference, Mapping):
        raise WrongReferenceError(
            f"speech.reference is {shown(reference)}; tools/score_pairs.py writes the reference's log-probabilities"
        )
    if reference.get("model") != fingerprint:
        raise WrongReferenceError(
            f"speech.reference is of the model {shown(reference.get('model'))}, and this run started from "
            f"{fingerprint!r}; have tools/score_pairs.py score the pairs with that one"
        )
    found = []
    for name in ANSWERS:
        found.append(check_float(f"speech.reference.{name}", reference.get(name), -_MAX_LOG_PROB, 0))
    return np.array(found, np.float32)


def _check_keys(where: str, values: Any, known: tuple[str, ...]) -> Mapping[str, Any]:
    """An object with no other keys than these."""
    names = ", ".join(known)
    if not isinstance(values, Mapping):
        raise InputError(f"{where} is {shown(values)}; it must be an object with {names}")
    unknown = sorted(set(values) - set(known))
    if unknown:
        raise InputError(f"{where} has the unknown keys {', '.join(map(shown, unknown))}; it has {names}")
    return values

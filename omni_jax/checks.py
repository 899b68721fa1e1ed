"""Checks of what callers and files give: each names the field, the value and the limit."""

from __future__ import annotations

import numbers
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from omni_jax.errors import InputError

INT32_MAX = 2**31 - 1
SEED_MAX = 2**32 - 1  # seeds are unsigned numbers of 32 bits
_MAX_MESSAGE = 2000  # characters of an error that strangers are told
# all but tabs and line breaks: the others move the cursor, and begin what a terminal takes for commands
_CONTROL_CHARACTER = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")

# A URL within a text: scheme and slashes, user and password, host and path, query and fragment. A scheme is short, so
# that no text takes long to search.
_URL = re.compile(r"(?i)(https?:/*|\b[a-z][a-z0-9+.-]{0,15}:/+)([^\s/?#'\"]*@)?([^\s?#'\"]*)([?#][^\s'\"]*)?")
_INNER_USER = re.compile(r"//[^\s/?#'\"]*@")  # of a URL in the path of another, as proxies and archives have it


def check_int(name: str, value: Any, low: int, high: int = INT32_MAX, hint: str = "") -> int:
    """A whole number from ``low`` to ``high``.

    Args:
      name: of the field, for the error.
      value: what was given; a bool, a float or a string is refused, whatever its value.
      low, high: the limits, both allowed.
      hint: what a special value means, for the error; for instance "0: all tokens".

    Raises:
      InputError: for anything else.
    """
    # numpy's integers are Integral, too; so is a bool, which is a mistake where a number is asked for
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise InputError(f"{name} is {shown(value)}; it must be a whole number{_limits(low, high, hint)}")
    # a plain int from here on, which JSON and jitted functions take
    number = int(value)
    if not low <= number <= high:
        raise InputError(f"{name} is {shown(value)}; it must be{_limits(low, high, hint)}")
    return number


def check_float(name: str, value: Any, low: float, high: float, *, above: bool = False, hint: str = "") -> float:
    """A finite number from ``low`` to ``high``, which float32 can hold.

    Args:
      name: of the field, for the error.
      value: what was given.
      low, high: the limits, both allowed.
      above: whether ``low`` itself is refused.
      hint: what a special value means, for the error.

    Raises:
      InputError: for anything else.
    """
    wanted = f"{'above' if above else 'at least'} {low:g} and at most {high:g}{f' ({hint})' if hint else ''}"
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise InputError(f"{name} is {shown(value)}; it must be a number {wanted}")
    try:
        number = float(value)
    except OverflowError:  # a whole number of hundreds of digits
        number = float("inf")
    # as float32, for that is how it is computed with: a tiny number may become 0 there
    with np.errstate(over="ignore"):
        rounded = float(np.float32(number))
    # asked in this way, NaN is refused: it is neither over a limit nor under it
    if not (low < rounded if above else low <= rounded) or not rounded <= high:
        raise InputError(f"{name} is {shown(value)}; it must be {wanted}")
    return number


def check_names(what: str, given: Mapping[str, Any], known: Sequence[str]) -> None:
    """Whether all names of keyword arguments are known.

    Raises:
      InputError: naming those that are not, and those that are.
    """
    unknown = sorted(str(name) for name in given if name not in known)
    if unknown:
        raise InputError(f"unknown {what} {', '.join(unknown)}; known: {', '.join(known)}")


def shown(value: Any) -> str:
    """A value as an error shows it: its repr, cut to a length that fits a line."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # int of over 4,300 digits; a list in itself
        text = f"a {type(value).__name__} too large to show"
    if len(text) > 80:
        return f"{redact(text)[:60]}... ({len(text)} characters)"
    return redact(text)


def redact(text: str) -> str:
    """A text as errors, results and logs may hold it: of the URLs in it, what signs them in is left out.

    That is the name and the password of a user, the query, where buckets put signatures, and the fragment.
    """
    return _URL.sub(_without_secrets, text)


def short_message(text: str) -> str:
    """An error for strangers: without what signs URLs, and cut where it quotes all that it was given."""
    text = redact(text)
    return text if len(text) <= _MAX_MESSAGE else f"{text[:_MAX_MESSAGE]}... ({len(text)} characters)"


def _without_secrets(url: re.Match[str]) -> str:
    scheme, user, place, query = url.groups()
    place = _INNER_USER.sub("//...@", place)
    return f"{scheme}{'...@' if user else ''}{place}{f'{query[0]}...' if query else ''}"


def printable(text: str) -> str:
    """A text for a terminal: control characters, which files and requests may hold, are written as escapes."""
    return _CONTROL_CHARACTER.sub(lambda match: ascii(match[0])[1:-1], text)


def _limits(low: int, high: int, hint: str) -> str:
    return f" from {low} to {high}{f' ({hint})' if hint else ''}"

"""Objects of JSON that strangers send."""

from __future__ import annotations

import json
from typing import Any, NoReturn

from omni_jax.errors import InputError


def parse_object(data: str | bytes, where: str) -> dict[str, Any]:
    """An object of JSON.

    Raises:
      InputError: for anything else, naming ``where``.
    """
    # Python's json takes NaN and Infinity, which are no JSON and no numbers that anything could be set to
    try:
        text = data if isinstance(data, str) else data.decode()
        values = json.loads(text, parse_constant=_refuse_constant)
    except UnicodeDecodeError as e:
        raise InputError(f"{where} is not UTF-8: {e}") from e
    except RecursionError as e:
        raise InputError(f"{where} is nested too deeply") from e
    except ValueError as e:
        raise InputError(f"{where} is not JSON: {e}") from e
    if not isinstance(values, dict):
        raise InputError(f"{where} must be an object, got {type(values).__name__}")
    return values


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")

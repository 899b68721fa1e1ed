"""The sound that a row names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Float

from omni_jax.data.sources import Row
from omni_jax.errors import InputError
from omni_jax.processing.audio import MelSettings
from omni_jax.processing.fetch import RemoteAccess, fetch_source
from omni_jax.processing.files import folder_of
from omni_jax.processing.media import read_audio
from omni_jax.processing.sources import confine_source, describe_source


def read_sound(
    row: Row, values: Mapping[str, Any], key: str, rate: int, access: RemoteAccess, media_root: str | None
) -> Float[np.ndarray, " n"]:
    """Samples of the sound under a key of a row, mono, at a rate.

    Args:
      row: it.
      values: of the row.
      key: where the sound is named.
      rate: Hz.
      access: from where sound may be fetched.
      media_root: the folder that it must lie within; None: that of the row's file.

    Raises:
      InputError: if it cannot be read, or lies elsewhere.
    """
    source = values.get(key)
    # rows are published by strangers, and must not name what only this machine's user may read
    option = "data.media_root (--data.media-root)"
    try:
        confined = confine_source(source, folder_of(row.file), media_root or folder_of(row.file), option)
        return read_audio(fetch_source(confined, access), MelSettings(sampling_rate=rate))
    except InputError as e:
        raise InputError(f"{key} {describe_source(source)}: {e}") from e

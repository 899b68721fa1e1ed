"""Files of rows as tools make them of others: the values of all rows, and back as JSON lines."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omni_jax.data.rows import row_values
from omni_jax.data.sources import open_rows
from omni_jax.plain_files import replace_file


def read_values(path: Path) -> list[dict[str, Any]]:
    """The values of all rows of a file."""
    return [row_values(row) for row in open_rows(str(path))]


def write_values(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    """Writes rows as JSON lines, and returns the file."""
    replace_file(path, "".join(json.dumps(values) + "\n" for values in rows).encode())
    return path

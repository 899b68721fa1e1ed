"""Folders as strangers make them."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

# JSON that is nested deeper than a parser of it, or what reads it, can call itself
DEEP = "[" * 100_000
DEEP_OBJECT = '{"a":' * 900 + "1" + "}" * 900


def edit_json(path: Path, **changes: Any) -> None:
    """Changes values of a JSON object in a file."""
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def make_hub_cache(folder: Path, cache: Path) -> Path:
    """Puts a folder into a cache as the Hugging Face Hub lays it out: every file is a link to its contents."""
    snapshot = cache / "models--someone--model" / "snapshots" / "0123abcd"
    blobs = cache / "models--someone--model" / "blobs"
    blobs.mkdir(parents=True)
    for number, file in enumerate(sorted(path for path in folder.rglob("*") if path.is_file())):
        link = snapshot / file.relative_to(folder)
        link.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, blobs / f"{number:040x}")
        link.symlink_to(os.path.relpath(blobs / f"{number:040x}", link.parent))
    return snapshot

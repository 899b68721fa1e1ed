"""A bucket that lives in memory, in place of what gcsfs reaches."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module

import pytest
from fsspec.implementations.memory import MemoryFileSystem


class Bucket(MemoryFileSystem):
    protocol = "gs"
    store = {}
    pseudo_dirs = [""]

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return "/" + path.removeprefix("gs://").strip("/")


@pytest.fixture
def gs(monkeypatch: pytest.MonkeyPatch) -> Iterator[Bucket]:
    """Stands in for gcsfs."""
    monkeypatch.setitem(import_module("fsspec.registry")._registry, "gs", Bucket)
    bucket = Bucket()
    yield bucket
    bucket.store.clear()

"""Arrays of strangers' checkpoints: metadata that ask for memory which the model has no use for."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from omni_jax.checkpoint import store
from omni_jax.errors import CheckpointError
from tests.security.folders import DEEP, DEEP_OBJECT, edit_json


# Orbax leaves its reads of a damaged folder unfinished, and Python says so when it collects them
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
class TestArrays:
    """What the metadata of arrays ask for is compared with the model's sizes before anything of it is allocated."""

    # of the tiny model: [640, 48], in one chunk
    ARRAY = "thinker/state/decoder.embed.embedding"
    PLAIN = [{"name": "bytes", "configuration": {"endian": "little"}}]
    HUGE = [2**24, 2**20]

    @staticmethod
    def grid(shape: Any) -> Any:
        return {"name": "regular", "configuration": {"chunk_shape": shape}}

    @classmethod
    def shards(cls, shape: Any, codecs: Any = None, index: Any = None) -> Any:
        options = {"chunk_shape": shape, "codecs": codecs or cls.PLAIN, "index_codecs": index or cls.PLAIN}
        return [{"name": "sharding_indexed", "configuration": options}]

    @pytest.fixture
    def array(self, model: Path) -> Path:
        return model / "params" / self.ARRAY

    @pytest.mark.parametrize(
        ("changes", "told"),
        [
            (lambda t: {"chunk_grid": t.grid(t.HUGE), "codecs": t.PLAIN}, "chunk_shape is 16777216; it must be from 1"),
            (lambda t: {"chunk_grid": t.grid(t.HUGE), "codecs": t.shards(t.HUGE)}, "chunk_shape is 16777216"),
            (lambda t: {"codecs": t.shards(t.HUGE)}, "chunk_shape is 16777216; it must be from 1 to 640"),
            (lambda t: {"chunk_grid": t.grid([0, 48])}, "chunk_shape is 0"),
            (lambda t: {"chunk_grid": t.grid([-1, 48])}, "chunk_shape is -1"),
            (lambda t: {"chunk_grid": t.grid([640.0, 48])}, "must be a whole number"),
            (lambda t: {"chunk_grid": t.grid([640])}, "it must have 2 lengths"),
            (lambda t: {"chunk_grid": t.grid(None)}, "must be a list"),
            (lambda t: {"chunk_grid": {"name": "rectangular"}}, "it must be a regular one"),
            (lambda t: {"shape": t.HUGE, "chunk_grid": t.grid([1, 1])}, "chunks; there may be 65536"),
            (lambda t: {"shape": t.HUGE, "chunk_grid": t.grid(t.HUGE), "codecs": t.shards([1, 1])}, "may be 65536"),
            (lambda t: {"shape": t.HUGE, "chunk_grid": t.grid(t.HUGE), "codecs": t.PLAIN}, "1 of another shape"),
            (lambda t: {"shape": [640, 2**50]}, "shape is 1125899906842624"),
            (lambda t: {"shape": [640, -48]}, "shape is -48"),
            (lambda t: {"shape": "640"}, "must be a list"),
            (lambda t: {"data_type": "float64"}, "data_type is 'float64'; known"),
            (lambda t: {"data_type": {"name": "struct"}}, "data_type is"),
            (lambda t: {"zarr_format": 2}, "no array of zarr 3"),
            (lambda t: {"node_type": "group"}, "no array of zarr 3"),
            (lambda t: {"kvstore": "file:///etc"}, "no array of zarr 3"),
            (lambda t: {"codecs": [*t.PLAIN, {"name": "blosc"}]}, "'blosc' is no codec that is known"),
            (lambda t: {"codecs": t.shards([1, 48], index=t.shards([1, 1]))}, "'sharding_indexed' is no codec"),
            (lambda t: {"codecs": t.shards([1, 48], codecs=t.shards([1, 1]))}, "'sharding_indexed' is no codec"),
            (lambda t: {"codecs": []}, "codecs is"),
            (lambda t: {"codecs": [1]}, "no codec"),
            (lambda t: {"codecs": [{"name": "zstd", "configuration": 1}]}, "no codec"),
        ],
    )  # fmt: skip
    def test_metadata_that_ask_for_what_is_not_there(self, model: Path, array: Path, changes: Any, told: str) -> None:
        edit_json(array / "zarr.json", **changes(self))
        for use in (store.abstract, store.load):
            with pytest.raises(CheckpointError, match=told):
                use(model)

    def test_it_ends_no_process(self, model: Path, array: Path) -> None:
        """Memory for a chunk of 64 TiB cannot be had, and tensorstore ends the process then."""
        edit_json(array / "zarr.json", chunk_grid=self.grid(self.HUGE), codecs=self.PLAIN)
        code = (
            "import sys; from pathlib import Path; from omni_jax.checkpoint import store\n"
            "try: store.load(Path(sys.argv[1]), ['thinker'])\n"
            "except store.CheckpointError: print('an error of ours')"
        )
        done = subprocess.run([sys.executable, "-c", code, str(model)], capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout) == (0, "an error of ours\n"), done.stderr

    def test_files_that_are_larger_than_their_chunks(self, model: Path, array: Path) -> None:
        (chunk,) = (path for path in (array / "c").rglob("*") if path.is_file())
        with chunk.open("r+b") as file:
            file.truncate(2**42)
        with pytest.raises(CheckpointError, match=r"has 4,398,046,511,104 bytes; for this array it may have 2,220,032"):
            store.load(model)

    @pytest.mark.parametrize("name", ["manifest.ocdbt", ".zarray"])
    def test_other_layouts(self, model: Path, array: Path, name: str) -> None:
        """Orbax would read these in place of what has been checked."""
        for folder in (array, array.parent):
            (folder / name).write_bytes(b"")
            with pytest.raises(CheckpointError, match=rf"{name} is of a layout that is not read"):
                store.load(model)
            (folder / name).unlink()

    def test_two_arrays_of_one_name(self, model: Path, array: Path) -> None:
        shutil.copytree(array, array.parent.with_name("other") / array.name)
        with pytest.raises(CheckpointError, match="there is another array of this name"):
            store.load(model)

    @pytest.mark.parametrize("data", [DEEP.encode(), DEEP_OBJECT.encode(), b"\xff", b"[]", b"1" * 5000])
    def test_what_is_no_metadata(self, model: Path, array: Path, data: bytes) -> None:
        for path in (array / "zarr.json", array.parent / "_METADATA", array.parent.parent / "_CHECKPOINT_METADATA"):
            before = path.read_bytes()
            path.write_bytes(data)
            with pytest.raises(CheckpointError, match=path.name):
                store.load(model)
            path.write_bytes(before)

    def test_what_orbax_writes_is_read(self, model: Path, array: Path) -> None:
        assert json.loads((array / "zarr.json").read_text())["codecs"][0]["name"] == "sharding_indexed"
        edit_json(array / "zarr.json", attributes={})
        assert set(store.load(model)) == {"thinker", "talker", "token2wav"}

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from orbax.checkpoint import v1 as ocp

from omni_jax.checkpoint import store
from omni_jax.checkpoint.name_map import make_name_table
from omni_jax.config import OmniConfig
from omni_jax.errors import CheckpointError

TINY = OmniConfig.tiny()
ROOT = Path(__file__).parents[2]


def test_large_leaves_are_written_in_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "_CHUNK_BYTES", 2**20)
    monkeypatch.setattr(store, "_BLOCK_BYTES", 2 * 2**20)
    rng = np.random.default_rng(0)
    arrays = {
        ("thinker", "stack"): rng.standard_normal((6, 700, 512), dtype=np.float32),
        ("thinker", "rows"): rng.standard_normal((4096, 300), dtype=np.float32),
        ("thinker", "columns"): rng.standard_normal((300, 4096), dtype=np.float32).T.copy().T,
        ("thinker", "small"): rng.standard_normal((6, 3), dtype=np.float32),
    }

    def leaf(path, x):
        stacked = len(x) == 6
        return store.Leaf(path, x.shape, x.dtype, stacked, lambda: iter(x) if stacked else iter([x]))

    arrays["thinker", "zeros"] = np.zeros((6, 700, 512), np.float32)  # tensorstore leaves them out, unless told not to
    store.save(tmp_path / "out", [leaf(path, x) for path, x in arrays.items()])
    read = ocp.load(str(tmp_path / "out" / "params" / "thinker"))  # an ordinary checkpoint of Orbax
    for path, x in arrays.items():
        np.testing.assert_array_equal(read[path[1]], x)
    chunks = tmp_path / "out" / "params" / "thinker"
    assert len([f for f in chunks.glob("*/stack/c/**/*") if f.is_file()]) == 12  # two to each layer
    assert len([f for f in chunks.glob("*/small/c/**/*") if f.is_file()]) == 1


def test_abstract_has_the_shapes_of_the_table(tiny_model: Path) -> None:
    tree = flatten_dict(store.abstract(tiny_model, dtype="bfloat16"))
    assert {path: x.shape for path, x in tree.items()} == {e.path: e.leaf_shape for e in make_name_table(TINY)}
    assert {str(x.dtype) for path, x in tree.items() if path[0] == "thinker"} == {"bfloat16"}


# Orbax leaves its reads of a damaged folder unfinished, and Python says so when it collects them
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
class TestDamage:
    @pytest.fixture
    def folder(self, tiny_model: Path, tmp_path: Path) -> Path:
        return Path(shutil.copytree(tiny_model, tmp_path / "copy"))

    def test_nothing_there(self, tmp_path: Path) -> None:
        with pytest.raises(CheckpointError, match=r"no checkpoint of omni_jax[\s\S]*tools/convert.py to-jax"):
            store.load(tmp_path / "nowhere")

    def test_no_config(self, folder: Path) -> None:
        (folder / "config.json").unlink()
        with pytest.raises(CheckpointError, match=r"is incomplete[\s\S]*config.json"):
            store.load(folder)

    def test_no_component(self, folder: Path) -> None:
        shutil.rmtree(folder / "params" / "talker")
        with pytest.raises(CheckpointError, match=r"params/talker is missing or damaged"):
            store.load(folder)
        assert list(store.load(folder, ["thinker"])) == ["thinker"]

    def test_no_leaf(self, folder: Path) -> None:
        (leaf,) = folder.glob("params/thinker/*/decoder.norm.scale")
        shutil.rmtree(leaf)
        with pytest.raises(CheckpointError, match="params/thinker"):
            store.load(folder)

    def test_no_numbers(self, folder: Path) -> None:
        (leaf,) = folder.glob("params/thinker/*/decoder.norm.scale/c")
        shutil.rmtree(leaf)
        with pytest.raises(CheckpointError, match="params/thinker"):
            store.load(folder)

    def test_another_config(self, folder: Path) -> None:
        OmniConfig.tiny(talker_config=type(TINY.talker_config).tiny(vocab_size=97)).save(folder)
        with pytest.raises(CheckpointError, match=r"2 of another shape[\s\S]*config.json makes it \[97, 48\]"):
            store.load(folder)

    def test_another_format(self, folder: Path) -> None:
        (folder / "omni_jax.json").write_text('{"format": 99, "components": {}}')
        with pytest.raises(CheckpointError, match="of format 99; this release reads 1"):
            store.load(folder)
        (folder / "omni_jax.json").write_text("{}")
        with pytest.raises(CheckpointError, match="damaged"):
            store.load(folder)


def in_a_process(code: str, *arguments: object, **environment: str) -> str:
    """Runs code in a process of its own: what it prints."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", **environment}
    command = [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_restoring_into_shards(tiny_model: Path) -> None:
    code = """
        import sys
        from pathlib import Path
        import jax, numpy as np
        from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
        from omni_jax.checkpoint import store

        folder = Path(sys.argv[1])
        mesh = jax.make_mesh((4,), ("fsdp",), axis_types=(AxisType.Auto,))

        def place(x):
            axes = ["fsdp" if n % 4 == 0 else None for n in x.shape]
            axes = [a if a not in axes[:i] else None for i, a in enumerate(axes)]
            return NamedSharding(mesh, P(*axes))

        shardings = jax.tree.map(place, store.abstract(folder))
        params = store.load(folder, shardings=shardings)
        whole = store.load(folder)
        replicated = store.load(folder, shardings=NamedSharding(mesh, P()))
        for a, b, c, s in zip(*map(jax.tree.leaves, (params, whole, replicated, shardings)), strict=True):
            assert a.sharding == s and len(c.sharding.device_set) == 4
            np.testing.assert_array_equal(a, b)
            np.testing.assert_array_equal(a, c)
        kernel = params["thinker"]["decoder"]["head"]["kernel"]
        print({s.data.shape for s in kernel.addressable_shards})
    """
    printed = in_a_process(code, tiny_model, XLA_FLAGS="--xla_force_host_platform_device_count=4")
    assert printed.strip() == "{(12, 640)}"

from __future__ import annotations

import dataclasses
import filecmp
import json
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from omni_jax.checkpoint import convert, model_files, pytorch, store
from omni_jax.checkpoint.name_map import make_name_table, parameter_count
from omni_jax.checkpoint.pytorch import read_headers, read_layers
from omni_jax.config import OmniConfig
from omni_jax.errors import CheckpointError, ConfigError
from tools import convert as command
from tools.make_checkpoint import write_checkpoint

TINY = OmniConfig.tiny()
TOOL = Path(__file__).parents[2] / "tools" / "convert.py"


def bits(x) -> np.ndarray:
    return np.ascontiguousarray(x).view(np.uint8)


def assert_equals_files(params, source: Path) -> None:
    """Every leaf has the bits of the published tensors it is made of."""
    tensors = read_headers(source)
    leaves = flatten_dict(params)
    entries = make_name_table(TINY, params)
    assert set(leaves) == {e.path for e in entries}
    for entry in entries:
        expected = np.stack(list(read_layers(entry, tensors)))
        np.testing.assert_array_equal(bits(leaves[entry.path]), bits(expected if entry.stacked else expected[0]))


def test_every_number_arrives(tiny_model: Path, tiny_checkpoint: Path) -> None:
    params = store.load(tiny_model)
    assert_equals_files(params, tiny_checkpoint)
    assert sum(x.size for x in jax.tree.leaves(params)) == parameter_count(TINY)


def test_bfloat16_arrives_bit_by_bit(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "torch", TINY, seed=1, shard_bytes=250_000)
    convert.to_jax(tmp_path / "torch", tmp_path / "jax")
    params = store.load(tmp_path / "jax")
    assert params["thinker"]["decoder"]["embed"]["embedding"].dtype == ml_dtypes.bfloat16
    assert params["token2wav"]["dit"]["proj"]["kernel"].dtype == np.float32
    assert_equals_files(params, tmp_path / "torch")
    kinds = {"thinker": ["bfloat16"], "talker": ["bfloat16"], "token2wav": ["float32"]}
    assert store.components(tmp_path / "jax") == kinds


def test_casting_leaves_token2wav_alone(tiny_model: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    convert.to_jax(tiny_checkpoint, tmp_path / "cast", dtype="bfloat16")
    kinds = {"thinker": "bfloat16", "talker": "bfloat16", "token2wav": "float32"}
    # cast by the conversion, and by loading: one component of each kind, since each array shape is compiled
    for params in (store.load(tmp_path / "cast"), store.load(tiny_model, ["talker", "token2wav"], dtype="bfloat16")):
        for component, tree in params.items():
            assert {str(x.dtype) for x in jax.tree.leaves(tree)} == {kinds[component]}
    exact = store.load(tiny_model, ["thinker"])["thinker"]["decoder"]["norm"]["scale"]
    cast = store.load(tmp_path / "cast", ["thinker"])["thinker"]["decoder"]["norm"]["scale"]
    np.testing.assert_array_equal(np.asarray(exact).astype(ml_dtypes.bfloat16), np.asarray(cast))


def test_components_can_be_taken_alone(tiny_model: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    done = convert.to_jax(tiny_checkpoint, tmp_path / "thinker", components=["thinker"])
    assert done.components == ("thinker",)
    assert done.nbytes == 4 * parameter_count(TINY, ("thinker",))
    assert list(store.load(tmp_path / "thinker")) == ["thinker"]
    assert_equals_files(store.load(tiny_model, ["thinker"]), tiny_checkpoint)
    with pytest.raises(CheckpointError, match="has no talker; it has thinker"):
        store.load(tmp_path / "thinker", ["thinker", "talker"])


def test_the_files_of_the_model_come_along(tiny_model: Path, tiny_checkpoint: Path) -> None:
    for name in ("config.json", "tokenizer.json", "preprocessor_config.json", "chat_template.json", "vocab.json"):
        assert (tiny_model / name).read_bytes() == (tiny_checkpoint / name).read_bytes()
    assert not (tiny_model / "model.safetensors").exists()


def test_progress_counts_every_tensor(tiny_checkpoint: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    done = convert.to_jax(tiny_checkpoint, tmp_path / "out", components=["thinker"], progress=lambda *n: seen.append(n))
    assert seen == [(i + 1, done.tensors) for i in range(done.tensors)]
    assert done.tensors == sum(len(entry.names) for entry in make_name_table(TINY, ["thinker"]))


def test_an_existing_target_is_refused_and_kept(tiny_checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="exists already"):
        convert.to_jax(tiny_checkpoint, tmp_path / "out")
    assert [p.name for p in tmp_path.rglob("*")] == ["out", "mine.txt"]


@pytest.mark.parametrize("name", model_files.REQUIRED_FILES)
def test_a_missing_file_is_told_before_work_begins(tiny_checkpoint: Path, tmp_path: Path, name: str) -> None:
    source = Path(shutil.copytree(tiny_checkpoint, tmp_path / "source"))
    (source / name).unlink()
    with pytest.raises(CheckpointError, match=f"has no {name}"):
        convert.to_jax(source, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["source"]


def test_a_failure_in_the_middle_leaves_nothing(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = 0

    def fails(entry, tensors):
        nonlocal calls
        calls += 1
        if calls == 40:
            assert any(tmp_path.iterdir())  # it was under way
            raise OSError("no space left on device")
        return read_layers(entry, tensors)

    monkeypatch.setattr(pytorch, "read_layers", fails)
    with pytest.raises(OSError, match="no space"):
        convert.to_jax(tiny_checkpoint, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_config_of_another_model_is_told(tiny_checkpoint: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(tiny_checkpoint, tmp_path / "source"))
    config = json.loads((source / "config.json").read_text())
    config["thinker_config"]["text_config"]["num_hidden_layers"] = 3
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"12 missing:[\s\S]*thinker\.model\.layers\.2\."):
        convert.to_jax(source, tmp_path / "out")
    config["thinker_config"]["text_config"]["num_hidden_leyers"] = 2
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="num_hidden_leyers"):
        convert.to_jax(source, tmp_path / "out")


def fail_command(*arguments: object) -> str | int | None:
    """What the command exits with, in this process: a message, or tyro's 2 for a wrong command line."""
    with pytest.raises(SystemExit) as e:
        command.main(list(map(str, arguments)))
    return e.value.code


def test_the_command_tells_what_is_wrong_in_one_line(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told = str(fail_command("to-jax", tiny_model, tmp_path / "out", "--components", "thinker"))
    assert told.startswith(f"error: {tiny_model} holds neither model.safetensors nor")
    assert len(told.splitlines()) == 1 and not capsys.readouterr().out.strip()
    assert list(tmp_path.iterdir()) == []
    told = fail_command("to-jax", tiny_model, tmp_path / "out", "--verify", "--components", "talker")
    assert "--verify compares the Thinker" in str(told)
    assert fail_command("to-jax", tiny_model, tmp_path / "out", "--components", "speaker") == 2
    assert fail_command("to-jax", tiny_model, tmp_path / "out", "--dtyp", "bfloat16") == 2


@pytest.mark.long
def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    parts = TINY.thinker_config
    width = 64
    text = dataclasses.replace(parts.text_config, hidden_size=width, intermediate_size=65536, num_hidden_layers=12)
    audio = dataclasses.replace(parts.audio_config, output_dim=width)
    vision = dataclasses.replace(parts.vision_config, out_hidden_size=width)
    thinker = dataclasses.replace(parts, text_config=text, audio_config=audio, vision_config=vision)
    talker = dataclasses.replace(TINY.talker_config, embedding_size=width)
    config = OmniConfig.tiny(thinker_config=thinker, talker_config=talker)
    write_checkpoint(tmp_path / "torch", config)
    size = (tmp_path / "torch" / "model.safetensors").stat().st_size
    largest = max(e.size for e in make_name_table(config)) * 2
    assert size > 300e6 and largest > 90e6
    for arguments in (("to-jax", tmp_path / "torch", tmp_path / "jax"), ("to-hf", tmp_path / "jax", tmp_path / "back")):
        # in a process of its own, whose memory is that of the command alone
        done = subprocess.run([sys.executable, TOOL, *arguments], capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr
        peak = int(done.stdout.split("peak host memory ")[1].split()[0].replace(",", ""))
        assert peak < 1.2 * largest + 1e9  # what is promised
        assert (
            peak < 600e6
        )  # what it comes to: Python with its libraries takes 0.25 GB, a block and its copies the rest
    assert filecmp.cmp(tmp_path / "torch" / "model.safetensors", tmp_path / "back" / "model.safetensors", shallow=False)

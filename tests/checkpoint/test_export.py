from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from omni_jax.checkpoint import convert, export, model_files, store, voices
from omni_jax.checkpoint.name_map import make_name_table, optional_constants
from omni_jax.checkpoint.pytorch import INDEX_FILE, SINGLE_FILE, read_headers
from omni_jax.config import OmniConfig
from omni_jax.errors import CheckpointError
from tests.checkpoint.test_convert import fail_command
from tools import convert as command
from tools.make_checkpoint import write_checkpoint

TINY = OmniConfig.tiny()
CONSTANT = "token2wav.code2wav_dit_model.rotary_embed.inv_freq"


def round_trip(source: Path, folder: Path, **options) -> Path:
    convert.to_jax(source, folder / "jax")
    export.to_hf(folder / "jax", folder / "back", **options)
    return folder / "back"


def assert_same_tensors(a: Path, b: Path) -> None:
    """The same names, and for each the same shape, dtype and bits."""
    before, after = read_headers(a), read_headers(b)
    assert after.keys() == before.keys()
    for name, tensor in before.items():
        assert (after[name].shape, after[name].dtype) == (tensor.shape, tensor.dtype), name
        np.testing.assert_array_equal(after[name].read().view(np.uint8), tensor.read().view(np.uint8), name)


def test_a_distilled_dit_does_not_go_back(tiny_model: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_model, tmp_path / "distilled"))
    (folder / "token2wav.json").write_text('{"solver": "euler", "steps": 4, "guidance": false}')
    with pytest.raises(CheckpointError, match=r"was distilled .* the checkpoint that the distillation began from"):
        export.to_hf(folder, tmp_path / "back")
    assert not (tmp_path / "back").exists()


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_what_comes_back_is_what_went_in(tmp_path: Path, dtype) -> None:
    write_checkpoint(tmp_path / "torch", TINY, seed=3, dtype=dtype, shard_bytes=150_000)
    back = round_trip(tmp_path / "torch", tmp_path, shard_bytes=250_000)
    assert_same_tensors(tmp_path / "torch", back)
    kinds = {name.split(".")[0]: str(t.dtype) for name, t in read_headers(back).items()}
    assert kinds == {"thinker": dtype, "talker": dtype, "token2wav": "float32"}
    files = {p.name for p in (tmp_path / "torch").iterdir() if p.suffix != ".safetensors"}
    assert {p.name for p in back.iterdir() if p.suffix != ".safetensors"} == files
    for name in files - {INDEX_FILE}:
        assert (back / name).read_bytes() == (tmp_path / "torch" / name).read_bytes(), name
    index = json.loads((back / INDEX_FILE).read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in read_headers(back).values())
    assert len(set(index["weight_map"].values())) > 3
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def test_any_bits_come_back(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """Zeros, which a store of chunks may leave out, and numbers that are none."""
    source = Path(shutil.copytree(tiny_checkpoint, tmp_path / "torch"))
    tensors = load_file(source / SINGLE_FILE)
    rng = np.random.default_rng(0)
    for i, (name, x) in enumerate(tensors.items()):
        if name.startswith("thinker.model.layers."):  # a stack is of one dtype
            tensors[name] = rng.integers(0, 2**16, x.shape, np.uint16).view(ml_dtypes.bfloat16)
        elif i % 2:
            tensors[name] = np.zeros_like(x)
        else:
            tensors[name] = rng.integers(0, 2**32, x.shape, np.uint32).view(np.float32)
    tensors[CONSTANT] = np.arange(8).astype(ml_dtypes.bfloat16)
    save_file(tensors, source / SINGLE_FILE)
    assert_same_tensors(source, round_trip(source, tmp_path))


def test_a_constant_that_was_not_there_is_computed(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """transformers 5 does not save it, and transformers 4 misses it."""
    source = Path(shutil.copytree(tiny_checkpoint, tmp_path / "torch"))
    tensors = load_file(source / SINGLE_FILE)
    del tensors[CONSTANT]
    save_file(tensors, source / SINGLE_FILE)
    assert_same_tensors(tiny_checkpoint, round_trip(source, tmp_path))


def test_names_in_memory_become_published_ones(tiny_checkpoint: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(tiny_checkpoint, tmp_path / "torch"))
    tensors = {
        n.replace("thinker.visual.", "thinker.model.visual."): x for n, x in load_file(source / SINGLE_FILE).items()
    }
    save_file(tensors, source / SINGLE_FILE)
    back = round_trip(source, tmp_path)
    assert load_file(back / SINGLE_FILE).keys() == load_file(tiny_checkpoint / SINGLE_FILE).keys()


def test_layers_that_share_a_chunk_and_chunks_of_a_layer(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "_CHUNK_BYTES", 6000)
    monkeypatch.setattr(store, "_BLOCK_BYTES", 12000)
    assert_same_tensors(tiny_checkpoint, round_trip(tiny_checkpoint, tmp_path))


def test_the_figures(tiny_model: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    done = export.to_hf(tiny_model, tmp_path / "back", progress=lambda *n: seen.append(n))
    assert seen == [(i + 1, done.tensors) for i in range(done.tensors)]
    entries = make_name_table(TINY)
    assert done.tensors == sum(len(e.names) for e in entries)
    assert (done.nbytes, done.largest) == (4 * sum(e.size for e in entries), 4 * max(e.size for e in entries))


def test_new_voices_go_to_pytorch(tiny_model: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(tiny_model, tmp_path / "jax"))
    known = voices.load_voices(source)
    known["Ada"] = dataclasses.replace(known["Ethan"], name="Ada", cond=known["Ethan"].cond + 1)
    voices.save_voices(source, known)
    export.to_hf(source, tmp_path / "back")
    found = voices.read_spk_dict(tmp_path / "back" / "spk_dict.pt")
    assert list(found) == ["Chelsie", "Ethan", "Ada"] and found["Ada"].equals(known["Ada"])
    (source / "spk_dict.pt").unlink()
    export.to_hf(source, tmp_path / "again")
    assert list(voices.read_spk_dict(tmp_path / "again" / "spk_dict.pt")) == ["Chelsie", "Ethan", "Ada"]


class TestBadInput:
    @pytest.fixture
    def source(self, tiny_model: Path, tmp_path: Path) -> Path:
        return Path(shutil.copytree(tiny_model, tmp_path / "jax"))

    def complaint(self, source: Path) -> str:
        target = source.parent / "out"
        with pytest.raises(CheckpointError) as e:
            export.to_hf(source, target)
        assert [p.name for p in source.parent.iterdir()] == [source.name]  # neither a target nor a part of one
        return str(e.value)

    def test_an_existing_target(self, source: Path, tmp_path: Path) -> None:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "mine.txt").write_text("mine")
        with pytest.raises(CheckpointError, match="out exists already"):
            export.to_hf(tmp_path / "nowhere", tmp_path / "out")
        assert [p.name for p in (tmp_path / "out").iterdir()] == ["mine.txt"]

    def test_a_folder_of_pytorch(self, tiny_checkpoint: Path, tmp_path: Path) -> None:
        with pytest.raises(CheckpointError, match="is no checkpoint of omni_jax"):
            export.to_hf(tiny_checkpoint, tmp_path / "out")

    def test_a_model_without_token2wav(self, tiny_checkpoint: Path, tmp_path: Path) -> None:
        convert.to_jax(tiny_checkpoint, tmp_path / "jax", components=["thinker", "talker"])
        told = self.complaint(tmp_path / "jax")
        assert "has no token2wav, and PyTorch loads all three components or a Thinker alone" in told
        assert "Convert the PyTorch folder again without --components" in told

    @pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "constants.safetensors", "voices.npz"])
    def test_a_missing_file(self, source: Path, name: str) -> None:
        (source / name).unlink()
        assert name in self.complaint(source)

    def test_constants_of_another_model(self, source: Path) -> None:
        save_file({CONSTANT: np.ones(3, np.float32), "x": np.ones(1, np.float32)}, source / model_files.CONSTANTS_FILE)
        told = self.complaint(source)
        assert "1 unexpected:\n    x" in told and f"{CONSTANT}: config.json makes it [8], found [3]" in told

    def test_voices_of_another_model(self, source: Path) -> None:
        known = voices.load_voices(source)
        voices.save_voices(source, {n: dataclasses.replace(v, cond=v.cond[:, :5]) for n, v in known.items()})
        assert "voices.npz: voice 'Chelsie' has cond [1, 5]" in self.complaint(source)

    @pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # Orbax, as in test_store.py
    def test_a_missing_parameter(self, source: Path) -> None:
        (leaf,) = source.glob("params/talker/*/proj.kernel")
        shutil.rmtree(leaf)
        assert "params/talker" in self.complaint(source)

    def test_missing_numbers(self, source: Path) -> None:
        (leaf,) = source.glob("params/thinker/*/decoder.norm.scale/c")
        shutil.rmtree(leaf)
        told = self.complaint(source)  # and not zeros in their place
        assert "cannot read thinker/decoder/norm/scale" in told and len(told.splitlines()) == 1

    def test_damaged_numbers(self, source: Path) -> None:
        (chunks,) = source.glob("params/token2wav/*/dit.proj.kernel/c")
        for file in filter(Path.is_file, chunks.rglob("*")):
            file.write_bytes(file.read_bytes()[:-30])
        assert "cannot read token2wav/dit/proj/kernel" in self.complaint(source)


def test_conversion_asks_for_voices(tiny_checkpoint: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(tiny_checkpoint, tmp_path / "torch"))
    (source / "spk_dict.pt").unlink()
    with pytest.raises(CheckpointError, match=r"has no spk_dict.pt[\s\S]*--components thinker for text alone"):
        convert.to_jax(source, tmp_path / "jax")
    convert.to_jax(source, tmp_path / "jax", components=["thinker"])
    assert not (tmp_path / "jax" / "voices.npz").exists()
    (source / "spk_dict.pt").write_bytes(b"PK")
    with pytest.raises(CheckpointError, match=r"spk_dict.pt is damaged"):
        convert.to_jax(source, tmp_path / "speech", components=["token2wav"])
    assert not (tmp_path / "speech").exists()


def test_constants_are_kept_for_their_component_only(tiny_checkpoint: Path, tmp_path: Path) -> None:
    for parts, kept in ((["thinker"], set()), (["token2wav"], set(optional_constants(TINY)))):
        convert.to_jax(tiny_checkpoint, tmp_path / parts[0], components=parts)
        assert load_file(tmp_path / parts[0] / model_files.CONSTANTS_FILE).keys() == kept


def test_the_command(
    tiny_checkpoint: Path, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command.main(["to-hf", str(tiny_model), str(tmp_path / "back")])
    printed = capsys.readouterr().out
    assert f"{tmp_path / 'back'}: thinker, talker, token2wav; 299 tensors" in printed
    assert "peak host memory" in printed
    assert_same_tensors(tiny_checkpoint, tmp_path / "back")
    told = str(fail_command("to-hf", tiny_checkpoint, tmp_path / "out"))
    assert told.startswith(f"error: {tiny_checkpoint} is no checkpoint of omni_jax") and len(told.splitlines()) == 1
    assert fail_command("to-hf", tiny_model, tmp_path / "out", "--dtype", "bfloat16") == 2

from __future__ import annotations

import json
import shutil
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from omni_jax.checkpoint.name_map import make_name_table
from omni_jax.checkpoint.pytorch import INDEX_FILE, SINGLE_FILE, check_tensors, read_headers, read_layers, write_tensors
from omni_jax.checkpoint.tensor_file import NewTensor, read_header, write_file
from omni_jax.config import OmniConfig
from omni_jax.errors import CheckpointError
from tools.make_checkpoint import write_checkpoint

TINY = OmniConfig.tiny()


@pytest.fixture
def folder(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """A copy that may be changed, in one file."""
    return Path(shutil.copytree(tiny_checkpoint, tmp_path / "copy"))


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """A checkpoint of several files, in bfloat16."""
    write_checkpoint(tmp_path / "shards", TINY, shard_bytes=250_000)
    return tmp_path / "shards"


def change(folder: Path, edit) -> None:
    tensors = load_file(folder / SINGLE_FILE)
    edit(tensors)
    save_file(tensors, folder / SINGLE_FILE)


def complaint(folder: Path, components=None) -> str:
    with pytest.raises(CheckpointError) as e:
        check_tensors(folder, read_headers(folder), TINY, components)
    return str(e.value)


def test_what_the_library_of_the_format_writes_is_read(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    tensors = {
        "a": rng.standard_normal((3, 5)).astype(np.float32),
        "b": rng.standard_normal(7).astype(ml_dtypes.bfloat16),
        "c": rng.standard_normal((2, 2)).astype(np.float16),
    }
    save_file(tensors, tmp_path / "theirs.safetensors", metadata={"format": "pt"})
    read = read_header(tmp_path / "theirs.safetensors")
    assert read.keys() == tensors.keys()
    for name, x in tensors.items():
        np.testing.assert_array_equal(read[name].read().view(np.uint8), x.view(np.uint8))


def test_the_library_of_the_format_reads_what_is_written(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    tensors = {
        "a": rng.standard_normal(7).astype(ml_dtypes.bfloat16),
        "b": rng.standard_normal((3, 5)).astype(np.float32).T,
    }
    write_file(
        tmp_path / "ours.safetensors", [NewTensor(n, x.shape, x.dtype, lambda x=x: x) for n, x in tensors.items()]
    )
    read = load_file(tmp_path / "ours.safetensors")
    for name, x in tensors.items():
        assert read[name].dtype == x.dtype
        np.testing.assert_array_equal(read[name], x)


def test_a_tensor_that_is_not_as_announced_is_not_written(tmp_path: Path) -> None:
    wrong = NewTensor("a", (2, 3), np.dtype(np.float32), lambda: np.zeros((3, 2), np.float32))
    with pytest.raises(CheckpointError, match="a is float32"):
        write_file(tmp_path / "x.safetensors", [wrong])


def test_shards_hold_what_one_file_holds(tmp_path: Path, shards: Path) -> None:
    write_checkpoint(tmp_path / "one", TINY)
    one, several = read_headers(tmp_path / "one"), read_headers(shards)
    assert one.keys() == several.keys()
    assert len({t.file for t in several.values()}) > 3
    for name in one:
        np.testing.assert_array_equal(one[name].read().view(np.uint8), several[name].read().view(np.uint8))
    assert all((shards / name).stat().st_size < 300_000 for name in {t.file for t in several.values()})


def test_a_shard_takes_one_tensor_at_least(tmp_path: Path) -> None:
    zeros = [NewTensor(f"t{i}", (8,), np.dtype(np.float32), lambda: np.zeros(8, np.float32)) for i in range(3)]
    write_tensors(tmp_path, zeros, shard_bytes=1)
    assert len(list(tmp_path.glob("*.safetensors"))) == 3
    assert json.loads((tmp_path / INDEX_FILE).read_text())["metadata"]["total_size"] == 96


def test_a_sound_folder_passes(tiny_checkpoint: Path, shards: Path) -> None:
    for folder in (tiny_checkpoint, shards):
        assert check_tensors(folder, read_headers(folder), TINY) == ("thinker", "talker", "token2wav")
        assert check_tensors(folder, read_headers(folder), TINY, ["thinker"]) == ("thinker",)


def test_all_trouble_is_told_at_once(folder: Path) -> None:
    def edit(t):
        del t["thinker.lm_head.weight"], t["talker.model.norm.weight"]
        t["thinker.model.layers.2.input_layernorm.weight"] = np.ones(48, np.float32)
        t["token2wav.extra"] = np.ones(3, np.float32)
        t["thinker.visual.merger.ln_q.weight"] = np.ones(33, np.float32)

    change(folder, edit)
    text = complaint(folder)
    assert str(folder) in text
    assert "2 missing:\n    thinker.lm_head.weight\n    talker.model.norm.weight" in text
    assert "2 unexpected" in text and "layers.2.input_layernorm.weight" in text and "token2wav.extra" in text
    assert "thinker.visual.merger.ln_q.weight: config.json makes it [32], found [33]" in text


def test_components_that_are_not_asked_for_may_be_absent_but_not_wrong(folder: Path) -> None:
    change(folder, lambda t: [t.pop(n) for n in list(t) if n.startswith("talker.")])
    assert check_tensors(folder, read_headers(folder), TINY) == ("thinker", "token2wav")
    change(folder, lambda t: t.pop("token2wav.code2wav_dit_model.proj_out.bias"))
    assert check_tensors(folder, read_headers(folder), TINY, ["thinker"]) == ("thinker",)
    assert "1 missing:\n    token2wav.code2wav_dit_model.proj_out.bias" in complaint(folder)
    assert "holds no talker; it has thinker, token2wav" in complaint(folder, ["thinker", "talker"])
    change(folder, lambda t: t.update({"token2wav.code2wav_dit_model.proj_out.weight": np.ones((2, 2), np.float32)}))
    assert "proj_out.weight: config.json makes it [80, 32], found [2, 2]" in complaint(folder, ["thinker"])


def test_the_constant_may_be_absent_but_not_wrong(folder: Path) -> None:
    name = "token2wav.code2wav_dit_model.rotary_embed.inv_freq"
    change(folder, lambda t: t.update({name: np.ones(3, np.float32)}))
    assert f"{name}: config.json makes it [8], found [3]" in complaint(folder)
    change(folder, lambda t: t.pop(name))
    assert check_tensors(folder, read_headers(folder), TINY)


def test_both_naming_schemes_give_equal_leaves(tiny_checkpoint: Path, folder: Path) -> None:
    def edit(t):
        for name in [n for n in t if n.startswith("thinker.") and n != "thinker.lm_head.weight"]:
            rest = name.removeprefix("thinker.")
            rest = f"language_model.{rest.removeprefix('model.')}" if rest.startswith("model.") else rest
            t[f"thinker.model.{rest}"] = t.pop(name)

    change(folder, edit)
    names = load_file(folder / SINGLE_FILE).keys()
    assert (
        "thinker.model.language_model.embed_tokens.weight" in names
        and "thinker.model.visual.merger.ln_q.weight" in names
    )
    published, in_memory = read_headers(tiny_checkpoint), read_headers(folder)
    assert check_tensors(folder, in_memory, TINY) == ("thinker", "talker", "token2wav")
    for entry in make_name_table(TINY, ["thinker"]):
        for a, b in zip(read_layers(entry, published), read_layers(entry, in_memory), strict=True):
            np.testing.assert_array_equal(a, b)


def test_a_tensor_under_both_names_is_refused(folder: Path) -> None:
    change(folder, lambda t: t.update({"thinker.model.visual.merger.ln_q.weight": np.ones(32, np.float32)}))
    with pytest.raises(CheckpointError, match=r"twice[\s\S]*thinker.model.visual.merger\.ln_q\.weight"):
        read_headers(folder)


def test_the_names_of_a_thinker_alone(tiny_checkpoint: Path, folder: Path) -> None:
    change(folder, lambda t: [t.pop(n) for n in list(t) if not n.startswith("thinker.")])
    with_prefix = read_headers(folder, "thinker")
    change(folder, lambda t: [t.update({n.removeprefix("thinker."): t.pop(n)}) for n in list(t)])
    assert read_headers(folder, "thinker").keys() == with_prefix.keys()
    assert check_tensors(folder, with_prefix, TINY) == ("thinker",)
    # with the config.json of the whole model they are no tensors of it
    assert "A Thinker saved alone has its own config.json" in complaint(folder)


def test_an_index_cannot_lead_out_of_the_folder(shards: Path) -> None:
    index = json.loads((shards / INDEX_FILE).read_text())
    index["weight_map"]["thinker.lm_head.weight"] = "../other.safetensors"
    (shards / INDEX_FILE).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"names files outside its folder[\s\S]*\.\./other"):
        read_headers(shards)


def test_a_stack_of_several_dtypes_is_refused(folder: Path) -> None:
    name = "thinker.model.layers.1.mlp.up_proj.weight"
    change(folder, lambda t: t.update({name: t[name].astype(ml_dtypes.bfloat16)}))
    assert "thinker.model.layers.0.mlp.up_proj.weight to " + name + ": bfloat16, float32" in complaint(folder)


def test_other_dtypes_are_refused(folder: Path) -> None:
    change(folder, lambda t: t.update({"thinker.lm_head.weight": t["thinker.lm_head.weight"].astype(np.int8)}))
    with pytest.raises(CheckpointError, match=r"thinker.lm_head.weight is of dtype I8; only BF16, F16, F32"):
        read_headers(folder)


def test_a_truncated_shard_is_named(shards: Path) -> None:
    shard = sorted(shards.glob("*.safetensors"))[1]
    whole = shard.read_bytes()
    for size in (len(whole) - 1, 100, 4):
        shard.write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match=f"{shard.name} is cut short"):
            read_headers(shards)


def test_a_shard_that_shrinks_later_is_named(shards: Path) -> None:
    tensors = read_headers(shards)
    shard = tensors["thinker.lm_head.weight"].file
    shard.write_bytes(shard.read_bytes()[:5000])
    lost = next(t for t in tensors.values() if t.file == shard and t.offset > 5000)
    with pytest.raises(CheckpointError, match=f"{shard.name} ends in the middle"):
        lost.read()


def test_a_damaged_header_is_named(shards: Path) -> None:
    shard = sorted(shards.glob("*.safetensors"))[0]
    whole = bytearray(shard.read_bytes())
    whole[8:20] = b"not JSON now"
    shard.write_bytes(whole)
    with pytest.raises(CheckpointError, match=f"{shard.name} has a header that is no"):
        read_headers(shards)
    header = json.dumps({"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 8]}}).encode()
    shard.write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    with pytest.raises(CheckpointError, match="a has 8 bytes, but its shape takes 16"):
        read_headers(shards)


def test_missing_shards_are_named(shards: Path) -> None:
    files = sorted(shards.glob("*.safetensors"))
    files[1].unlink()
    files[2].unlink()
    with pytest.raises(CheckpointError) as e:
        read_headers(shards)
    assert files[1].name in str(e.value) and files[2].name in str(e.value) and files[0].name not in str(e.value)


def test_an_index_that_disagrees_is_told(shards: Path) -> None:
    index = json.loads((shards / INDEX_FILE).read_text())
    file = index["weight_map"].pop("thinker.lm_head.weight")
    index["weight_map"]["thinker.nothing"] = file
    (shards / INDEX_FILE).write_text(json.dumps(index))
    with pytest.raises(CheckpointError) as e:
        read_headers(shards)
    assert f"thinker.lm_head.weight (in {file})" in str(e.value)
    assert f"thinker.nothing (should be in {file})" in str(e.value)
    (shards / INDEX_FILE).write_text("[]")
    with pytest.raises(CheckpointError, match=r"index\.json must hold an object"):
        read_headers(shards)


def test_a_folder_without_tensors_is_told(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=f"neither {SINGLE_FILE} nor {INDEX_FILE}"):
        read_headers(tmp_path)

"""Checkpoints from strangers: a folder can cost whoever reads it an error, and nothing else."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from omni_jax.checkpoint import convert, export, store, voices
from omni_jax.checkpoint.pytorch import INDEX_FILE, read_headers
from omni_jax.checkpoint.tensor_file import NewTensor, read_header, write_file
from omni_jax.checkpoint.train_checkpoints import find_damage, prepare_model, resolve_checkpoint
from omni_jax.config import OmniConfig
from omni_jax.errors import CheckpointError, ConfigError
from omni_jax.plain_files import link_folder
from omni_jax.processing.processor import Processor
from omni_jax.processing.tokenizer import TextTokenizer
from tests.security.folders import DEEP, DEEP_OBJECT, edit_json, make_hub_cache


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    """A file of the user's, outside of all that a stranger made."""
    path = tmp_path / "secret.txt"
    path.write_text("secret")
    return path


def listing(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


class TestPathsOfOurs:
    """Names and links of a checkpoint that a run begins from."""

    def test_a_component_is_no_path(self, model: Path, tmp_path: Path) -> None:
        # seen from the run's folder the same name leads to a file of the user's
        evil = model / "params" / ".." / ".." / ".." / "files" / ".bashrc"
        mine = tmp_path / "home" / "files" / ".bashrc"
        for path, text in ((evil, "evil"), (mine, "mine")):
            path.parent.mkdir(parents=True)
            path.write_text(text)
        edit_json(model / "omni_jax.json", components={"thinker": ["float32"], "../../../files": ["float32"]})
        with pytest.raises(CheckpointError, match=r"unknown component '\.\./\.\./\.\./files'; known: thinker, talker"):
            prepare_model(tmp_path / "home" / "runs" / "sft", model, ["thinker"])
        assert mine.read_text() == "mine"

    @pytest.mark.parametrize("name", ["/etc", "..", "", "thinker/..", "Thinker", "x\0y"])
    def test_components_are_those_that_are_known(self, model: Path, name: str) -> None:
        edit_json(model / "omni_jax.json", components={name: ["float32"]})
        with pytest.raises(CheckpointError, match="unknown component"):
            store.load(model)

    @pytest.mark.parametrize("dtypes", [None, [], "float32", ["int8"], [["float32"]], {"a": 1}])
    def test_dtypes_are_those_that_are_known(self, model: Path, dtypes: Any) -> None:
        edit_json(model / "omni_jax.json", components={"thinker": dtypes})
        with pytest.raises(CheckpointError, match="the dtypes of thinker are"):
            store.components(model)

    def test_a_link_out_of_the_folder_is_not_followed(self, model: Path, secret: Path, tmp_path: Path) -> None:
        array = next(path for path in sorted((model / "params" / "talker").rglob("zarr.json")))
        array.unlink()
        array.symlink_to(secret)
        with pytest.raises(CheckpointError, match=r"zarr\.json is a link to .*secret\.txt, outside its folder"):
            prepare_model(tmp_path / "run", model, ["thinker"])
        assert listing(tmp_path / "run") == []
        with pytest.raises(CheckpointError, match="outside its folder"):
            store.load(model)

    def test_a_folder_that_is_a_link_is_not_followed(self, model: Path, tiny_model: Path, tmp_path: Path) -> None:
        shutil.rmtree(model / "params" / "talker")
        (model / "params" / "talker").symlink_to(tiny_model / "params" / "talker")
        for read in (lambda: prepare_model(tmp_path / "run", model, ["thinker"]), lambda: store.abstract(model)):
            with pytest.raises(CheckpointError, match="is a link that leads out of"):
                read()

    def test_nothing_is_written_over(self, tmp_path: Path) -> None:
        for name, text in (("source", "evil"), ("target", "mine")):
            (tmp_path / name).mkdir()
            (tmp_path / name / "file").write_text(text)
        with pytest.raises(CheckpointError, match="exists already, and is not written over"):
            link_folder(tmp_path / "source", tmp_path / "target", tmp_path / "source")
        assert (tmp_path / "target" / "file").read_text() == "mine"

    def test_a_new_folder_takes_no_name_that_is_taken(self, tmp_path: Path) -> None:
        (tmp_path / "link").symlink_to(tmp_path / "nowhere")
        with pytest.raises(CheckpointError, match="exists already"), store.new_folder(tmp_path / "link"):
            pass
        assert not (tmp_path / "nowhere").exists()
        with pytest.raises(CheckpointError, match="exists already"), store.new_folder(tmp_path / "late"):
            (tmp_path / "late").mkdir()  # by somebody else, meanwhile
        assert listing(tmp_path) == ["late", "link"]

    def test_names_of_unfinished_folders_cannot_be_foreseen(self, tmp_path: Path) -> None:
        names = set()
        for number in range(2):
            with store.new_folder(tmp_path / f"{number}") as unfinished:
                names.add(unfinished.name.replace(str(number), "", 1))
        assert len(names) == 2 and not any(name.endswith(str(os.getpid())) for name in names)

    @pytest.mark.parametrize(
        "sizes", [DEEP, "[1]", '{"/etc/hostname": 1}', '{"../../secret.txt": 6}', '{"a\\u0000": 1}']
    )
    def test_the_list_of_a_runs_files(self, model: Path, secret: Path, sizes: str) -> None:
        step = model / "checkpoints" / "00000001"
        step.mkdir(parents=True)
        (step / "files.json").write_text(sizes)
        assert find_damage(step)
        with pytest.raises(CheckpointError, match="without a whole checkpoint"):
            resolve_checkpoint(model)


class TestHubCache:
    """A cache of the Hub has links out of its folders, to where it keeps contents; these are followed."""

    def test_a_published_folder(self, tiny_checkpoint: Path, tmp_path: Path) -> None:
        snapshot = make_hub_cache(tiny_checkpoint, tmp_path / "cache")
        convert.to_jax(snapshot, tmp_path / "model")
        assert not any(path.is_symlink() for path in (tmp_path / "model").rglob("*"))
        assert (tmp_path / "model" / "tokenizer.json").read_bytes() == (tiny_checkpoint / "tokenizer.json").read_bytes()

    def test_one_of_ours(self, tiny_model: Path, tmp_path: Path) -> None:
        snapshot = make_hub_cache(tiny_model, tmp_path / "cache")
        assert set(store.abstract(snapshot)) == {"thinker", "talker", "token2wav"}
        Processor.load(snapshot)
        voices.load_voices(snapshot)
        prepare_model(tmp_path / "run", snapshot, ["thinker"])
        files = [path for path in (tmp_path / "run" / "model").rglob("*") if not path.is_dir()]
        assert files and not any(path.is_symlink() for path in files)

    @pytest.mark.parametrize("where", ["..", "../../elsewhere", "../../blobs/deeper"])
    def test_no_other_link_out_of_it(self, tiny_checkpoint: Path, tmp_path: Path, where: str) -> None:
        snapshot = make_hub_cache(tiny_checkpoint, tmp_path / "cache")
        (snapshot / where).mkdir(parents=True, exist_ok=True)
        (snapshot / where / "secret").write_text("secret")
        (snapshot / "README.md").symlink_to(Path(where) / "secret")
        with pytest.raises(CheckpointError, match=r"README\.md is a link to .*, outside its folder"):
            convert.to_jax(snapshot, tmp_path / "model")


class TestSideFiles:
    """The small files that go with a model into every folder that is made of it."""

    def test_a_link_to_a_file_of_the_users(self, published: Path, secret: Path, tmp_path: Path) -> None:
        (published / "README.md").symlink_to(secret)
        with pytest.raises(CheckpointError, match=r"README\.md is a link to .*secret\.txt, outside its folder"):
            convert.to_jax(published, tmp_path / "model")
        assert listing(tmp_path) == ["published", "secret.txt"]

    @pytest.mark.parametrize(
        "name", ["README.md", "tokenizer.json", "config.json", "spk_dict.pt", "chat_template.jinja"]
    )
    def test_a_link_that_has_no_target(self, published: Path, tmp_path: Path, name: str) -> None:
        (published / name).unlink(missing_ok=True)
        (published / name).symlink_to("nowhere")
        with pytest.raises((CheckpointError, ConfigError), match="is a link that leads nowhere"):
            convert.to_jax(published, tmp_path / "model")

    def test_links_in_a_circle(self, published: Path, tmp_path: Path) -> None:
        (published / "LICENSE").symlink_to("README.md")
        (published / "README.md").symlink_to("LICENSE")
        with pytest.raises(CheckpointError, match="is a link that leads nowhere"):
            convert.to_jax(published, tmp_path / "model")

    def test_a_pipe(self, published: Path, tmp_path: Path) -> None:
        os.mkfifo(published / "merges.txt.pipe")
        (published / "merges.txt").unlink(missing_ok=True)
        (published / "merges.txt").symlink_to("merges.txt.pipe")
        with pytest.raises(CheckpointError, match=r"merges\.txt: it is no plain file"):
            convert.to_jax(published, tmp_path / "model")

    def test_a_file_that_is_huge(self, published: Path, tmp_path: Path) -> None:
        with (published / "README.md").open("wb") as file:
            file.truncate(2**40)
        with pytest.raises(CheckpointError, match=r"README\.md has over 67,108,864 bytes"):
            convert.to_jax(published, tmp_path / "model")

    def test_on_the_way_back(self, model: Path, secret: Path, tmp_path: Path) -> None:
        (model / "LICENSE").symlink_to(secret)
        for use in (
            lambda: export.to_hf(model, tmp_path / "back"),
            lambda: prepare_model(tmp_path / "run", model, ["thinker"]),
        ):
            with pytest.raises(CheckpointError, match=r"LICENSE is a link to .*secret\.txt, outside its folder"):
                use()


def write_safetensors(path: Path, header: Any, data: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def f32(shape: Any, *offsets: Any) -> dict[str, Any]:
    return {"dtype": "F32", "shape": shape, "data_offsets": list(offsets)}


class TestTensorFiles:
    """Headers of safetensors files."""

    @pytest.mark.parametrize(
        "description",
        [
            f32([2.0, 3], 0, 24),
            f32([True, 6], 0, 24),
            f32([2, 3], 0.0, 24),
            f32([2, 3], False, 24),
            f32([2, 3], 0, 24.0),
            f32([-2, -3], 0, 24),
            f32([2**70, 0], 0, 0),
            f32("23", 0, 24),
            f32({"2": 3}, 0, 24),
            f32([[2, 3]], 0, 24),
            f32([6] + [1] * 100, 0, 24),
            f32([2, 3], 0, 24, 24),
            f32([2, 3], 0),
            {"dtype": ["F32"], "shape": [2, 3], "data_offsets": [0, 24]},
            {"dtype": "F32", "shape": None, "data_offsets": [0, 24]},
            [],
            None,
        ],
    )
    def test_sizes_and_offsets_are_whole_numbers(self, tmp_path: Path, description: Any) -> None:
        path = write_safetensors(tmp_path / "a.safetensors", {"a": description}, bytes(24))
        with pytest.raises(CheckpointError, match=r"a\.safetensors"):
            read_header(path)

    @pytest.mark.parametrize(
        ("tensors", "told"),
        [
            ({"a": f32([6], 0, 24), "b": f32([6], 0, 24)}, "b lies over another tensor"),
            ({"a": f32([6], 0, 24), "b": f32([2], 20, 28)}, "b lies over another tensor"),
            ({"a": f32([6], 0, 24), "b": f32([0], 12, 12)}, "lies over another tensor"),
            ({"a": f32([2], 0, 8), "b": f32([4], 12, 28)}, "b lies behind bytes of no tensor"),
            ({"a": f32([6], 4, 28)}, "a lies behind bytes of no tensor"),
            ({"a": f32([6], 0, 24)}, "its tensors end at byte"),
            ({}, "its tensors end at byte"),
        ],
    )
    def test_tensors_lie_side_by_side(self, tmp_path: Path, tensors: dict[str, Any], told: str) -> None:
        path = write_safetensors(tmp_path / "a.safetensors", tensors, bytes(28))
        with pytest.raises(CheckpointError, match=told):
            read_header(path)

    def test_every_tensor_at_offset_0(self, published: Path, tmp_path: Path) -> None:
        file = published / "model.safetensors"
        data = file.read_bytes()
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])
        for name, description in header.items():
            if name != "__metadata__":
                begin, end = description["data_offsets"]
                description["data_offsets"] = [0, end - begin]
        write_safetensors(file, header, data[8 + length :])
        with pytest.raises(CheckpointError, match="lies over another tensor"):
            convert.to_jax(published, tmp_path / "model")

    def test_empty_tensors_and_scalars_are_read(self, tmp_path: Path) -> None:
        sizes: dict[str, tuple[int, ...]] = {"a": (0, 3), "b": (2,), "c": (0,), "d": ()}
        tensors = [NewTensor(n, s, np.dtype(np.float32), lambda s=s: np.ones(s, np.float32)) for n, s in sizes.items()]
        write_file(tmp_path / "a.safetensors", tensors)
        assert {name: tensor.shape for name, tensor in read_header(tmp_path / "a.safetensors").items()} == sizes

    @pytest.mark.parametrize("header", [b"\xff\xfe", DEEP.encode(), b"[]", b"1" * 5000, b'{"a": 1e999}'])
    def test_what_is_no_header(self, tmp_path: Path, header: bytes) -> None:
        with pytest.raises(CheckpointError, match="no safetensors header"):
            read_header(write_safetensors(tmp_path / "a.safetensors", header))

    def test_a_header_that_is_huge(self, tmp_path: Path) -> None:
        path = tmp_path / "a.safetensors"
        with path.open("wb") as file:
            file.write((2**40).to_bytes(8, "little"))
            file.truncate(2**41)
        with pytest.raises(CheckpointError, match=r"a header of 1,099,511,627,776 bytes; 16,777,216 are read at most"):
            read_header(path)

    def test_a_link_out_of_the_folder(self, published: Path, tmp_path: Path) -> None:
        shutil.move(published / "model.safetensors", tmp_path / "private.safetensors")
        (published / "model.safetensors").symlink_to(tmp_path / "private.safetensors")
        with pytest.raises(CheckpointError, match="outside its folder"):
            read_headers(published)

    @pytest.mark.parametrize("name", ["..", ".", "", "../x", "a/b", "/etc/hostname", "x\0"])
    def test_an_index_names_files_beside_it(self, tmp_path: Path, name: str) -> None:
        (tmp_path / INDEX_FILE).write_text(json.dumps({"weight_map": {"a": name}}))
        with pytest.raises(CheckpointError, match="names files outside its folder"):
            read_headers(tmp_path)

    @pytest.mark.parametrize("text", [DEEP, "[]", '{"weight_map": ["a"]}', '{"weight_map": {"a": {}}}', '{"a": 1}'])
    def test_what_is_no_index(self, tmp_path: Path, text: str) -> None:
        (tmp_path / INDEX_FILE).write_text(text)
        with pytest.raises(CheckpointError, match=r"model\.safetensors\.index\.json"):
            read_headers(tmp_path)

    def test_a_shard_that_is_a_link(self, tmp_path: Path, secret: Path) -> None:
        folder = tmp_path / "folder"
        folder.mkdir()
        (folder / INDEX_FILE).write_text(json.dumps({"weight_map": {"a": "a.safetensors"}}))
        (folder / "a.safetensors").symlink_to(secret)
        with pytest.raises(CheckpointError, match="outside its folder"):
            read_headers(folder)


JSON_FILES = (
    *("config.json", "tokenizer.json", "preprocessor_config.json", "generation_config.json"),
    *("tokenizer_config.json", "chat_template.json"),
)


class TestText:
    """What stands for text or JSON may be anything."""

    @pytest.mark.parametrize("name", JSON_FILES)
    @pytest.mark.parametrize("data", [b"\xff\xfe{}", DEEP.encode(), DEEP_OBJECT.encode(), b"1" * 5000, b"[]", b"null"])
    def test_files_of_a_model(self, published: Path, name: str, data: bytes) -> None:
        for other in published.glob("chat_template.*"):  # the tokenizer's configuration is read for what they hold
            other.unlink()
        (published / name).write_bytes(data)
        with pytest.raises((CheckpointError, ConfigError), match=name.replace(".", r"\.")):
            Processor.load(published)

    @pytest.mark.parametrize("name", [*JSON_FILES, "chat_template.jinja"])
    def test_links_that_have_no_target(self, published: Path, name: str) -> None:
        for other in published.glob("chat_template.*"):
            other.unlink()
        (published / name).unlink(missing_ok=True)
        (published / name).symlink_to("nowhere")
        with pytest.raises((CheckpointError, ConfigError), match="is a link that leads nowhere"):
            Processor.load(published)

    @pytest.mark.parametrize("data", [b"\xff\xfe{}", DEEP.encode(), DEEP_OBJECT.encode(), b"[]"])
    def test_what_a_checkpoint_says_of_itself(self, model: Path, data: bytes) -> None:
        (model / "omni_jax.json").write_bytes(data)
        with pytest.raises(CheckpointError, match=r"omni_jax\.json"):
            store.components(model)

    def test_a_template_that_is_not_utf_8(self, published: Path) -> None:
        (published / "chat_template.jinja").write_bytes(b"\xff")
        with pytest.raises(CheckpointError, match=r"chat_template\.jinja is not UTF-8"):
            Processor.load(published)

    @pytest.mark.parametrize("name", ["processor_config.json", "tokenizer_config.json"])
    @pytest.mark.parametrize("data", [b"\xff\xfe{}", DEEP.encode(), DEEP_OBJECT.encode()])
    def test_files_that_a_conversion_rewrites(self, published: Path, tmp_path: Path, name: str, data: bytes) -> None:
        (published / name).write_bytes(data)
        with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
            convert.to_jax(published, tmp_path / "model")
        assert listing(tmp_path) == ["published"]


def test_a_tokenizer_does_not_cut_prompts(published: Path) -> None:
    expected = TextTokenizer.load(published).encode([("one two three four five", False)])
    cut = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    padded = {"strategy": {"Fixed": 64}, "direction": "Left", "pad_to_multiple_of": None}
    padded |= {"pad_id": 0, "pad_type_id": 0, "pad_token": "!"}
    edit_json(published / "tokenizer.json", truncation=cut, padding=padded)
    assert TextTokenizer.load(published).encode([("one two three four five", False)]) == expected
    assert len(expected) > 2


@pytest.mark.parametrize("use", [store.components, voices.load_voices, OmniConfig.load, Processor.load, read_headers])
def test_a_path_that_is_no_folder(use: Callable[[Path], Any], secret: Path, tmp_path: Path) -> None:
    for path in (secret, tmp_path / "nowhere"):
        with pytest.raises((CheckpointError, ConfigError)):
            use(path)


def test_half_a_surrogate_pair_in_a_preprocessor(published: Path, tmp_path: Path) -> None:
    preprocessor = json.loads((published / "preprocessor_config.json").read_text())
    sections = {"feature_extractor": preprocessor, "image_processor": {"image_processor_type": "\ud800"}}
    (published / "processor_config.json").write_text(json.dumps(sections))
    convert.to_jax(published, tmp_path / "model", components=["thinker"])
    values = json.loads((tmp_path / "model" / "preprocessor_config.json").read_bytes().decode())
    assert values["image_processor_type"] == "\ud800"

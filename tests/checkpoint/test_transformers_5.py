"""Folders of transformers 5, and a Thinker that was saved alone: converted, loaded, asked and exported."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from safetensors.numpy import load_file, save_file

import omni_jax
from omni_jax.checkpoint import convert, export, store
from omni_jax.checkpoint.name_map import optional_constants
from omni_jax.checkpoint.pytorch import SINGLE_FILE
from omni_jax.config import THINKER_CLASS, OmniConfig, ThinkerConfig
from omni_jax.errors import CheckpointError
from omni_jax.processing.processor import Processor
from omni_jax.processing.processor_config import ProcessorConfig
from tests.transformers_5 import CASES, as_transformers_5, rewrite_as_transformers_5

MESSAGES = [{"role": "user", "content": "Hello."}]


@pytest.fixture(scope="module")
def published_5(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``tiny_checkpoint`` as version 5 saves it, with the voices beside, which no release saves; not to be changed."""
    folder = Path(shutil.copytree(tiny_checkpoint, tmp_path_factory.mktemp("version_5") / "published"))
    rewrite_as_transformers_5(folder)
    return folder


@pytest.fixture(scope="module")
def converted_5(published_5: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("version_5") / "model"
    convert.to_jax(published_5, folder)
    return folder


def save_thinker_alone(published: Path, folder: Path, *, version: int, prefix: bool) -> Path:
    """The folder that a Thinker's ``save_pretrained`` writes, with the files of the processor."""
    shutil.copytree(published, folder)
    values = json.loads((folder / "config.json").read_text())["thinker_config"]
    values = {"architectures": [THINKER_CLASS], "dtype": "float32", **values}
    (folder / "config.json").write_text(json.dumps(values if version == 4 else as_transformers_5(values)))
    (folder / "spk_dict.pt").unlink()
    tensors = {}
    for name, tensor in load_file(folder / SINGLE_FILE).items():
        if name.startswith("thinker."):
            tensors[name if prefix else name.removeprefix("thinker.")] = tensor
    save_file(tensors, folder / SINGLE_FILE)
    return folder


def assert_same_params(folder: Path, expected: Path, components: list[str] | None = None) -> None:
    found = flatten_dict(store.load(folder, components))
    wanted = flatten_dict(store.load(expected, components))
    assert found.keys() == wanted.keys()
    for path, leaf in found.items():
        np.testing.assert_array_equal(leaf, wanted[path])


def assert_same_answer(folder: Path, expected: Path) -> None:
    options = dict(max_tokens=4)
    replies = [omni_jax.load(f, components=("thinker",)).generate(MESSAGES, **options) for f in (folder, expected)]
    assert replies[0].token_ids == replies[1].token_ids


class TestTransformers5:
    def test_it_is_the_same_model(self, converted_5: Path, tiny_model: Path) -> None:
        assert OmniConfig.load(converted_5) == OmniConfig.load(tiny_model)
        assert_same_params(converted_5, tiny_model)
        ours, expected = Processor.load(converted_5), Processor.load(tiny_model)
        assert ours.settings == expected.settings and ours.stop_ids == expected.stop_ids
        np.testing.assert_array_equal(ours(MESSAGES).tokens, expected(MESSAGES).tokens)

    def test_it_answers(self, converted_5: Path, tiny_model: Path) -> None:
        assert_same_answer(converted_5, tiny_model)

    def test_it_goes_back_in_the_form_of_version_4(self, converted_5: Path, published_5: Path, tmp_path: Path) -> None:
        export.to_hf(converted_5, tmp_path / "back")
        assert "rope_parameters" not in (tmp_path / "back" / "config.json").read_text()
        assert not (tmp_path / "back" / "processor_config.json").exists()
        assert (tmp_path / "back" / "video_preprocessor_config.json").exists()
        tokenizer = json.loads((tmp_path / "back" / "tokenizer_config.json").read_text())
        assert tokenizer["extra_special_tokens"]["audio_token"] == "<|AUDIO|>"
        assert "<|im_start|>" in tokenizer["additional_special_tokens"] and "backend" not in tokenizer
        before = load_file(published_5 / SINGLE_FILE)
        after = load_file(tmp_path / "back" / SINGLE_FILE)
        assert after.keys() == before.keys() | optional_constants(OmniConfig.tiny()).keys()
        for name, tensor in before.items():
            np.testing.assert_array_equal(after[name], tensor)

    def test_bookkeeping_that_nobody_reads_is_kept(self, published_5: Path, tmp_path: Path) -> None:
        source = Path(shutil.copytree(published_5, tmp_path / "published"))
        values = json.loads((source / "config.json").read_text()) | {"dtype": "bfloat16"}
        (source / "config.json").write_text(json.dumps(values))
        convert.to_jax(source, tmp_path / "model", components=["thinker"])
        assert json.loads((tmp_path / "model" / "config.json").read_text())["dtype"] == "bfloat16"

    def test_a_changed_limit_of_pictures_counts(self, published_5: Path, tmp_path: Path) -> None:
        """Version 5 keeps it in the image processor's size, and a copy of version 4's keys elsewhere."""
        source = Path(shutil.copytree(published_5, tmp_path / "published"))
        values = json.loads((source / "processor_config.json").read_text())
        values["image_processor"]["size"] = {"shortest_edge": 4 * 3136, "longest_edge": 100 * 3136}
        values["image_processor"]["image_mean"] = [0.5, 0.5, 0.5]
        (source / "processor_config.json").write_text(json.dumps(values))
        convert.to_jax(source, tmp_path / "model", components=["thinker"])
        pixels = ProcessorConfig.load(tmp_path / "model").pixels
        assert (pixels.min_pixels, pixels.max_pixels) == (4 * 3136, 100 * 3136)
        assert pixels.image_mean == (0.5, 0.5, 0.5)

    @pytest.mark.parametrize("text", ["[]", "{", '{"feature_extractor": 3, "image_processor": {}}'])
    def test_a_broken_file_is_named(self, published_5: Path, tmp_path: Path, text: str) -> None:
        source = Path(shutil.copytree(published_5, tmp_path / "published"))
        (source / "processor_config.json").write_text(text)
        with pytest.raises(CheckpointError, match=r"processor_config\.json"):
            convert.to_jax(source, tmp_path / "model", components=["thinker"])
        assert not (tmp_path / "model").exists()

    def test_files_of_version_4_are_not_touched(self, tiny_checkpoint: Path, tmp_path: Path) -> None:
        source = Path(shutil.copytree(tiny_checkpoint, tmp_path / "published"))
        # what version 4 itself has under the name
        (source / "processor_config.json").write_text('{"processor_class": "Qwen2_5OmniProcessor"}')
        convert.to_jax(source, tmp_path / "model", components=["thinker"])
        for name in ("config.json", "preprocessor_config.json", "processor_config.json", "tokenizer_config.json"):
            assert (tmp_path / "model" / name).read_bytes() == (source / name).read_bytes()


class TestThinkerAlone:
    @pytest.mark.parametrize(("version", "prefix"), [(4, False), (5, True)])
    def test_there_and_back(
        self, tiny_checkpoint: Path, tiny_model: Path, tmp_path: Path, version: int, prefix: bool
    ) -> None:
        source = save_thinker_alone(tiny_checkpoint, tmp_path / "alone", version=version, prefix=prefix)
        done = convert.to_jax(source, tmp_path / "model")
        assert done.components == ("thinker",)
        assert_same_params(tmp_path / "model", tiny_model, ["thinker"])
        assert_same_answer(tmp_path / "model", tiny_model)
        export.to_hf(tmp_path / "model", tmp_path / "back")
        before, after = (load_file(folder / SINGLE_FILE) for folder in (source, tmp_path / "back"))
        assert after.keys() == {name.removeprefix("thinker.") for name in before}
        for name, tensor in before.items():
            np.testing.assert_array_equal(after[name.removeprefix("thinker.")], tensor)
        if version == 4:
            assert (tmp_path / "back" / "config.json").read_bytes() == (source / "config.json").read_bytes()
        assert not (tmp_path / "back" / "spk_dict.pt").exists()

    def test_the_thinker_of_a_speaking_model_can_be_exported(self, tiny_checkpoint: Path, tmp_path: Path) -> None:
        convert.to_jax(tiny_checkpoint, tmp_path / "model", components=["thinker"])
        export.to_hf(tmp_path / "model", tmp_path / "back")
        values = json.loads((tmp_path / "back" / "config.json").read_text())
        assert values["architectures"] == [THINKER_CLASS] and values["model_type"] == ThinkerConfig.MODEL_TYPE
        assert OmniConfig.load(tmp_path / "back").thinker_config == OmniConfig.tiny().thinker_config
        assert all(not name.startswith("thinker.") for name in load_file(tmp_path / "back" / SINGLE_FILE))

    def test_there_is_no_talker_in_it(self, tiny_checkpoint: Path, tmp_path: Path) -> None:
        source = save_thinker_alone(tiny_checkpoint, tmp_path / "alone", version=4, prefix=False)
        with pytest.raises(CheckpointError, match="holds no talker; it has thinker"):
            convert.to_jax(source, tmp_path / "model", components=["thinker", "talker"])

    def test_the_files_that_a_model_does_not_save_are_asked_for(self, tiny_checkpoint: Path, tmp_path: Path) -> None:
        source = save_thinker_alone(tiny_checkpoint, tmp_path / "alone", version=4, prefix=False)
        for name in ("tokenizer.json", "preprocessor_config.json"):
            (source / name).unlink()
        told = r"has no tokenizer\.json and no preprocessor_config\.json; .*AutoProcessor"
        with pytest.raises(CheckpointError, match=told):
            convert.to_jax(source, tmp_path / "model")


def test_the_case_of_a_thinker_alone_is_the_case_of_the_whole_model() -> None:
    alone, whole = (
        json.loads((CASES / name).read_text())
        for name in ("config_thinker_only_4.57.json", "config_transformers_5.24.json")
    )
    assert OmniConfig.from_dict(alone).thinker_config == OmniConfig.from_dict(whole).thinker_config


class TestPaths:
    """Folders named through a parent or a link."""

    def test_through_a_parent(self, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "here").mkdir()
        monkeypatch.chdir(tmp_path / "here")
        convert.to_jax(tiny_checkpoint, Path("../model"), components=["thinker"])
        store.load(Path("../model"))
        export.to_hf(Path("../here/../model"), Path("../back"))
        assert {path.name for path in tmp_path.iterdir()} == {"here", "model", "back"}

    def test_through_a_link(self, tiny_checkpoint: Path, tiny_model: Path, tmp_path: Path) -> None:
        (tmp_path / "elsewhere").mkdir()
        (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
        (tmp_path / "published").symlink_to(tiny_checkpoint)
        convert.to_jax(tmp_path / "published", tmp_path / "link" / "model", components=["thinker"])
        assert_same_params(tmp_path / "elsewhere" / "model", tiny_model, ["thinker"])
        # the parent of what the link leads to, as every program on the system has it
        convert.to_jax(tmp_path / "published", tmp_path / "link" / ".." / "second", components=["thinker"])
        assert (tmp_path / "second" / "config.json").exists()

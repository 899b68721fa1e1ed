"""A Thinker from three models: the tiny one taken apart under their names, and put together again."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import flax.linen as nn
import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from omni_jax.checkpoint import store
from omni_jax.checkpoint.assemble_thinker import assemble_thinker
from omni_jax.checkpoint.pytorch import read_headers, write_tensors
from omni_jax.checkpoint.tensor_file import NewTensor
from omni_jax.config import OmniConfig
from omni_jax.errors import CheckpointError
from omni_jax.layers.linear import EMBEDDING_STD
from omni_jax.models.thinker import Thinker, init_params

# as Qwen2.5, Qwen2.5-VL and Whisper-large-v3 name them
RENAMED = {
    "llm": {r"thinker\.(model\..*|lm_head.*)": r"\1"},
    "vision": {r"thinker\.(visual\.(?!blocks\.\d+\.attn\.[qkv]\.).*)": r"\1"},
    "audio": {
        r"thinker\.audio_tower\.ln_post\.(.*)": r"model.encoder.layer_norm.\1",
        r"thinker\.audio_tower\.((?:conv|layers).*)": r"model.encoder.\1",
    },
}


def initialize(seed: int):
    """Leaves of the tiny model as its modules begin."""
    model = Thinker(OmniConfig.tiny().thinker_config)

    def make(paths: Sequence[str]) -> list[np.ndarray]:
        flat = flatten_dict(nn.unbox(init_params(model, jax.random.key(seed))), sep="/")
        return [np.asarray(flat[path]) for path in paths]

    return make


BEGIN_AT_RANDOM = {"audio_encoder/bos_eos/embedding", "audio_encoder/proj/kernel", "audio_encoder/proj/bias"}


def write(folder: Path, tensors: dict[str, np.ndarray]) -> Path:
    folder.mkdir()
    write_tensors(
        folder, [NewTensor(n, a.shape, a.dtype, lambda a=a: a) for n, a in tensors.items()], shard_bytes=10**9
    )
    return folder


@pytest.fixture(scope="module")
def parts(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("parts")
    whole = {name: tensor.read() for name, tensor in read_headers(tiny_checkpoint).items()}
    found = {}
    for part, patterns in RENAMED.items():
        tensors = {
            re.sub(pattern, other, name): array
            for pattern, other in patterns.items()
            for name, array in whole.items()
            if re.fullmatch(pattern, name)
        }
        found[part] = tensors
    for name, array in whole.items():  # query, key and value in one
        if match := re.fullmatch(r"thinker\.(visual\.blocks\.\d+\.attn)\.q\.(\w+)", name):
            three = [array, *(whole[name.replace(".q.", f".{other}.")] for other in "kv")]
            found["vision"][f"{match[1]}.qkv.{match[2]}"] = np.concatenate(three)
    found["audio"]["model.decoder.layer_norm.weight"] = np.ones(3, np.float32)  # Whisper has more than is taken
    return {part: write(folder / part, tensors) for part, tensors in found.items()}


def test_all_parts(tiny_checkpoint: Path, tiny_model: Path, parts: dict[str, Path], tmp_path: Path) -> None:
    random = assemble_thinker(tiny_checkpoint, tmp_path / "made", parts, initialize(0))
    assert all(name.startswith(("thinker.audio_tower.proj", "thinker.audio_tower.audio_bos")) for name in random)
    made = flatten_dict(store.load(tmp_path / "made", ["thinker"])["thinker"], sep="/")
    expected = flatten_dict(store.load(tiny_model, ["thinker"])["thinker"], sep="/")
    other = {path for path in expected if not np.array_equal(made[path], expected[path])}
    assert other == BEGIN_AT_RANDOM
    assert not np.any(made["audio_encoder/proj/bias"])
    # as large as embeddings begin
    assert float(np.std(made["audio_encoder/proj/kernel"])) == pytest.approx(EMBEDDING_STD * 32**-0.5, rel=0.1)


def test_a_seed_decides_what_no_part_holds(tiny_checkpoint: Path, parts: dict[str, Path], tmp_path: Path) -> None:
    llm = {"llm": parts["llm"]}
    trees = []
    for i, seed in enumerate((0, 0, 1)):
        random = assemble_thinker(tiny_checkpoint, tmp_path / str(i), llm, initialize(seed))
        trees.append(flatten_dict(store.load(tmp_path / str(i), ["thinker"])["thinker"], sep="/"))
    assert any(name.startswith("thinker.visual") for name in random)
    kernel = "vision_encoder/layers/attention/query/kernel"
    assert np.array_equal(trees[0][kernel], trees[1][kernel]) and not np.array_equal(trees[0][kernel], trees[2][kernel])
    assert np.array_equal(trees[0]["decoder/head/kernel"], trees[2]["decoder/head/kernel"])


def test_a_head_that_is_the_embeddings(tiny_checkpoint: Path, parts: dict[str, Path], tmp_path: Path) -> None:
    tensors = {n: t.read() for n, t in read_headers(parts["llm"]).items() if n != "lm_head.weight"}
    assemble_thinker(tiny_checkpoint, tmp_path / "made", {"llm": write(tmp_path / "tied", tensors)}, initialize(0))
    decoder = store.load(tmp_path / "made", ["thinker"])["thinker"]["decoder"]
    assert np.array_equal(decoder["head"]["kernel"].T, decoder["embed"]["embedding"])


def test_a_part_of_another_model(tiny_checkpoint: Path, parts: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"missing:\n    thinker\.visual"):
        assemble_thinker(tiny_checkpoint, tmp_path / "made", {"vision": parts["audio"]}, initialize(0))
    assert not (tmp_path / "made").exists()


def test_all_that_begins_at_random_is_as_modules_begin(tiny_checkpoint: Path, tmp_path: Path) -> None:
    random = assemble_thinker(tiny_checkpoint, tmp_path / "made", {}, initialize(3))
    made = flatten_dict(store.load(tmp_path / "made", ["thinker"])["thinker"], sep="/")
    assert len(random) > len(made)  # tensors of layers are stacked
    for path, leaf in zip(made, initialize(3)(list(made)), strict=True):
        np.testing.assert_array_equal(np.asarray(made[path]), leaf, err_msg=path)
    assert float(np.std(made["decoder/layers/attention/key/bias"])) > 1

"""A packed checkpoint has the same values in another dtype, and nothing of a run."""

import dataclasses
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from omni_jax.checkpoint import store
from omni_jax.checkpoint.model_files import TOKEN2WAV_FILE, TOKENIZER_FILE
from omni_jax.checkpoint.voices import load_voices
from omni_jax.config import OmniConfig
from omni_jax.errors import CheckpointError
from omni_jax.models.ode_solver import Solver
from tools.pack_checkpoint import Options, pack_checkpoint


def test_all_components_are_cast(tiny_model: Path, tmp_path: Path) -> None:
    target = tmp_path / "packed"
    num_bytes = pack_checkpoint(Options(tiny_model, target, dtype="bfloat16"))
    source = store.load(tiny_model)
    packed = store.load(target)
    assert store.components(target) == {name: ["bfloat16"] for name in source}
    assert num_bytes == 2 * sum(leaf.size for leaf in jax.tree.leaves(source))
    jax.tree.map(
        lambda a, b: np.testing.assert_array_equal(np.asarray(a.astype(jnp.bfloat16)), np.asarray(b)), source, packed
    )
    assert load_voices(target).keys() == load_voices(tiny_model).keys()
    with pytest.raises(CheckpointError, match="exists already"):
        pack_checkpoint(Options(tiny_model, target))


def test_some_components_keep_their_bits(tiny_model: Path, tmp_path: Path) -> None:
    # files of a run, which are left behind
    run = Path(shutil.copytree(tiny_model, tmp_path / "run"))
    of_run = ("run.json", "reference.json")
    for name in of_run:
        (run / name).write_text("{}")
    target = tmp_path / "packed"
    pack_checkpoint(Options(run, target, components=("thinker",)))
    assert list(store.components(target)) == ["thinker"]
    jax.tree.map(np.testing.assert_array_equal, store.load(tiny_model, ["thinker"]), store.load(target))
    assert not any((target / name).exists() for name in of_run) and (target / "tokenizer.json").exists()
    with pytest.raises(CheckpointError, match="has no speech_tokenizer"):
        pack_checkpoint(Options(run, tmp_path / "other", components=("speech_tokenizer",)))


def test_the_thinker_of_another_checkpoint(tiny_model: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    pack_checkpoint(Options(tiny_model, other, components=("thinker",), dtype="bfloat16"))
    target = tmp_path / "joined"
    pack_checkpoint(Options(tiny_model, target, thinker=other))
    joined = store.load(target)
    source = store.load(tiny_model)
    assert joined.keys() == source.keys()
    jax.tree.map(np.testing.assert_array_equal, joined, {**source, **store.load(other)})
    # the language model alone
    pack_checkpoint(Options(tiny_model, tmp_path / "decoder", components=("thinker",), decoder=other))
    thinker = {**source["thinker"], "decoder": store.load(other)["thinker"]["decoder"]}
    jax.tree.map(np.testing.assert_array_equal, store.load(tmp_path / "decoder"), {"thinker": thinker})
    tokenizer = other / TOKENIZER_FILE
    tokenizer.write_text(tokenizer.read_text() + "\n")
    with pytest.raises(CheckpointError, match=r"has another tokenizer\.json"):
        pack_checkpoint(Options(tiny_model, tmp_path / "refused", thinker=other))
    config = OmniConfig.load(other)
    text = dataclasses.replace(config.thinker_config.text_config, rope_theta=1000.0)
    dataclasses.replace(config, thinker_config=dataclasses.replace(config.thinker_config, text_config=text)).save(other)
    with pytest.raises(CheckpointError, match="is of another config"):
        pack_checkpoint(Options(tiny_model, tmp_path / "refused", thinker=other))
    assert not (tmp_path / "refused").exists()


def test_token2wav_of_another_checkpoint(tiny_model: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    pack_checkpoint(Options(tiny_model, other, components=("token2wav",), dtype="bfloat16"))
    distilled = Solver("euler", 4, guidance=False)
    (other / TOKEN2WAV_FILE).write_text(distilled.to_json())
    joined = tmp_path / "joined"
    pack_checkpoint(Options(tiny_model, joined, token2wav=other))
    source = store.load(tiny_model)
    jax.tree.map(np.testing.assert_array_equal, store.load(joined), {**source, **store.load(other)})
    assert Solver.load(joined) == distilled
    # the flow of the one that it is taken from, and not of the one that it replaces
    pack_checkpoint(Options(joined, tmp_path / "published", token2wav=tiny_model))
    assert Solver.load(tmp_path / "published") == Solver()
    config = OmniConfig.load(other)
    dit = dataclasses.replace(config.token2wav_config.dit_config, rope_theta=1000.0)
    token2wav = dataclasses.replace(config.token2wav_config, dit_config=dit)
    dataclasses.replace(config, token2wav_config=token2wav).save(other)
    with pytest.raises(CheckpointError, match=r"the Token2Wav of .* is of another config"):
        pack_checkpoint(Options(tiny_model, tmp_path / "refused", token2wav=other))
    assert not (tmp_path / "refused").exists()


def test_the_mean_of_two_talkers(tiny_model: Path, tmp_path: Path) -> None:
    source = store.load(tiny_model)
    other = tmp_path / "other"
    pack_checkpoint(Options(tiny_model, other, components=("talker",), dtype="bfloat16"))
    target = tmp_path / "mean"
    pack_checkpoint(Options(tiny_model, target, average_talker=other))
    packed = store.load(target)
    # bfloat16 moves nearly every weight, so that the mean is neither of the two
    rounded = store.load(other)["talker"]
    means = jax.tree.map(lambda a, b: (a + b.astype(jnp.float32)) / 2, source["talker"], rounded)
    jax.tree.map(np.testing.assert_array_equal, packed["talker"], means)
    moved = jax.tree.map(lambda a, b: bool(jnp.any(a != b)), source["talker"], means)
    assert any(jax.tree.leaves(moved))
    jax.tree.map(np.testing.assert_array_equal, packed["thinker"], source["thinker"])
    config = OmniConfig.load(other)
    talker = dataclasses.replace(config.talker_config, rope_theta=1000.0)
    dataclasses.replace(config, talker_config=talker).save(other)
    with pytest.raises(CheckpointError, match=r"the Talker of .* is of another config"):
        pack_checkpoint(Options(tiny_model, tmp_path / "refused", average_talker=other))
    assert not (tmp_path / "refused").exists()

"""The speech tokenizer is trained: its quantizer, its losses, its rows, whole runs, and codes of what was trained."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import RECIPES
from omni_jax.checkpoint import store
from omni_jax.checkpoint.fingerprint import find_codec
from omni_jax.checkpoint.train_checkpoints import MODEL_FOLDER, step_folder
from omni_jax.data.examples import Reject
from omni_jax.data.resumed_rows import ResumedRows
from omni_jax.data.sources import Row
from omni_jax.data.transcribed_examples import (
    PrepareTranscribed,
    TranscribedExample,
    labels_text,
    text_labels,
)
from omni_jax.engine.speech_tokenizer_engine import RATE, SpeechTokenizerEngine
from omni_jax.errors import CheckpointError, ConfigError, InputError
from omni_jax.models.vector_quantizer import CodeSums, perplexity, sum_codes, update_codebook
from omni_jax.processing import speech_mel
from omni_jax.processing.audio import MelSettings
from omni_jax.processing.fetch import NO_ACCESS
from omni_jax.processing.media import read_audio
from omni_jax.processing.processor import Processor
from omni_jax.processing.voice_perturbation import VoicePerturbation
from omni_jax.training.loop import train
from omni_jax.training.metrics_log import EVALUATIONS_FILE, METRICS_FILE, read_metrics
from omni_jax.training.objectives import make_objective
from omni_jax.training.optimizer import flatten_params
from omni_jax.training.recipe import RANDOM, CheckpointConfig, EvalConfig, Recipe
from omni_jax.training.run_state import init_state, prepare_workdir
from omni_jax.training.step import make_step
from tests.processes import run
from tools.make_codes import Options, make_codes

RECIPE = RECIPES["speech-tokenizer-tiny"]
CONFIG = RECIPE.objective.model
TOLERANCE = 1e-6  # float32 sums of a few numbers of about 1, in another order


@pytest.fixture(scope="module")
def rows(tone_rows: Path) -> Path:
    return tone_rows


def make_recipe(rows: Path, **changes: Any) -> Recipe:
    data = dataclasses.replace(RECIPE.data, train=(str(rows),), valid=(str(rows),), rows=2, streams=2, tokens=120)
    recipe = dataclasses.replace(
        RECIPE,
        data=data,
        init=RANDOM,
        files="tiny",
        steps=12,
        phases=(dataclasses.replace(RECIPE.phases[0], steps=6), RECIPE.phases[1]),
        optimizer=dataclasses.replace(RECIPE.optimizer, learning_rate=3e-3, warmup=0, ema=0.9),
        checkpoint=CheckpointConfig(every=6),
        eval=EvalConfig(every=6),
    )
    return dataclasses.replace(recipe, **changes)


# the quantizer


def draw(seed: int, count: int = 40, num_codes: int = 8, width: int = 3) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.standard_normal((count, width)).astype(np.float32), rng.integers(0, num_codes, count).astype(np.int32)


def test_sums_of_two_replicas_are_those_of_one() -> None:
    x, codes = draw(0)
    valid = np.arange(len(x)) % 5 != 0
    key = jax.random.key(0)
    whole = sum_codes(x, codes, valid, 8, key)
    halves = [sum_codes(x[part], codes[part], valid[part], 8, key) for part in (slice(0, 20), slice(20, 40))]
    np.testing.assert_allclose(halves[0].counts + halves[1].counts, whole.counts, atol=TOLERANCE)
    np.testing.assert_allclose(halves[0].sums + halves[1].sums, whole.sums, atol=TOLERANCE)
    assert float(jnp.sum(whole.counts)) == valid.sum()
    # candidates are vectors of the batch, and none of its padding
    for candidate in np.asarray(whole.candidates):
        assert (candidate == x[valid]).all(axis=1).any()


@pytest.mark.long
def test_two_devices_have_the_codebook_of_one(rows: Path, tmp_path: Path) -> None:
    recipe = make_recipe(rows, steps=3)
    assert train(recipe, tmp_path / "one")
    data = recipe.data
    options = ["--init", "random", "--model", "tiny", "--data.train", data.train[0], "--data.rows", "2", "--steps", "3"]
    options += ["--data.streams", "2", "--data.tokens", "120", "--phases.0.steps", "6", "--mesh.data", "2"]
    options += ["--optimizer.learning-rate", "3e-3", "--optimizer.warmup", "0", "--optimizer.ema", "0.9"]
    done = run("train.py", "speech-tokenizer-tiny", *options, "--workdir", tmp_path / "two", devices=2)
    assert done.returncode == 0, done.stderr[-2000:]
    one, two = (store.load(step_folder(tmp_path / name, 3), ["speech_tokenizer"]) for name in ("one", "two"))
    for name, value in one["speech_tokenizer"]["quantizer"].items():
        np.testing.assert_allclose(two["speech_tokenizer"]["quantizer"][name], value, atol=1e-4)


@pytest.mark.parametrize("decay", [0.99, 0.8])
def test_the_codebook_is_an_average(decay: float) -> None:
    """Against the formulas of the paper, one code at a time; one code is not used any more."""
    x, codes = draw(1)
    codes[codes == 3] = 4
    rng = np.random.default_rng(2)
    counts = rng.uniform(4, 6, 8).astype(np.float32)
    sums = rng.standard_normal((8, 3)).astype(np.float32)
    params = {"codebook": sums / counts[:, None], "counts": counts, "sums": sums}
    found = sum_codes(x, codes, np.ones(len(x), bool), 8, jax.random.key(1))
    new = update_codebook(params, found, decay)
    total = sum(decay * counts[code] + (1 - decay) * np.sum(codes == code) for code in range(8))
    for code in range(8):
        count = decay * counts[code] + (1 - decay) * np.sum(codes == code)
        mean = decay * sums[code] + (1 - decay) * x[codes == code].sum(axis=0)
        smoothed = (count + 1e-5) / (total + 8e-5) * total
        np.testing.assert_allclose(new["counts"][code], count, rtol=1e-5)
        np.testing.assert_allclose(new["codebook"][code], mean / smoothed, atol=TOLERANCE)


def test_codes_that_are_dead_are_replaced() -> None:
    x, codes = draw(3)
    params = {"codebook": np.zeros((8, 3), np.float32), "counts": np.full(8, 5, np.float32)}
    params["counts"][[2, 6]] = 0.01
    params["sums"] = np.zeros((8, 3), np.float32)
    codes[(codes == 2) | (codes == 6)] = 0
    found = sum_codes(x, codes, np.ones(len(x), bool), 8, jax.random.key(4))
    new = update_codebook(params, found, 0.99)
    for code in (2, 6):
        np.testing.assert_array_equal(new["codebook"][code], found.candidates[code])
        # it lives on: the next batch that nothing is near to does not change it
        empty = CodeSums(found.counts.at[code].set(0), found.sums.at[code].set(0), found.candidates + 1)
        again = update_codebook(new, empty, 0.99)
        np.testing.assert_allclose(again["codebook"][code], found.candidates[code], atol=1e-4)
    # padding alone says nothing
    nothing = sum_codes(x, codes, np.zeros(len(x), bool), 8, jax.random.key(4))
    for name, value in update_codebook(params, nothing, 0.99).items():
        np.testing.assert_array_equal(value, params[name])


def test_perplexity() -> None:
    assert float(perplexity(jnp.array([2.0, 2.0, 2.0, 2.0, 0.0]))) == pytest.approx(4)
    assert float(perplexity(jnp.array([9.0, 0.0]))) == pytest.approx(1)


# rows and batches


def test_labels() -> None:
    assert labels_text(text_labels("  It's 5 o'clock -- NOW, ok?")) == "it's 5 o'clock now ok"
    assert labels_text(text_labels("Größe 語言")) == "grösse 語言"
    assert len(text_labels("...")) == 0


def prepare(folder: Path, row: Mapping[str, Any]) -> list[TranscribedExample] | Reject:
    reader = PrepareTranscribed(MelSettings(), max_codes=39, max_labels=12, access=NO_ACCESS)
    return reader(Row(str(folder / "rows.jsonl"), 1, json.dumps(row).encode()))


def test_a_row_is_read(rows: Path) -> None:
    found = prepare(rows.parent, {"audio": "1.wav", "text": "Top!"})
    assert isinstance(found, list)
    assert found[0].mel.shape == (30, 128) and found[0].target_mel.shape == (30, 80) and found[0].num_tokens == 15
    assert labels_text(found[0].labels) == "top"


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"audio": "1.wav"}, "text is None; it must be what is said"),
        ({"audio": "1.wav", "text": "?!"}, r"text is '\?!', which has no letters"),
        ({"text": "top"}, "audio NoneType: expected a path or a URL"),
        ({"audio": "9.wav", "text": "top"}, "audio '9.wav': no such file"),
        ({"audio": "../9.wav", "text": "top"}, "data.media_root"),
        ({"audio": "2.wav", "text": "high low top"}, r"it has 40 codes, over 39 \(objective.max_codes\)"),
        ({"audio": "1.wav", "text": "top top top top"}, r"its text has 15 labels, over 12 \(objective.max_labels\)"),
        ({"audio": "1.wav", "text": "aabbccddee"}, "its text has 10 labels and its sound 15 codes|has no"),
    ],
)
def test_what_is_wrong_with_a_row(rows: Path, row: dict[str, Any], reason: str) -> None:
    found = prepare(rows.parent, row)
    if row.get("text") == "aabbccddee":
        # ten labels and five pairs of equal ones take all of the fifteen codes; one label more takes too many
        assert isinstance(found, list)
        found = prepare(rows.parent, {**row, "text": "aabbccddeef"})
        reason = "its text has 11 labels and its sound 15 codes, too few to say it"
    assert isinstance(found, Reject)
    assert re.search(reason, found.reason), found.reason


# runs


@pytest.fixture(scope="module")
def trained(rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    workdir = tmp_path_factory.mktemp("tokenizer") / "run"
    assert train(make_recipe(rows), workdir)
    return workdir


def test_a_run(rows: Path, trained: Path, tmp_path: Path) -> None:
    """Losses fall, that of the mel where it trains; the codebook moves; a run goes on with the same numbers."""
    lines = read_metrics(trained / METRICS_FILE)
    assert lines[-1]["content"] < lines[0]["content"]
    assert "mel" not in lines[5] and lines[-1]["mel"] < lines[6]["mel"]
    assert 1 <= lines[-1]["perplexity"] <= CONFIG.codebook_size and 0 < lines[-1]["codebook_use"] <= 1
    held_out = read_metrics(trained / EVALUATIONS_FILE)
    assert held_out[1]["loss"] < held_out[0]["loss"]
    early, late = (store.load(step_folder(trained, step), ["speech_tokenizer"]) for step in (6, 12))
    assert not np.array_equal(
        early["speech_tokenizer"]["quantizer"]["codebook"], late["speech_tokenizer"]["quantizer"]["codebook"]
    )
    shutil.copytree(trained, tmp_path / "run")
    shutil.rmtree(step_folder(tmp_path / "run", 12))
    assert train(make_recipe(rows), tmp_path / "run")
    again = read_metrics(tmp_path / "run" / METRICS_FILE)
    assert [line["loss"] for line in again] == [line["loss"] for line in lines]


def test_blocks_of_another_length(rows: Path) -> None:
    recipe = make_recipe(rows)
    objective: Any = make_objective(dataclasses.replace(recipe, objective=change(recipe, block_codes=10)))
    assert objective.model.config.block_codes == 10
    assert objective.abstract_row(recipe.data).audio.mel.shape == (12, 20, 128)
    with pytest.raises(ConfigError, match=r"objective\.block_codes is 9; it must be an even number"):
        make_objective(dataclasses.replace(recipe, objective=change(recipe, block_codes=9)))


def change(recipe: Recipe, **changes: Any) -> Any:
    return dataclasses.replace(recipe.objective, **changes)


def test_batches_cannot_be_accumulated(rows: Path) -> None:
    recipe = make_recipe(rows, optimizer=dataclasses.replace(RECIPE.optimizer, accumulate=2))
    with pytest.raises(ConfigError, match=r"optimizer\.accumulate"):
        make_objective(recipe)


# codes of what was trained


def test_the_fingerprint_is_of_what_codes_follow_from(trained: Path, tiny_model: Path) -> None:
    early, late = (SpeechTokenizerEngine.load(step_folder(trained, step)) for step in (6, 12))
    assert early.fingerprint != late.fingerprint
    # that of the parameters in memory is that of the files
    assert find_codec(step_folder(trained, 12)) == late.fingerprint
    assert find_codec(step_folder(trained, 6)) == early.fingerprint
    # a run's folder of what does not train describes the tokenizer, and does not have it
    assert find_codec(trained / MODEL_FOLDER) is None and find_codec(tiny_model) is None and find_codec(None) is None


def test_rows_with_codes(rows: Path, trained: Path) -> None:
    out = rows.with_name("codes.jsonl")
    assert make_codes(Options(str(rows), out, trained)) == 0
    engine = SpeechTokenizerEngine.load(step_folder(trained, 12))
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(lines) == 6
    for line, before in zip(lines, rows.read_text().splitlines(), strict=True):
        assert line["codec"] == engine.fingerprint
        assert {key: line[key] for key in ("audio", "text", "voice")} == json.loads(before)
    # a command that was stopped in its third row goes on
    again = rows.with_name("again.jsonl")
    settings = {"rows": str(rows), "num_rows": 6, "codec": engine.fingerprint, "perturbed_by": None}
    with ResumedRows(again, settings) as made:
        for number, line in enumerate(lines[:2]):
            made.add(number, line)
    with again.with_name("again.jsonl.partial").open("ab") as file:
        file.write(b'{"number": 2, "row": {"aud')
    assert make_codes(Options(str(rows), again, trained)) == 0
    assert again.read_text() == out.read_text()
    assert not again.with_name("again.jsonl.partial").exists()


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_codes_of_perturbed_voices(rows: Path, trained: Path) -> None:
    """They are of the sounds that the seed and the row's number give, and the rest of the row is as it was."""
    engine = SpeechTokenizerEngine.load(step_folder(trained, 12))
    values = []
    for number, line in enumerate(read_lines(rows)):
        values.append({**line, "speaker": [0.5, float(number)], "ref_audio": "0.wav", "codec_ids": [1], "codec": "old"})
    source = rows.with_name("voiced.jsonl")
    source.write_text("".join(json.dumps(line) + "\n" for line in values))
    out = rows.with_name("perturbed.jsonl")
    assert make_codes(Options(str(source), out, trained, perturb=True, seed=5)) == 0
    lines = read_lines(out)
    plain = []
    for number, (line, before) in enumerate(zip(lines, values, strict=True)):
        sound = read_audio(str(rows.with_name(before["audio"])), MelSettings(sampling_rate=RATE))
        perturbed = VoicePerturbation().apply(sound, RATE, np.random.default_rng((5, number)))
        found, untouched = engine.encode([perturbed, sound])
        assert line == {**before, "codec_ids": found.tolist(), "codec": engine.fingerprint}
        plain.append(untouched.tolist())
    assert [line["codec_ids"] for line in lines] != plain

    # a command that was stopped goes on to the same rows; one with another seed, or none, does not go on
    again = rows.with_name("perturbed-again.jsonl")
    settings = {"rows": str(source), "num_rows": 6, "codec": engine.fingerprint, "perturbed_by": 5}
    with ResumedRows(again, settings) as made:
        made.add(0, lines[0])
    for changes in ({"perturb": True, "seed": 6}, {}):
        with pytest.raises(InputError, match="with other settings"):
            make_codes(Options(str(source), again, trained, **changes))
    assert make_codes(Options(str(source), again, trained, perturb=True, seed=5)) == 0
    assert again.read_bytes() == out.read_bytes()
    with pytest.raises(InputError, match="seed is -1"):
        make_codes(Options(str(source), again, trained, seed=-1))


@pytest.mark.parametrize("name", ["token2wav-dit", "token2wav-distill", "talker-pretrain", "talker-dpo"])
def test_rows_are_held_to_the_codec_of_the_checkpoint(name: str, trained: Path, tiny_model: Path) -> None:
    recipe = RECIPES[f"{name}-tiny"]
    folder = step_folder(trained, 12)
    assert find_codec_of_rows(recipe, folder) == find_codec(folder) is not None
    assert find_codec_of_rows(recipe, tiny_model) is None
    named = dataclasses.replace(recipe, objective=change(recipe, codec="abc"))
    assert find_codec_of_rows(named, folder) == "abc"


def test_a_run_keeps_the_codec_of_its_checkpoint(trained: Path, tmp_path: Path) -> None:
    """Rows are held to it too when the run is resumed, whatever has become of the checkpoint."""
    folder = step_folder(trained, 12)
    recipe = dataclasses.replace(RECIPES["talker-pretrain-tiny"], init=folder)
    prepare_workdir(recipe, make_objective(recipe), tmp_path / "run", print)
    assert find_codec_of_rows(recipe, tmp_path / "run" / MODEL_FOLDER) == find_codec(folder)


def test_a_dit_begins_with_the_codebook(trained: Path, tmp_path: Path) -> None:
    """Codes that are near each other in the codebook are so among the embeddings, and the velocity has its mean."""
    recipe = dataclasses.replace(RECIPES["token2wav-dit-tiny"], init=step_folder(trained, 12))
    objective = make_objective(recipe)
    prepare_workdir(recipe, objective, tmp_path / "run", print)
    step = make_step(recipe, objective, recipe.phases[0], recipe.steps)
    mesh = recipe.mesh.make()
    with jax.set_mesh(mesh):
        params = init_state(recipe, tmp_path / "run", step, mesh).params
    dit = params["token2wav"]["dit"]
    np.testing.assert_array_equal(dit["proj"]["bias"], speech_mel.LOG_MEAN)
    check_neighbours(np.asarray(dit["codec_embed"]["embedding"]), step_folder(trained, 12))


def test_a_talker_begins_with_the_codebook(trained: Path) -> None:
    """So do the embeddings and the logits of a Talker; they have the shapes of those that they replace."""
    objective = make_objective(RECIPES["talker-pretrain-tiny"])
    values = objective.initial_values("talker", step_folder(trained, 12))
    shapes = flatten_params(nn.unbox(objective.abstract_params()["talker"]))
    assert {path: value.shape for path, value in values.items()} == {path: shapes[path].shape for path in values}
    check_neighbours(values["decoder/embed/embedding"], step_folder(trained, 12))
    check_neighbours(values["decoder/head/kernel"].T, step_folder(trained, 12))


def check_neighbours(table: np.ndarray, folder: Path) -> None:
    """Asserts that the rows of codes are about as far from each other as their vectors in a checkpoint's codebook."""
    codebook = store.load(folder, ["speech_tokenizer"])["speech_tokenizer"]["quantizer"]["codebook"]
    standard = (codebook - codebook.mean(axis=0)) / codebook.std(axis=0)  # [codes, Q]
    table = table[: len(codebook)]
    for code in range(0, len(codebook), 7):
        near, ours = (np.sum(np.square(x - x[code]), axis=1) for x in (standard, table))
        assert np.corrcoef(near, ours)[0, 1] > 0.5


def find_codec_of_rows(recipe: Recipe, folder: Path) -> str | None:
    """What rows are held to in a run whose model lies in a folder."""
    packing: Any = make_objective(recipe).make_packing(recipe.data, Processor.load(folder), recipe.data.streams)
    return packing.prepare.codec


def test_rows_of_another_codec_than_the_checkpoint_s(rows: Path, trained: Path) -> None:
    recipe = RECIPES["token2wav-dit-tiny"]
    objective = make_objective(recipe)
    packing: Any = objective.make_packing(recipe.data, Processor.load(step_folder(trained, 12)), recipe.data.streams)
    found = packing.prepare(Row(str(rows), 1, b'{"audio": "0.wav", "codec_ids": [1], "codec": "abc"}'))
    assert isinstance(found, Reject) and found.is_fatal
    assert "codec is 'abc', and the codec of this run is" in found.reason


def test_rows_are_not_held_to_a_tokenizer_that_trains(trained: Path) -> None:
    recipe = RECIPES["speech-tokenizer-match-tiny"]
    processor = Processor.load(step_folder(trained, 12))
    packing: Any = make_objective(recipe).make_packing(recipe.data, processor, recipe.data.streams)
    assert packing.prepare.speech.codec is None


def test_what_cannot_be_encoded(rows: Path, trained: Path, tiny_model: Path, capsys: Any) -> None:
    bad = rows.with_name("bad.jsonl")
    bad.write_text('{"audio": "none.wav"}\n{"audio": "1.wav"}\n')
    arguments = ("tools/make_codes.py", bad, rows.with_name("out.jsonl"), "--model")
    done = run(*arguments, trained)
    assert done.returncode == 1 and re.search(r"error: .*bad.jsonl.*none.wav.*no such file", done.stderr)
    done = run(*arguments, trained, "--skip-bad")
    assert done.returncode == 0 and "1 rows could not be read" in done.stderr
    assert len(rows.with_name("out.jsonl").read_text().splitlines()) == 1
    with pytest.raises(CheckpointError, match=r"has no speech_tokenizer\.json"):
        SpeechTokenizerEngine.load(tiny_model)

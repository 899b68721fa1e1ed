"""The Talker's first objective: what it trains on is what inference computes."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from omni_jax.checkpoint import store
from omni_jax.checkpoint.train_checkpoints import step_folder
from omni_jax.data.packing import Budget
from omni_jax.data.spoken_packing import SpokenBatch, SpokenBudget
from omni_jax.errors import ConfigError
from omni_jax.models.talker import NO_CODE, Talker
from omni_jax.models.talker_conditioning import begin_codes
from omni_jax.models.thinker import Thinker
from omni_jax.processing.clip_text import ClipText
from omni_jax.processing.layout import lay_out
from omni_jax.processing.processor import Processor
from omni_jax.training.loop import train
from omni_jax.training.metrics_log import EVALUATIONS_FILE, METRICS_FILE, read_metrics
from omni_jax.training.objectives import make_objective as make_objective_of
from omni_jax.training.objectives.next_token import NextToken
from omni_jax.training.objectives.talker import drop_codes
from omni_jax.training.optimizer import flatten_params
from omni_jax.training.options import NextTokenOptions, TalkerOptions
from omni_jax.training.recipe import RANDOM, ParameterGroup, Phase, Recipe
from tests.processes import finish, start
from tests.training.spoken import (
    CLIP_CODES,
    CONFIG,
    QUESTIONS,
    Speaker,
    Spoken,
    load_params,
    make_objective,
    make_spoken,
    pack,
)

EMBEDDING = "thinker/decoder/embed/embedding"
TEXT_BUDGET = SpokenBudget(Budget(1, 64, 8, blocks=0, canvases=0, windows=1), positions=96, utterances=4)
TEXT_OPTIONS = TalkerOptions(positions=96, utterances=4, chunk=32)
# float32 in two orders of summation: whole rows at once, and one position at a time with a cache
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def params(tiny_model: Path) -> dict[str, Any]:
    return load_params(tiny_model)


@pytest.fixture(scope="module")
def spoken(tiny_model: Path) -> dict[str, Spoken]:
    """What the engine says to each kind of question."""
    speaker = Speaker(tiny_model)
    return {kind: speaker.speak(kind) for kind in QUESTIONS}


@pytest.fixture(scope="module")
def trained(spoken: dict[str, Spoken], params: dict[str, Any]) -> dict[str, np.ndarray]:
    """Log-probabilities of all target codes, of all of them in one batch of two rows."""
    objective = make_objective()
    batch, part = pack([found.example for found in spoken.values()])
    assert {placed.row for placed in part.placed} == {0, 1}

    @jax.jit
    def log_probs(params: Any, batch: Any) -> Any:
        return objective.code_log_probs(params, objective.run_models(params, batch, ()), batch).log_probs

    found = np.asarray(log_probs(params, batch))
    by_name = {}
    for placed in part.placed:
        own = (batch.segment_ids[placed.row] == placed.utterance + 1) & (batch.weights[placed.row] > 0)
        by_name[placed.example.name] = found[placed.row][own]
    return by_name


@pytest.mark.parametrize("kind", QUESTIONS)
def test_training_has_the_log_probabilities_of_inference(
    kind: str, spoken: dict[str, Spoken], trained: dict[str, np.ndarray]
) -> None:
    """Of every code and of the end; "clip" is a voice that a clip gives (zero-shot)."""
    np.testing.assert_allclose(trained[kind], spoken[kind].log_probs, rtol=0, atol=TOLERANCE)


@pytest.fixture(scope="module")
def batch() -> SpokenBatch:
    """Three dialogues of text, one behind a clip, with another voice each."""
    rng = np.random.default_rng(0)
    prompt = lay_out(rng.integers(1, 500, 9).tolist(), (), CONFIG.thinker_config)
    clip = ClipText(lay_out(rng.integers(1, 500, 12).tolist(), (), CONFIG.thinker_config), 7)
    examples = []
    for i, voice_token in enumerate((603, 604, 620)):
        codes = rng.integers(0, 66, 5 + 3 * i).astype(np.int32)
        reply = rng.integers(1, 500, 4 + i).tolist()
        of_clip: dict[str, Any] = dict(clip=clip, clip_codes=CLIP_CODES) if i == 1 else {}
        examples.append(make_spoken(prompt, reply, codes, voice_token, name=str(i), **of_clip))
    return pack(examples, TEXT_BUDGET)[0]


def test_the_loss_is_the_mean_over_codes(batch: SpokenBatch, params: dict[str, Any]) -> None:
    objective = make_objective(TEXT_OPTIONS)
    denominators = objective.denominators(batch)

    @jax.jit
    def run(params: Any) -> Any:
        streams = objective.run_models(params, batch, ())
        # of all positions at once, as the Talker's own method makes them
        logits = objective.model.apply({"params": params["talker"]}, streams.talker, method=Talker.logits)
        loss = objective.loss(params, batch, denominators, jax.random.key(0), ())
        return logits, objective.code_log_probs(params, streams, batch).log_probs, loss

    logits, log_probs, loss = jax.device_get(run(params))  # [B, P, V], [B, P]
    is_target = batch.weights > 0
    assert is_target.sum() == 5 + 8 + 11 + 3  # and an end each
    expected = np.asarray(jax.nn.log_softmax(logits))
    expected = np.take_along_axis(expected, np.asarray(batch.targets)[..., None], axis=-1)[..., 0][is_target]
    np.testing.assert_allclose(log_probs[is_target], expected, rtol=0, atol=1e-5)
    assert float(loss.total) == pytest.approx(-float(expected.mean()), rel=1e-5)
    is_top = logits.argmax(-1) == batch.targets
    assert float(loss.terms["code_accuracy"]) == pytest.approx(float(is_top[is_target].mean()), abs=1e-6)
    assert float(loss.terms["loss"]) == float(loss.terms["code_loss"]) == float(loss.total)


def test_codes_that_are_dropped() -> None:
    config = CONFIG.talker_config
    codes = np.arange(8000).reshape(4, 2000) % 64
    codes[:, :3] = [NO_CODE, *begin_codes(config)]
    for fraction in (0.0, 0.3, 1.0):
        found = np.asarray(drop_codes(jax.random.key(0), codes, fraction, config))
        np.testing.assert_array_equal(found[:, :3], codes[:, :3])
        is_dropped = found[:, 3:] == NO_CODE
        np.testing.assert_array_equal(found[:, 3:][~is_dropped], codes[:, 3:][~is_dropped])
        assert is_dropped.mean() == pytest.approx(fraction, abs=0.03)  # six standard deviations


def test_codes_are_dropped_in_training_alone(batch: SpokenBatch, params: dict[str, Any]) -> None:
    options = dataclasses.replace(TEXT_OPTIONS, code_dropout=0.5)
    dropped = drop_codes(jax.random.key(0), batch.codes, 0.5, CONFIG.talker_config)

    def find_loss(options: TalkerOptions, batch: SpokenBatch, trained: Sequence[str]) -> float:
        objective = make_objective(options)
        denominators = objective.denominators(batch)
        loss = jax.jit(lambda params: objective.loss(params, batch, denominators, jax.random.key(0), trained).total)
        return float(loss(params))

    trained = [path for path in flatten_params(params) if path.startswith("talker/")]
    assert find_loss(options, batch, ()) == find_loss(TEXT_OPTIONS, batch, ())
    expected = find_loss(TEXT_OPTIONS, dataclasses.replace(batch, codes=dropped), trained)
    assert find_loss(options, batch, trained) == pytest.approx(expected, rel=1e-6)
    assert expected != pytest.approx(find_loss(TEXT_OPTIONS, batch, ()), rel=1e-3)


def gradients(
    batch: SpokenBatch, params: dict[str, Any], options: TalkerOptions, trained: Sequence[str]
) -> tuple[float, dict[str, np.ndarray]]:
    """The loss that is reported, and gradients by path."""
    objective = make_objective(options)
    denominators = objective.denominators(batch)

    @jax.jit
    def gradient(params: Any) -> Any:
        def total(params: Any) -> Any:
            loss = objective.loss(params, batch, denominators, jax.random.key(0), trained)
            return loss.total, loss.terms["loss"]

        return jax.grad(total, has_aux=True)(params)

    found, loss = gradient(params)
    return float(loss), {path: np.asarray(leaf) for path, leaf in flatten_params(found).items()}


def test_the_loss_of_text_is_that_of_the_thinker_alone(batch: SpokenBatch, params: dict[str, Any]) -> None:
    """It is added where its weight says, and changes what trains of the Thinker; of the Talker it changes nothing."""
    trained = [path for path in flatten_params(params) if "coder/" in path and "_encoder" not in path]
    both = dataclasses.replace(TEXT_OPTIONS, text_weight=0.5, code_weight=2.0)
    loss, found = gradients(batch, params, both, trained)
    code_loss, of_codes = gradients(batch, params, TEXT_OPTIONS, trained)
    next_token = NextToken(Thinker(CONFIG.thinker_config), CONFIG, NextTokenOptions(chunk=64))
    denominators = next_token.denominators(batch.dialogues)

    def text_loss(thinker: Any) -> Any:
        key = jax.random.key(0)
        return next_token.loss({"thinker": thinker}, batch.dialogues, denominators, key, trained).total

    text, of_text = jax.jit(jax.value_and_grad(text_loss))(params["thinker"])
    assert loss == pytest.approx(2 * code_loss + 0.5 * float(text), rel=1e-6)
    text_gradients = flatten_params({"thinker": of_text})
    for path in trained:
        expected = 2 * of_codes[path] + 0.5 * np.asarray(text_gradients.get(path, 0))
        np.testing.assert_allclose(found[path], expected, rtol=0, atol=1e-6, err_msg=path)
    # codes reach the Thinker's layers, and the text its head, which codes do not
    assert np.abs(of_codes["thinker/decoder/layers/mlp/up/kernel"]).max() > 1e-5
    assert not of_codes["thinker/decoder/head/kernel"].any() and found["thinker/decoder/head/kernel"].any()


def test_a_frozen_thinker_has_no_gradient(batch: SpokenBatch, params: dict[str, Any]) -> None:
    trained = [path for path in flatten_params(params) if path.startswith("talker/")]
    _, found = gradients(batch, params, dataclasses.replace(TEXT_OPTIONS, text_weight=1.0), trained)
    for path, gradient in found.items():
        # the bias of keys adds the same to all logits of a query's attention
        if not path.endswith("key/bias"):
            assert gradient.any() == path.startswith("talker/"), path


def test_only_the_embeddings_of_new_voices_train(batch: SpokenBatch, params: dict[str, Any]) -> None:
    trained = [path for path in flatten_params(params) if path.startswith("talker/")] + [EMBEDDING]
    _, found = gradients(batch, params, dataclasses.replace(TEXT_OPTIONS, voices={"Ada": 620, "Eve": 621}), trained)
    # nobody speaks with 621, and 603 is a voice that was there before
    assert np.flatnonzero(found[EMBEDDING].any(axis=1)).tolist() == [620]
    _, found = gradients(batch, params, TEXT_OPTIONS, trained)
    assert not found[EMBEDDING].any()


@pytest.fixture(scope="module")
def spoken_rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve spoken dialogues of text by a published and a new voice, some of them behind a clip."""
    lines = []
    for n in range(12):
        question = {"role": "user", "content": f"What is {n}?"}
        answer = {"role": "assistant", "content": f"It is {n + n * n}."}
        speech: dict[str, Any] = {"codec_ids": [(n + k) % 60 for k in range(8 + 2 * n)]}
        if n % 3:
            speech["voice"] = ("Chelsie", "Ada")[n % 3 - 1]
        else:
            speech["ref"] = {"codec_ids": [n, 3, 4], "text": "a"}
        lines.append(json.dumps({"messages": [question, answer], "speech": speech}))
    file = tmp_path_factory.mktemp("spoken") / "rows.jsonl"
    file.write_text("\n".join(lines) + "\n")
    return file


@pytest.fixture
def make_spoken_recipe(make_recipe: Callable[..., Recipe], spoken_rows: Path) -> Callable[..., Recipe]:
    def make(name: str, **changes: Any) -> Recipe:
        data = {"train": (str(spoken_rows),), "valid": (str(spoken_rows),), "rows": 2, "audio_blocks": 0, "canvases": 0}
        changes = {"eval": {"every": 4}, "checkpoint": {"every": 4}, "steps": 8, "remat": "none", **changes}
        return make_recipe(name, data={**data, **changes.pop("data", {})}, **changes)

    return make


def changed_paths(before: Path, after: Path) -> tuple[set[str], dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Paths of the parameters that differ between two checkpoints, and the parameters of both."""
    old, new = (flatten_params(store.load(folder, ["thinker", "talker", "token2wav"])) for folder in (before, after))
    return {path for path in old if not np.array_equal(old[path], new[path])}, old, new


def test_a_run_with_a_new_voice(make_spoken_recipe: Callable[..., Recipe], tiny_model: Path, tmp_path: Path) -> None:
    """The loss falls; beside the Talker the row of the new voice moves; a run goes on with the same numbers."""
    recipe = make_spoken_recipe("talker-voices", objective={"voices": {"Ada": 620}}, optimizer={"warmup": 0})
    assert train(recipe, tmp_path / "run")
    held_out = [values["loss"] for values in read_metrics(tmp_path / "run" / EVALUATIONS_FILE)]
    assert len(held_out) == 2 and held_out[1] < held_out[0]
    metrics = read_metrics(tmp_path / "run" / METRICS_FILE)
    for values in metrics:
        assert (
            values["target_tokens"] > 0 and values["loss"] == values["code_loss"] and 0 <= values["code_accuracy"] <= 1
        )
    assert metrics[-1]["code_accuracy"] > metrics[0]["code_accuracy"]

    trained = step_folder(tmp_path / "run", 8)
    changed, old, new = changed_paths(tiny_model, trained)
    assert {path for path in changed if not path.startswith("talker/")} == {EMBEDDING}
    assert {path for path in old if path.startswith("talker/")} <= changed
    assert np.flatnonzero((old[EMBEDDING] != new[EMBEDDING]).any(axis=1)).tolist() == [620]

    shutil.rmtree(trained)
    assert train(recipe, tmp_path / "run")
    found = read_metrics(tmp_path / "run" / METRICS_FILE)
    assert [values["loss"] for values in found] == [values["loss"] for values in metrics]


def test_a_run_from_nothing(make_spoken_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    """Both models begin at random; where there are no voices yet, all are new; text trains beside codes."""
    recipe = make_spoken_recipe(
        "talker-pretrain", objective={"voices": {"Ada": 620, "Chelsie": 621}, "text_weight": 1.0}, steps=2
    )
    both = Phase("both", (ParameterGroup("(talker|thinker/decoder)/.*"),))
    data = dataclasses.replace(recipe.data, valid=())
    recipe = dataclasses.replace(recipe, init=RANDOM, files="tiny", phases=(both,), data=data)
    assert train(recipe, tmp_path / "run")
    assert sorted(store.components(step_folder(tmp_path / "run", 2))) == ["talker", "thinker"]
    (values, _) = read_metrics(tmp_path / "run" / METRICS_FILE)
    assert values["loss"] == pytest.approx(values["code_loss"] + values["text_loss"], rel=1e-6)


def test_a_checkpoint_without_a_thinker(
    make_spoken_recipe: Callable[..., Recipe], tiny_model: Path, tmp_path: Path
) -> None:
    """What the Talker reads must be there, and is not made at random behind the user's back."""
    init = Path(shutil.copytree(tiny_model, tmp_path / "init"))
    about = json.loads((init / store.ABOUT_FILE).read_text())
    del about["components"]["thinker"]
    (init / store.ABOUT_FILE).write_text(json.dumps(about))
    recipe = make_spoken_recipe("talker-pretrain", objective={"voices": {"Ada": 620}})
    recipe = dataclasses.replace(recipe, init=init)
    with pytest.raises(ConfigError, match="the checkpoint to begin from has no thinker"):
        train(recipe, tmp_path / "run")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(objective={"positions": 3}), "objective.positions is 3; it must be from 4"),
        (dict(objective={"voices": {"Ada": 640}}), "objective.voices: 'Ada' begins with the token 640, but the Think"),
        (dict(objective={"voices": {"Chelsie": 620}}), "'Chelsie' is a voice of the checkpoint and begins with the"),
        (dict(mesh={"sequence": 2}, objective={"positions": 511}), "mesh.sequence 2 does not divide objective.pos"),
        (dict(lora={"rank": 2}), "lora.rank: there are no adapters for this objective"),
    ],
)
def test_recipes_that_cannot_be(
    make_spoken_recipe: Callable[..., Recipe], changes: dict[str, dict], message: str, tiny_model: Path
) -> None:
    recipe = make_spoken_recipe("talker-voices")
    for name, values in changes.items():
        recipe = dataclasses.replace(recipe, **{name: dataclasses.replace(getattr(recipe, name), **values)})
    with pytest.raises(ConfigError, match=message):
        make_objective_of(recipe).make_packing(recipe.data, Processor.load(tiny_model), 1)


@pytest.mark.long
@pytest.mark.parametrize("mesh", [("data", "fsdp"), ("data", "sequence")], ids="-".join)
def test_four_devices_have_the_losses_of_one(
    make_spoken_recipe: Callable[..., Recipe], mesh: tuple[str, str], tmp_path: Path
) -> None:
    data = {"valid": (), "rows": 4, "streams": 4}
    recipe = make_spoken_recipe("talker-voices", data=data, objective={"voices": {"Ada": 620}}, steps=3)
    assert train(recipe, tmp_path / "one")
    options = ["--init", str(recipe.init), "--data.train", recipe.data.train[0], "--objective.voices", "Ada", "620"]
    options += ["--data.rows", "4", "--data.streams", "4", "--data.audio-blocks", "0", "--data.canvases", "0"]
    options += ["--steps", "3", "--remat", "none"]
    for axis in mesh:
        options += [f"--mesh.{axis}", "2"]
    finish(start("train.py", "talker-voices-tiny", *options, "--workdir", str(tmp_path / "four"), devices=4))
    one, four = ([m["loss"] for m in read_metrics(tmp_path / run / METRICS_FILE)] for run in ("one", "four"))
    # sums of float32 in another order, and what the optimizer makes of it
    assert four == pytest.approx(one, rel=1e-4)

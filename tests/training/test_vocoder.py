"""The vocoder of Token2Wav is trained: its rows and segments, its losses, and whole runs."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import wave
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import omni_jax
from configs import RECIPES
from omni_jax.checkpoint import store
from omni_jax.checkpoint.convert import to_jax
from omni_jax.checkpoint.train_checkpoints import step_folder
from omni_jax.config import BigVGANConfig, OmniConfig
from omni_jax.data.examples import Reject
from omni_jax.data.segment_examples import FRAME_SAMPLES, PrepareSegments, SegmentExample, pad_and_analyze
from omni_jax.data.segment_packing import SegmentBatch, SegmentPacking
from omni_jax.data.sources import Row
from omni_jax.errors import ConfigError, InputError
from omni_jax.models.token2wav import SAMPLE_RATE
from omni_jax.processing.audio import resample
from omni_jax.processing.fetch import NO_ACCESS
from omni_jax.processing.speech_mel import RATE, speech_log_mel
from omni_jax.training.loop import train
from omni_jax.training.metrics_log import EVALUATIONS_FILE, METRICS_FILE, read_metrics
from omni_jax.training.objectives import make_objective
from omni_jax.training.objectives.vocoder import AdversarialVocoder
from omni_jax.training.optimizer import flatten_params, split_params
from omni_jax.training.recipe import RANDOM, Recipe
from omni_jax.training.step import TrainState, make_step
from tools import convert as command

SEGMENT = 16
CONTEXT = 4
TOLERANCE = 1e-5  # of a loss: float32 sums in another order
MODEL = OmniConfig.tiny()


def make_sound(seconds: float, seed: int = 0) -> np.ndarray:
    """A voice of a few harmonics whose pitch glides."""
    rng = np.random.default_rng(seed)
    time = np.arange(int(seconds * SAMPLE_RATE)) / SAMPLE_RATE
    phase = 2 * np.pi * np.cumsum(rng.uniform(100, 250) * (1 + 0.3 * np.sin(2 * np.pi * time))) / SAMPLE_RATE
    sound = sum(np.sin(k * phase) / k for k in range(1, 8))
    return (0.2 * sound + 0.005 * rng.standard_normal(len(time))).astype(np.float32)


def write_sound(path: Path, samples: np.ndarray, rate: int = SAMPLE_RATE) -> None:
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes((samples * 32767).astype("<i2").tobytes())


@pytest.fixture(scope="module")
def sound_rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six sounds, some of them shorter than a segment."""
    folder = tmp_path_factory.mktemp("sounds")
    lines = []
    for i, seconds in enumerate((0.5, 0.31, 0.1, 0.7, 0.44, 0.2)):
        write_sound(folder / f"{i}.wav", make_sound(seconds, i))
        lines.append(json.dumps({"audio": f"{i}.wav", "text": "passed over"}))
    (folder / "rows.jsonl").write_text("\n".join(lines))
    return folder / "rows.jsonl"


def prepare(folder: Path, row: Any) -> list[SegmentExample] | Reject:
    return PrepareSegments(SEGMENT, CONTEXT, NO_ACCESS)(Row(str(folder / "rows.jsonl"), 1, json.dumps(row).encode()))


def test_the_mel_of_a_segment_is_that_of_its_samples() -> None:
    """Frames are those of the samples beside them: the mel of a cut, away from its ends, is the cut of the mel."""
    samples = make_sound(0.6)
    mel, padded = pad_and_analyze(samples, 60, CONTEXT)
    assert len(mel) == 60 + 2 * CONTEXT and len(padded) == len(mel) * FRAME_SAMPLES
    np.testing.assert_array_equal(padded[CONTEXT * FRAME_SAMPLES : -CONTEXT * FRAME_SAMPLES], samples)
    begin = 20
    end = 50
    cut = padded[begin * FRAME_SAMPLES : end * FRAME_SAMPLES]
    of_cut = speech_log_mel(resample(cut, SAMPLE_RATE, RATE))
    assert len(of_cut) == end - begin
    # three frames at either end see beyond it; what is left is the resampler's filter, which sees further
    np.testing.assert_allclose(of_cut[4:-4], mel[begin + 4 : end - 4], atol=0.02)
    # a frame further it is another one
    assert np.abs(of_cut[4:-4] - mel[begin + 5 : end - 3]).max() > 0.5


@pytest.mark.parametrize("num_frames", [10, 16, 17, 31, 32, 33, 47, 48, 100])
def test_every_place_of_a_sound_is_in_one_example(tmp_path: Path, num_frames: int) -> None:
    # a sample beyond whole frames, which is left out
    samples = make_sound(num_frames / 100 + 0.001)
    write_sound(tmp_path / "a.wav", samples)
    examples = prepare(tmp_path, {"audio": "a.wav"})
    assert isinstance(examples, list)
    num_places = max(num_frames, SEGMENT) - SEGMENT + 1
    assert sum(example.places for example in examples) == num_places
    assert len(examples) == -(-num_places // SEGMENT)
    mel, padded = pad_and_analyze(samples, max(num_frames, SEGMENT), CONTEXT)
    begin = 0
    for example in examples:
        assert 1 <= example.places <= SEGMENT and example.num_tokens == SEGMENT
        num_own = example.places - 1 + SEGMENT
        assert len(example.mel) == num_own + 2 * CONTEXT and len(example.samples) == num_own * FRAME_SAMPLES
        # the samples of the last segment that can be cut out
        last = example.samples[-SEGMENT * FRAME_SAMPLES :]
        first = (begin + example.places - 1 + CONTEXT) * FRAME_SAMPLES
        np.testing.assert_allclose(last, padded[first : first + len(last)], atol=1e-4)  # of 16 bits
        np.testing.assert_allclose(example.mel[0], mel[begin], atol=0.05)
        begin += example.places


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({}, "audio NoneType: expected a path or a URL"),
        ({"audio": "none.wav"}, "audio 'none.wav': no such file"),
        ({"audio": "../x.wav"}, r"audio '../x.wav': .* is not within .*data.media_root"),
        ({"audio": "https://example.com/a.wav"}, "audio .*allow-web"),
        ({"audio": "rows.jsonl"}, "audio 'rows.jsonl': .*not.*"),
        ([], "a row must be an object, got list"),
    ],
)
def test_what_is_wrong_with_a_row(sound_rows: Path, row: Any, reason: str) -> None:
    found = prepare(sound_rows.parent, row)
    assert isinstance(found, Reject) and not found.is_fatal
    assert re.search(reason, found.reason), found.reason


@pytest.fixture
def recipe(make_recipe: Callable[..., Recipe], sound_rows: Path) -> Recipe:
    data = {"train": (str(sound_rows),), "valid": (str(sound_rows),), "rows": 4, "streams": 2, "tokens": SEGMENT}
    data["media_root"] = str(sound_rows.parent)
    phases = RECIPES["vocoder-tiny"].phases
    return make_recipe(
        "vocoder",
        data=data,
        phases=(dataclasses.replace(phases[0], steps=8), phases[1]),
        optimizer={"learning_rate": 1e-3, "warmup": 0},
        eval={"every": 6},
        checkpoint={"every": 2},
        steps=12,
    )


def make_batch(recipe: Recipe, num_rows: int = 4) -> SegmentBatch:
    """Of the first rows of the recipe's file; the others are padding."""
    objective: Any = make_objective(recipe)
    packing: SegmentPacking = objective.make_packing(recipe.data, None, 1)
    parts = [packing.new_part() for _ in range(2)]
    lines = Path(recipe.data.train[0]).read_text().splitlines()
    for number in range(num_rows):
        examples = packing.prepare(Row(recipe.data.train[0], number + 1, lines[number].encode()))
        assert isinstance(examples, list)
        assert any(part.place(examples[0]) for part in parts)
    return packing.assemble(parts, first=0, streams=2)


@pytest.fixture(scope="module")
def params(tiny_model: Path) -> dict[str, Any]:
    objective = make_objective(RECIPES["vocoder-tiny"])
    key = jax.random.key(0)
    return {**store.load(tiny_model, ["token2wav"]), "discriminators": objective.init_params("discriminators", key)}


def adversarial(recipe: Recipe) -> AdversarialVocoder:
    objective = make_objective(recipe).for_phase(["discriminators/x", "token2wav/bigvgan/x"])
    assert isinstance(objective, AdversarialVocoder)
    return objective


def test_a_segment_is_cut_where_the_step_says(recipe: Recipe) -> None:
    objective = adversarial(recipe)
    batch = make_batch(recipe)
    places = set()
    for seed in range(40):
        segments = jax.device_get(objective._cut(batch, jax.random.key(seed)))
        assert segments.mel.shape == (4, SEGMENT + 2 * CONTEXT, 80)
        # of the first row, which has the most places: the mel and the samples begin at one and the same
        first = [
            n for n in range(SEGMENT) if np.array_equal(batch.mel[0][n : n + len(segments.mel[0])], segments.mel[0])
        ]
        (begin,) = first
        samples = batch.samples[0][begin * FRAME_SAMPLES :][: SEGMENT * FRAME_SAMPLES]
        np.testing.assert_array_equal(segments.samples[0], samples)
        places.add(begin)
    assert min(places) == 0 and max(places) == batch.places[0] - 1


def test_gradients_reach_what_trains_alone(recipe: Recipe, params: dict[str, Any]) -> None:
    """The discriminators' loss says nothing of the vocoder, and that of the vocoder nothing of what it is told by."""
    objective = adversarial(recipe)
    batch = make_batch(recipe)
    key = jax.random.key(0)
    paths = [path for path in flatten_params(params) if "/dit/" not in path]
    of_discriminators, of_vocoder = objective.optimizer_groups(paths)
    denominators = objective.denominators(batch)

    def gradient(trained: tuple[str, ...]) -> dict[str, np.ndarray]:
        loss = jax.jit(jax.grad(lambda params: objective.loss(params, batch, denominators, key, trained).total))
        return flatten_params(jax.device_get(loss(params)))

    of_first = gradient(of_discriminators)
    assert {path for path, leaf in of_first.items() if leaf.any()} == set(of_discriminators)
    # a loss of the vocoder passes through the discriminators, but the step takes the gradient of the vocoder alone
    of_second = gradient(of_vocoder)
    assert all(of_second[path].any() for path in of_vocoder)
    assert not any(leaf.any() for path, leaf in of_second.items() if "/dit/" in path)


def test_discriminators_are_updated_first(recipe: Recipe, params: dict[str, Any]) -> None:
    """The vocoder's loss in a step is that of the discriminators that the step has just made."""
    recipe = dataclasses.replace(recipe, optimizer=dataclasses.replace(recipe.optimizer, learning_rate=0.01))
    step = make_step(recipe, make_objective(recipe), recipe.phases[1], 10)
    batch = make_batch(recipe)
    trained, frozen = split_params(params, step.scales)
    state = TrainState(jnp.int32(0), trained, frozen, step.transformation.init(trained))
    after, metrics = jax.jit(step)(state, batch)
    key = jax.random.fold_in(jax.random.key(recipe.seed), 0)
    objective = step.objective
    paths = step.groups[1]
    loss = jax.jit(lambda params: objective.loss(params, batch, objective.denominators(batch), key, paths).terms)
    mixed = {**state.params, "discriminators": after.params["discriminators"]}
    expected = loss(mixed)
    for name in ("adversarial", "features", "mel"):
        assert float(metrics["terms"][name]) == pytest.approx(float(expected[name]), rel=TOLERANCE)
    before = loss(state.params)
    assert float(before["adversarial"]) != pytest.approx(float(expected["adversarial"]), rel=1e-3)
    # and the other way round: the discriminators were told by the vocoder as it was
    trained = step.groups[0]
    own = jax.jit(lambda params: objective.loss(params, batch, objective.denominators(batch), key, trained).terms)
    assert float(metrics["terms"]["discriminator"]) == pytest.approx(
        float(own(state.params)["discriminator"]), rel=TOLERANCE
    )


def test_a_phase_without_discriminators_has_the_mel_alone(recipe: Recipe, params: dict[str, Any]) -> None:
    objective = make_objective(recipe).for_phase(["token2wav/bigvgan/x"])
    batch = make_batch(recipe)
    key = jax.random.key(0)
    denominators = objective.denominators(batch)
    loss = jax.jit(lambda params, batch: objective.loss(params, batch, denominators, key, ("token2wav/bigvgan/x",)))
    found = loss(params, batch)
    assert set(found.terms) == {"loss", "mel"}
    assert float(found.total) == pytest.approx(15 * float(found.terms["mel"]), rel=TOLERANCE)
    # no discriminator is asked
    assert set(loss(params | {"discriminators": {}}, batch).terms) == {"loss", "mel"}


def test_padding_changes_nothing(recipe: Recipe, params: dict[str, Any]) -> None:
    """A batch of two rows and padding has their mean; held-out sound is measured by its distances alone."""
    objective = adversarial(recipe)
    batch = make_batch(recipe, num_rows=2)
    assert (np.asarray(batch.places) > 0).sum() == 2
    key = jax.random.key(0)
    losses = jax.jit(lambda batch: objective.loss(params, batch, objective.denominators(batch), key, ()).terms)
    found = losses(batch)
    assert set(found) == {"loss", "mel", "stft"} and float(found["mel"]) > 0
    noise = np.random.default_rng(0).standard_normal(batch.mel.shape).astype(np.float32)
    padding = (np.asarray(batch.places) == 0)[:, None]
    spoiled = dataclasses.replace(
        batch,
        mel=np.where(padding[..., None], noise, batch.mel),
        samples=np.where(padding, np.float32(np.nan), batch.samples),
    )
    for name, value in losses(spoiled).items():
        assert float(value) == pytest.approx(float(found[name]), rel=TOLERANCE)


def test_a_run(recipe: Recipe, tiny_model: Path, tmp_path: Path) -> None:
    """The error of held-out sound falls, all else stays, and a run that was killed goes on to the same losses."""
    assert train(recipe, tmp_path / "run")
    held_out = read_metrics(tmp_path / "run" / EVALUATIONS_FILE)
    assert [values["step"] for values in held_out] == [6, 12]
    assert held_out[1]["mel"] < held_out[0]["mel"] and all(values["stft"] > 0 for values in held_out)
    metrics = read_metrics(tmp_path / "run" / METRICS_FILE)
    assert all(values["tokens"] > 0 and np.isfinite(values["loss"]) for values in metrics)
    assert ["adversarial" in values for values in metrics] == [False] * 8 + [True] * 4
    assert metrics[7]["mel"] < 0.8 * metrics[0]["mel"]

    trained = step_folder(tmp_path / "run", 12)
    assert set(store.components(trained)) == {"thinker", "talker", "token2wav", "discriminators"}
    before = flatten_params(store.load(tiny_model, ["thinker", "talker", "token2wav"]))
    after = flatten_params(store.load(trained, ["thinker", "talker", "token2wav"]))
    changed = {path for path in before if not np.array_equal(before[path], after[path])}
    assert changed == {path for path in before if path.startswith("token2wav/bigvgan/")}
    discriminators = [store.load(step_folder(tmp_path / "run", step), ["discriminators"]) for step in (8, 12)]
    pairs = zip(*(jax.tree.leaves(tree) for tree in discriminators), strict=True)
    assert all(not np.array_equal(one, other) for one, other in pairs)

    # in the second phase, where both networks have moments
    shutil.rmtree(trained)
    assert train(recipe, tmp_path / "run")
    found = read_metrics(tmp_path / "run" / METRICS_FILE)
    assert [values["loss"] for values in found] == [values["loss"] for values in metrics]
    assert [values.get("discriminator") for values in found] == [values.get("discriminator") for values in metrics]


def test_what_is_trained_speaks_and_goes_to_pytorch(
    recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without the discriminators, for which the published model has no place."""
    data = dataclasses.replace(recipe.data, valid=())
    recipe = dataclasses.replace(recipe, phases=recipe.phases[1:], steps=1, data=data)
    assert train(recipe, tmp_path / "run")
    folder = step_folder(tmp_path / "run", 1)
    model = omni_jax.load(folder)
    sound = model.synthesize(np.arange(24) % 60, seed=0)
    assert len(sound) == 48 * FRAME_SAMPLES and np.isfinite(sound).all()
    command.main(["to-hf", str(folder), str(tmp_path / "published")])
    assert "left out: discriminators" in capsys.readouterr().out
    to_jax(tmp_path / "published", tmp_path / "again")
    again = store.load(tmp_path / "again")
    jax.tree.map(np.testing.assert_array_equal, again, store.load(folder, list(again)))
    assert set(again) == {"thinker", "talker", "token2wav"}


def test_a_run_from_nothing_without_discriminators(recipe: Recipe, tmp_path: Path) -> None:
    data = dataclasses.replace(recipe.data, valid=())
    phases = (dataclasses.replace(recipe.phases[0], steps=None),)
    recipe = dataclasses.replace(recipe, init=RANDOM, files="tiny", steps=2, data=data, phases=phases)
    assert make_objective(recipe).components == ("token2wav",)
    assert train(recipe, tmp_path / "run")
    assert list(store.components(step_folder(tmp_path / "run", 2))) == ["token2wav"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(objective={"context": -1}), "objective.context is -1"),
        (dict(objective={"channels": 0}), "objective.channels is 0"),
        (dict(objective={"mel_weight": float("nan")}), "objective.mel_weight is nan"),
        (dict(eval={"samples": 2}), "eval.samples asks for answers, which a vocoder does not give"),
        (dict(parts={"llm": Path("x")}), "--parts are of the Thinker, which this recipe does not train"),
        (dict(lora={"rank": 2}), "lora.rank: there are no adapters for this objective"),
        (dict(data={"tokens": 8}), "data.tokens is 8; a segment must have 9 mel frames"),
        (dict(data={"isolate_media": True}), "data.isolate_media is not there for rows of speech"),
    ],
)
def test_recipes_that_cannot_be(recipe: Recipe, changes: dict[str, dict], message: str) -> None:
    for name, values in changes.items():
        recipe = dataclasses.replace(recipe, **{name: dataclasses.replace(getattr(recipe, name), **values)})
    with pytest.raises((ConfigError, InputError), match=message):
        objective: Any = make_objective(recipe)
        objective.make_packing(recipe.data, None, 1)


def test_a_vocoder_of_another_rate_is_refused(recipe: Recipe) -> None:
    vocoder = BigVGANConfig.tiny(upsample_rates=(16, 14))
    model = dataclasses.replace(
        MODEL, token2wav_config=dataclasses.replace(MODEL.token2wav_config, bigvgan_config=vocoder)
    )
    with pytest.raises(ConfigError, match=r"the vocoder makes 224 samples of a mel frame .* there are 240"):
        make_objective(dataclasses.replace(recipe, model=model))

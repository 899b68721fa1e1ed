"""The speaker verifier: its loss, its rows, whole runs, and what is done with the vectors."""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
import shutil
import wave
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

import omni_jax
from configs import RECIPES
from omni_jax.checkpoint import store
from omni_jax.checkpoint.train_checkpoints import step_folder
from omni_jax.checkpoint.voices import load_voices
from omni_jax.config import OmniConfig
from omni_jax.data.examples import Reject
from omni_jax.data.resumed_rows import ResumedRows
from omni_jax.data.sources import Row
from omni_jax.data.speaker_examples import PERTURBATIONS, PrepareSpeakers, SpeakerExample
from omni_jax.engine.speaker_engine import SpeakerEngine
from omni_jax.errors import CheckpointError, ConfigError, InputError
from omni_jax.generation.components import load_speaker_model
from omni_jax.mini_config import mini_config
from omni_jax.models.speaker_verifier import SpeakerVerifier, margin_logits
from omni_jax.processing.fetch import NO_ACCESS
from omni_jax.processing.speaker_mel import cut_segments, speaker_log_mel
from omni_jax.processing.speech_mel import RATE
from omni_jax.processing.voice_clip import read_clip
from omni_jax.speaker_verifier_config import SPEAKER_VERIFIER, SpeakerVerifierConfig
from omni_jax.training.loop import train
from omni_jax.training.metrics_log import EVALUATIONS_FILE, METRICS_FILE, read_metrics
from omni_jax.training.objectives import make_objective
from omni_jax.training.recipe import RANDOM, CheckpointConfig, EvalConfig, Recipe
from tools.add_voice import main as add_voice
from tools.make_speaker_vectors import main, make_speaker_vectors
from tools.sound_rows import SoundRowOptions

TOLERANCE = 1e-5  # of losses and gradients: float32 sums in another order
SEGMENT = 50
VOICES = ("ann", "ben", "cat")
RESONANCES = {"ann": (400, 2600), "ben": (800, 1500), "cat": (1200, 3400)}  # Hz, of each voice
STEPS = 40


def make_sound(voice: str, seed: int, seconds: float = 1.0) -> np.ndarray:
    """Syllables of noise and harmonics through the resonances of a voice, at a pitch that does not tell voices."""
    rng = np.random.default_rng(seed)
    time = np.arange(int(seconds * RATE)) / RATE
    pitch = rng.uniform(100, 200)
    sound = 0.002 * rng.standard_normal(len(time))
    syllables = np.maximum(0, np.sin(2 * np.pi * rng.uniform(3, 5) * time + rng.uniform(0, 6)))
    for harmonic in range(1, int(4000 / pitch)):
        distances = [abs(harmonic * pitch - resonance) for resonance in RESONANCES[voice]]
        level = np.exp(-min(distances) / 200)
        sound += 0.1 * level * syllables * np.sin(2 * np.pi * harmonic * pitch * time + rng.uniform(0, 6))
    return sound.astype(np.float32)


def write_sound(path: Path, samples: np.ndarray) -> None:
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(RATE)
        file.writeframes((samples * 32767).astype("<i2").tobytes())


def write_rows(path: Path, first_seed: int, count: int) -> Path:
    lines = []
    for number, voice in itertools.product(range(count), VOICES):
        name = f"{path.stem}-{voice}-{number}.wav"
        write_sound(path.with_name(name), make_sound(voice, first_seed + 100 * number + len(lines)))
        lines.append(json.dumps({"audio": name, "voice": voice, "text": "passed over"}))
    path.write_text("\n".join(lines))
    return path


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight sounds of each voice; beside them two of each that are held out."""
    folder = tmp_path_factory.mktemp("voices")
    write_rows(folder / "test.jsonl", 50_000, 2)
    return write_rows(folder / "train.jsonl", 0, 8)


def make_recipe(rows: Path, **changes: Any) -> Recipe:
    recipe = RECIPES["speaker-verifier-tiny"]
    data = dataclasses.replace(
        recipe.data,
        train=(str(rows),),
        valid=(str(rows.with_name("test.jsonl")),),
        rows=8,
        streams=2,
        tokens=SEGMENT,
    )
    fields: dict[str, Any] = dict(
        data=data,
        init=RANDOM,
        files="tiny",
        steps=STEPS,
        checkpoint=CheckpointConfig(every=10, keep=9),
        eval=EvalConfig(every=STEPS),
        objective=dataclasses.replace(recipe.objective, speakers=VOICES, perturbations=0),
        optimizer=dataclasses.replace(recipe.optimizer, learning_rate=1e-2),
    )
    return dataclasses.replace(recipe, **{**fields, **changes})


@pytest.fixture(scope="module")
def trained(rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    workdir = tmp_path_factory.mktemp("run") / "run"
    assert train(make_recipe(rows), workdir)
    return workdir


# the loss


def torch_margin_loss(cosines: torch.Tensor, speakers: torch.Tensor, scale: float, margin: float) -> torch.Tensor:
    """By the angle itself; where it and the margin are over pi, by the line of the authors' code."""
    right = cosines[torch.arange(len(speakers)), speakers]
    angle = torch.arccos(right) + margin
    moved = torch.where(angle < np.pi, torch.cos(angle), right - margin * np.sin(margin))
    logits = cosines.clone()
    logits[torch.arange(len(speakers)), speakers] = moved
    return torch.nn.functional.cross_entropy(scale * logits, speakers, reduction="none")


@pytest.mark.parametrize(("scale", "margin"), [(30.0, 0.2), (8.0, 0.5), (1.0, 0.0)])
def test_the_loss_is_pytorchs(scale: float, margin: float) -> None:
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((64, 6)).astype(np.float32)
    centres = rng.standard_normal((5, 6)).astype(np.float32)
    speakers = rng.integers(0, 5, 64)
    # some that are far on the wrong side, where the cosine would rise again
    vectors[:3] = -centres[speakers[:3]] + 0.1 * vectors[:3]
    weights = rng.uniform(0.5, 2, 64).astype(np.float32)

    def total(vectors: Any, centres: Any) -> Any:
        units = vectors / jnp.linalg.norm(vectors, axis=-1, keepdims=True)
        cosines = units @ (centres / jnp.linalg.norm(centres, axis=-1, keepdims=True)).T
        logits = margin_logits(cosines, speakers, margin, scale)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, speakers)
        return jnp.mean(weights * losses), losses

    (_, losses), gradients = jax.value_and_grad(total, argnums=(0, 1), has_aux=True)(vectors, centres)
    of_torch = [torch.tensor(array, dtype=torch.float64, requires_grad=True) for array in (vectors, centres)]
    units, unit_centres = (torch.nn.functional.normalize(array, dim=-1) for array in of_torch)
    cosines = units @ unit_centres.T
    right = cosines[torch.arange(64), torch.tensor(speakers)]
    assert margin == 0 or bool((torch.arccos(right) + margin > np.pi).any())
    expected = torch_margin_loss(cosines, torch.tensor(speakers), scale, margin)
    (torch.tensor(weights) * expected).mean().backward()
    np.testing.assert_allclose(losses, expected.detach(), rtol=TOLERANCE, atol=TOLERANCE)
    for found, leaf in zip(gradients, of_torch, strict=True):
        assert leaf.grad is not None
        np.testing.assert_allclose(found, leaf.grad, rtol=TOLERANCE, atol=TOLERANCE)


def test_a_vector_of_its_own_speaker_has_a_gradient() -> None:
    """At an angle of 0, where the derivative of the sine has a pole."""
    cosines = jnp.array([[1.0, 0.3], [-1.0, 0.3]])
    gradient = jax.grad(lambda cosines: margin_logits(cosines, jnp.array([0, 0]), 0.2, 30.0).sum())(cosines)
    assert np.isfinite(gradient).all()


# rows


def prepare(folder: Path, row: Any, perturbations: int = 0) -> list[SpeakerExample] | Reject:
    reader = PrepareSpeakers(VOICES, perturbations, SEGMENT, NO_ACCESS)
    return reader(Row(str(folder / "rows.jsonl"), 7, json.dumps(row).encode()))


def test_a_sound_is_cut_into_segments(tmp_path: Path) -> None:
    write_sound(tmp_path / "a.wav", make_sound("ben", 0, 1.23))
    examples = prepare(tmp_path, {"audio": "a.wav", "voice": "ben"})
    assert isinstance(examples, list)
    assert [len(example.mel) for example in examples] == [SEGMENT] * 3
    assert {example.speaker for example in examples} == {1}
    (whole,) = cut_segments(np.concatenate([example.mel for example in examples])[:40], SEGMENT)
    assert len(whole) == 40


@pytest.mark.parametrize("count", [50, 51, 99, 100, 101, 333])
def test_segments_cover_a_sound(count: int) -> None:
    frames = np.arange(count * 80, dtype=np.float32).reshape(count, 80)
    segments = cut_segments(frames, SEGMENT)
    assert {len(segment) for segment in segments} == {SEGMENT} and len(segments) == -(-count // SEGMENT)
    assert set(np.concatenate(segments)[:, 0].tolist()) == set(frames[:, 0].tolist())


def test_a_perturbed_voice_is_another_speaker(tmp_path: Path) -> None:
    write_sound(tmp_path / "a.wav", make_sound("cat", 0, 0.5))
    examples = prepare(tmp_path, {"audio": "a.wav", "voice": "cat"}, len(PERTURBATIONS))
    assert isinstance(examples, list)
    assert [example.speaker for example in examples] == [2, 5, 8, 11, 14, 17, 20]
    for one, other in itertools.combinations(examples, 2):
        assert np.abs(one.mel - other.mel).mean() > 0.3


@pytest.mark.parametrize(
    ("row", "reason", "is_fatal"),
    [
        ({"audio": "a.wav", "voice": "dan"}, "voice is 'dan', which objective.speakers does not have: ann, ben", True),
        ({"audio": "a.wav"}, "voice is None, which objective.speakers does not have", True),
        ({"audio": "a.wav", "voice": ["ann"]}, r"voice is \['ann'\], which objective.speakers does not have", True),
        ({"voice": "ann"}, "audio NoneType: expected a path or a URL", False),
        ({"audio": "none.wav", "voice": "ann"}, "audio 'none.wav': no such file", False),
        ({"audio": "short.wav", "voice": "ann"}, "the sound has 40 mel frames; it must have 50 at least", False),
        ({"audio": "silent.wav", "voice": "ann"}, "the clip is silent", False),
    ],
)
def test_what_is_wrong_with_a_row(tmp_path: Path, row: Any, reason: str, is_fatal: bool) -> None:
    write_sound(tmp_path / "a.wav", make_sound("ann", 0))
    write_sound(tmp_path / "short.wav", make_sound("ann", 0, 0.4))
    write_sound(tmp_path / "silent.wav", np.zeros(RATE))
    found = prepare(tmp_path, row)
    assert isinstance(found, Reject) and found.is_fatal is is_fatal
    assert re.search(reason, found.reason), found.reason
    assert str(found).startswith(f"{tmp_path / 'rows.jsonl'}:7: ")


# runs


def test_voices_are_learnt(trained: Path) -> None:
    """Of sounds that were held out too; by chance it would be a third."""
    (held_out,) = read_metrics(trained / EVALUATIONS_FILE)
    metrics = read_metrics(trained / METRICS_FILE)
    assert held_out["accuracy"] >= 0.9
    assert np.mean([values["loss"] for values in metrics[-5:]]) < 0.3 * metrics[0]["loss"]
    assert all(values["tokens"] == 8 * SEGMENT for values in metrics)
    assert list(store.components(step_folder(trained, STEPS))) == [SPEAKER_VERIFIER]


def test_a_killed_run_goes_on(rows: Path, trained: Path, tmp_path: Path) -> None:
    metrics = read_metrics(trained / METRICS_FILE)
    run = Path(shutil.copytree(trained, tmp_path / "run"))
    for step in (20, 30, 40):
        shutil.rmtree(step_folder(run, step))
    assert train(make_recipe(rows), run)
    assert [values["loss"] for values in read_metrics(run / METRICS_FILE)] == [values["loss"] for values in metrics]


def test_padding_changes_nothing(rows: Path) -> None:
    recipe = make_recipe(rows)
    objective: Any = make_objective(recipe)
    packing = objective.make_packing(recipe.data, None, 1)
    part = packing.new_part()
    for number, line in enumerate(rows.read_text().splitlines()[:3]):
        assert part.place(packing.prepare(Row(str(rows), number + 1, line.encode()))[0])
    batch = packing.assemble([part], first=0, streams=1)
    assert (np.asarray(batch.length) > 0).sum() == 3 and len(batch.length) == 4
    params = {SPEAKER_VERIFIER: objective.init_params(SPEAKER_VERIFIER, jax.random.key(0))}
    loss = jax.jit(lambda batch: objective.loss(params, batch, objective.denominators(batch), None, ()).terms)
    found = loss(batch)
    mel = np.where((np.asarray(batch.length) == 0)[:, None, None], 3.0, batch.mel)
    for name, value in loss(dataclasses.replace(batch, mel=mel)).items():
        assert float(value) == pytest.approx(float(found[name]), rel=TOLERANCE)
    assert float(found["loss"]) > 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(objective={"speakers": ()}), "objective.speakers names 0 voices; name those of the rows, 2 at least"),
        (dict(objective={"speakers": ("a", "b", "a")}), "objective.speakers has a name twice"),
        (dict(objective={"perturbations": 9}), "objective.perturbations is 9; there are 6"),
        (dict(objective={"scale": 0.0}), "objective.scale is 0"),
        (dict(objective={"margin": float("nan")}), "objective.margin is nan"),
        (dict(data={"tokens": 20}), "data.tokens is 20; a clip must have 50 mel frames at least"),
        (dict(data={"isolate_media": True}), "data.isolate_media is not there for rows of speech"),
        (dict(eval={"samples": 2}), "eval.samples asks for answers, which a network of speaker vectors does not give"),
        (dict(parts={"llm": Path("x")}), "--parts are of the Thinker, which this recipe does not train"),
        (dict(lora={"rank": 2}), "lora.rank: there are no adapters for this objective"),
    ],
)
def test_recipes_that_cannot_be(rows: Path, changes: dict[str, dict], message: str) -> None:
    recipe = make_recipe(rows)
    for name, values in changes.items():
        recipe = dataclasses.replace(recipe, **{name: dataclasses.replace(getattr(recipe, name), **values)})
    with pytest.raises((ConfigError, InputError), match=message):
        objective: Any = make_objective(recipe)
        objective.make_packing(recipe.data, None, 1)


def test_a_verifier_of_other_speakers_is_no_beginning(rows: Path, trained: Path) -> None:
    recipe = make_recipe(rows)
    objective = make_objective(
        dataclasses.replace(recipe, objective=dataclasses.replace(recipe.objective, speakers=(*VOICES, "dan")))
    )
    make_objective(recipe).check_start(step_folder(trained, STEPS))
    with pytest.raises(ConfigError, match=r"has a speaker verifier of 3 speakers, .*; this run has one of 4"):
        objective.check_start(step_folder(trained, STEPS))


# vectors


def test_vectors_tell_voices_apart(trained: Path) -> None:
    engine = SpeakerEngine.load(step_folder(trained, STEPS))
    assert engine.width == 12
    vectors = {}
    for voice in VOICES:
        # one is so long that it takes two calls
        vectors[voice] = [engine(make_sound(voice, 90_000 + n, seconds)) for n, seconds in enumerate((1.0, 2.3, 4.6))]
    of_same = []
    of_others = []
    for one, other in itertools.combinations(VOICES, 2):
        of_others += [float(a @ b) for a, b in itertools.product(vectors[one], vectors[other])]
    for own in vectors.values():
        assert all(np.linalg.norm(vector) == pytest.approx(1, abs=1e-6) for vector in own)
        of_same += [float(a @ b) for a, b in itertools.combinations(own, 2)]
    assert min(of_same) > max(of_others)
    # neither how loud a recording is nor the colour of a microphone matters much
    sound = make_sound("ann", 1)
    assert float(engine(0.2 * sound) @ engine(sound)) > 0.999
    with pytest.raises(InputError, match="the clip is silent"):
        engine(np.zeros(RATE, np.float32))


def test_a_vector_is_the_sum_of_those_of_the_segments(trained: Path) -> None:
    folder = step_folder(trained, STEPS)
    engine = SpeakerEngine.load(folder)
    config = SpeakerVerifierConfig.load(folder)
    params = store.load(folder)[SPEAKER_VERIFIER]
    sound = make_sound("ben", 5, 4.77)
    total = np.zeros(12)
    for segment in cut_segments(speaker_log_mel(sound), SEGMENT):
        vector: Any = SpeakerVerifier(config).apply({"params": params}, segment[None], np.array([SEGMENT]))
        total += np.asarray(vector)[0]
    np.testing.assert_allclose(engine(sound), total / np.linalg.norm(total), atol=TOLERANCE)
    # a short one is padded, and the padding is not read
    short = speaker_log_mel(sound)[:30]
    padded = np.pad(short, ((0, 20), (0, 0)), constant_values=7.0)
    apply: Any = SpeakerVerifier(config).apply
    np.testing.assert_allclose(
        apply({"params": params}, padded[None], np.array([30])),
        apply({"params": params}, short[None], np.array([30])),
        atol=TOLERANCE,
    )


def test_rows_with_vectors(rows: Path, trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = rows.with_name("test.jsonl")
    out = rows.with_name("vectors.jsonl")
    assert make_speaker_vectors(SoundRowOptions(str(source), out, trained)) == 0
    engine = SpeakerEngine.load(step_folder(trained, STEPS))
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(lines) == 6
    for line, before in zip(lines, source.read_text().splitlines(), strict=True):
        vector = line.pop("speaker")
        assert line == json.loads(before) and np.linalg.norm(vector) == pytest.approx(1, abs=1e-6)
        assert len(vector) == engine.width
    # a command that was stopped in its third row goes on
    again = rows.with_name("again.jsonl")
    settings = {"rows": str(source), "num_rows": 6, "speaker_verifier": engine.fingerprint}
    with ResumedRows(again, settings) as made:
        for number, line in enumerate(out.read_text().splitlines()[:2]):
            made.add(number, json.loads(line))
    assert make_speaker_vectors(SoundRowOptions(str(source), again, trained)) == 0
    assert again.read_text() == out.read_text()
    # what cannot be read
    bad = rows.with_name("bad.jsonl")
    bad.write_text(f'{{"audio": "none.wav"}}\n{source.read_text().splitlines()[0]}\n')
    other = rows.with_name("other.jsonl")
    capsys.readouterr()
    assert main(SoundRowOptions(str(bad), other, trained)) == 1
    assert re.search(r"error: .*bad.jsonl:1: audio 'none.wav': no such file", capsys.readouterr().err)
    assert main(SoundRowOptions(str(bad), other, trained, skip_bad=True)) == 0
    assert len(other.read_text().splitlines()) == 1
    assert main(SoundRowOptions(str(source), trained / "x.jsonl", trained)) == 1
    assert "lies elsewhere" in capsys.readouterr().err


def with_verifier(model: Path, trained: Path, target: Path) -> Path:
    """A model whose checkpoint has the verifier beside its own components."""
    shutil.copytree(model, target)
    folder = step_folder(trained, STEPS)
    shutil.copytree(folder / "params" / SPEAKER_VERIFIER, target / "params" / SPEAKER_VERIFIER)
    shutil.copy(folder / "speaker_verifier.json", target)
    about = json.loads((target / "omni_jax.json").read_text())
    about["components"][SPEAKER_VERIFIER] = ["float32"]
    (target / "omni_jax.json").write_text(json.dumps(about))
    return target


def test_the_checkpoints_own_network_makes_vectors(tiny_model: Path, trained: Path, tmp_path: Path) -> None:
    """Where none is named; and a run's folder that is named gives the same."""
    model = with_verifier(tiny_model, trained, tmp_path / "model")
    write_sound(tmp_path / "ann.wav", make_sound("ann", 3, 1.5))
    given = ["--audio", str(tmp_path / "ann.wav"), "--text", "what it says", "--consent", "Ann agreed for a test"]
    add_voice([str(model), "--name", "Ann", *given])
    add_voice([str(model), "--name", "Ben", *given, "--speaker-model", str(trained)])
    add_voice([str(model), "--name", "Cat", *given, "--no-speaker-vector"])
    voices = load_voices(model)
    np.testing.assert_array_equal(voices["Ann"].cond, voices["Ben"].cond)
    assert not voices["Cat"].cond.any()
    engine = SpeakerEngine.load(step_folder(trained, STEPS))
    np.testing.assert_array_equal(voices["Ann"].cond[0], engine(read_clip(tmp_path / "ann.wav").samples))
    record = json.loads((model / "voices.consent.json").read_text())["Ann"]
    assert record["speaker_vector"] == f"speaker_verifier {engine.fingerprint}"
    # the same for a clip that comes with a request
    loaded = omni_jax.load(model)
    clip = {"ref_audio": str(tmp_path / "ann.wav")}
    sound = loaded.synthesize([1, 2, 3], voice=clip)
    np.testing.assert_array_equal(sound, loaded.synthesize([1, 2, 3], voice="Ann"))
    elsewhere = omni_jax.load(tiny_model, speaker_model=trained).synthesize([1, 2, 3], voice=clip)
    np.testing.assert_array_equal(sound, elsewhere)


def test_folders_without_a_verifier(tiny_model: Path, trained: Path) -> None:
    config = OmniConfig.load(tiny_model)
    assert load_speaker_model(tiny_model, config, None) is None
    with pytest.raises(CheckpointError, match=r"has no speaker_verifier\.json, so no network of speaker vectors"):
        load_speaker_model(tiny_model, config, tiny_model)
    with pytest.raises(CheckpointError, match="makes speaker vectors of 12 numbers; Token2Wav takes 192"):
        load_speaker_model(tiny_model, mini_config(), trained)

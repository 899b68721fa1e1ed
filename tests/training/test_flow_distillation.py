"""A student of Token2Wav's flow: what it is compared with, written out, and whole runs."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from omni_jax.checkpoint import store
from omni_jax.checkpoint.train_checkpoints import prepare_model, step_folder
from omni_jax.errors import ConfigError
from omni_jax.models import flow_matching
from omni_jax.models.dit import NULL_CODE, DiT
from omni_jax.models.dit_blocks import pack
from omni_jax.models.ode_solver import Solver, sway_grid
from omni_jax.models.token2wav import Token2Wav
from omni_jax.training.loop import train
from omni_jax.training.metrics_log import EVALUATIONS_FILE, METRICS_FILE, read_metrics
from omni_jax.training.objectives import make_objective
from omni_jax.training.objectives.flow_distillation import Draws, FlowDistillation
from omni_jax.training.objectives.packed_speech import valid_frames
from omni_jax.training.optimizer import flatten_params
from omni_jax.training.options import FlowDistillationOptions
from omni_jax.training.recipe import RANDOM, ParameterGroup, Phase, Recipe
from tests.training.test_flow_matching import CONFIG, MODEL, make_batch, make_example, speech_rows  # noqa: F401, fixture

TOLERANCE = 1e-5  # of a loss: float32 sums in another order
EXAMPLES = ((30, 9), (13, 0), (24, 16), (8, 0))  # codes, and frames of a clip of the voice
DIT = DiT(CONFIG)


@pytest.fixture(scope="module")
def networks(tiny_model: Path) -> dict[str, Any]:
    """A teacher, and a student that is another by a little everywhere."""
    teacher = store.load(tiny_model, ["token2wav"])["token2wav"]
    rng = np.random.default_rng(0)
    student = jax.tree.map(lambda a: a + 0.02 * rng.standard_normal(a.shape).astype(np.float32), teacher)
    return {"token2wav": student, "teacher": teacher}


def make(**options: Any) -> FlowDistillation:
    return FlowDistillation(Token2Wav(MODEL.token2wav_config), FlowDistillationOptions(clip_frames=16, **options))


Velocity = Callable[[np.ndarray, float], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Utterance:
    """One utterance by itself, from which nothing is packed."""

    noise: np.ndarray
    mel: np.ndarray
    time: float
    step: int
    codes: np.ndarray
    clip: np.ndarray
    speaker: np.ndarray

    def velocity(self, params: Any, *, guided: bool) -> Velocity:
        """Of a network: what it gives for all conditions, or guided, away from what it gives for none."""

        def evaluate(x: np.ndarray, time: float) -> np.ndarray:
            cond = self._evaluate(params, x, time, self.codes, self.clip, self.speaker)
            if not guided:
                return cond
            nothing = np.full_like(self.codes, NULL_CODE), np.zeros_like(self.clip), np.zeros_like(self.speaker)
            return 1.5 * cond - 0.5 * self._evaluate(params, x, time, *nothing)

        return evaluate

    def _evaluate(
        self, params: Any, x: np.ndarray, time: float, codes: np.ndarray, clip: np.ndarray, speaker: np.ndarray
    ) -> np.ndarray:
        size = CONFIG.block_size
        blocks, _ = pack([len(x)], size, -(-len(x) // size))

        def to_blocks(values: np.ndarray) -> np.ndarray:
            padded = np.zeros((len(blocks.valid) * size, *values.shape[1:]), values.dtype)
            padded[: len(values)] = values
            return padded.reshape(-1, size, *values.shape[1:])

        arguments = (to_blocks(x), to_blocks(codes), clip[None], np.array([len(clip)]), speaker[None], np.float32(time))
        velocity = _evaluate(params, *arguments, blocks)
        return np.asarray(velocity).reshape(-1, CONFIG.mel_dim)[: len(x)]


@jax.jit
def _evaluate(params: Any, *arguments: Any) -> Any:
    """With the conditions that are given; the network's own guidance is not used."""
    return DIT.apply({"params": params}, *arguments)[0]


def take_utterances(objective: FlowDistillation, batch: Any, key: jax.Array) -> list[Utterance]:
    """All of a batch, each with its draws."""
    draws: Draws = jax.device_get(objective.draw(batch, key))
    found = []
    for row, number in np.argwhere(batch.length > 0):
        begin = batch.begin[row, number] * CONFIG.block_size
        frames = slice(begin, begin + batch.length[row, number])
        found.append(
            Utterance(
                noise=draws.noise[row].reshape(-1, CONFIG.mel_dim)[frames],
                mel=batch.mel[row].reshape(-1, CONFIG.mel_dim)[frames],
                time=float(draws.time[row, number]),
                step=int(draws.step[row, number]),
                codes=batch.codes[row].reshape(-1)[frames],
                clip=draws.speech.clip[row, number, : draws.speech.clip_length[row, number]],
                speaker=batch.speaker[row, number],
            )
        )
    return found


def take_rule(velocity: Velocity, x: np.ndarray, begin: float, end: float, steps: int) -> np.ndarray:
    """Runge and Kutta's 3/8 rule in even steps."""
    h = (end - begin) / steps
    for number in range(steps):
        t = begin + number * h
        k1 = velocity(x, t)
        k2 = velocity(x + h * k1 / 3, t + h / 3)
        k3 = velocity(x + h * (k2 - k1 / 3), t + 2 * h / 3)
        k4 = velocity(x + h * (k1 - k2 + k3), t + h)
        x = x + h * (k1 + 3 * k2 + 3 * k3 + k4) / 8
    return x


def guidance_error(params: Any, utterance: Utterance) -> np.ndarray:
    x = (1 - utterance.time) * utterance.noise + utterance.time * utterance.mel
    student = utterance.velocity(params["token2wav"]["dit"], guided=False)
    teacher = utterance.velocity(params["teacher"]["dit"], guided=True)
    return student(x, utterance.time) - teacher(x, utterance.time)


def step_error(params: Any, utterance: Utterance, num_steps: int, teacher_steps: int) -> np.ndarray:
    student = utterance.velocity(params["token2wav"]["dit"], guided=False)
    teacher = utterance.velocity(params["teacher"]["dit"], guided=True)
    grid = sway_grid(num_steps)
    x = utterance.noise
    for number in range(utterance.step):
        x = x + (grid[number + 1] - grid[number]) * student(x, grid[number])
    begin = float(grid[utterance.step])
    end = float(grid[utterance.step + 1])
    target = (take_rule(teacher, x, begin, end, teacher_steps) - x) / (end - begin)
    return student(x, begin) - target


@pytest.mark.parametrize("options", [dict(steps=0), dict(steps=3, teacher_steps=2)], ids=["guidance", "steps"])
def test_the_loss_is_that_of_its_formula(networks: dict[str, Any], options: dict[str, int]) -> None:
    """Of packed utterances, with a clip of their own and without, against each alone; and what has no gradient."""
    objective = make(**options)
    batch = make_batch([make_example(*sizes) for sizes in EXAMPLES])
    key = jax.random.key(5)
    utterances = take_utterances(objective, batch, key)
    total = 0.0
    for utterance in utterances:
        error = guidance_error(networks, utterance)
        if options["steps"]:
            error = step_error(networks, utterance, options["steps"], options["teacher_steps"])
        total += float(np.mean(error**2, axis=1).sum())
    # a step of each number is among them
    assert not options["steps"] or {u.step for u in utterances} == {0, 1, 2}

    @jax.jit
    def loss_and_gradient(params: Any, batch: Any) -> Any:
        def loss(params: Any) -> Any:
            found = objective.loss(params, batch, objective.denominators(batch), key, ("token2wav/dit",))
            assert list(found.terms) == ["loss"]
            return found.total

        return jax.value_and_grad(loss)(params)

    loss, gradient = loss_and_gradient(networks, batch)
    assert float(loss) == pytest.approx(total / batch.length.sum(), rel=TOLERANCE)
    assert any(np.asarray(leaf).any() for leaf in jax.tree.leaves(gradient["token2wav"]["dit"]))
    for fixed in (gradient["teacher"], gradient["token2wav"]["bigvgan"]):
        assert all(not np.asarray(leaf).any() for leaf in jax.tree.leaves(fixed))
    padding = ~np.asarray(valid_frames(batch))
    spoiled = dataclasses.replace(batch, mel=np.where(padding[..., None], np.float32(1e3), batch.mel))
    spoiled = dataclasses.replace(spoiled, codes=np.where(padding, 7, batch.codes))
    _, same = loss_and_gradient(networks, spoiled)
    for ours, theirs in zip(jax.tree.leaves(gradient), jax.tree.leaves(same), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-6)


def test_held_out_rows_have_the_error_of_the_mel(networks: dict[str, Any]) -> None:
    """Of whole solves: a few steps of the student's beside the published rule over the teacher."""
    objective = make(steps=2)
    batch = make_batch([make_example(13, 9)])
    key = jax.random.key(1)
    (utterance,) = take_utterances(objective, batch, key)
    student = utterance.velocity(networks["token2wav"]["dit"], guided=False)
    teacher = utterance.velocity(networks["teacher"]["dit"], guided=True)
    ours = utterance.noise
    theirs = utterance.noise
    for begin, end in zip(sway_grid(2)[:-1], sway_grid(2)[1:], strict=True):
        ours = ours + (end - begin) * student(ours, begin)
    for begin, end in zip(sway_grid(9)[:-1], sway_grid(9)[1:], strict=True):
        theirs = take_rule(teacher, theirs, begin, end, 1)
    loss = jax.jit(lambda p: objective.loss(p, batch, objective.denominators(batch), key, ()))(networks)
    assert float(loss.terms["mel_error"]) == pytest.approx(float(np.mean((ours - theirs) ** 2)), rel=1e-4)


def test_a_copy_has_nothing_to_learn_without_guidance(
    networks: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flow_matching, "GUIDANCE_SCALE", 0.0)
    objective = make(steps=0)
    batch = make_batch([make_example(30, 9)])
    same = {"token2wav": networks["teacher"], "teacher": networks["teacher"]}
    key = jax.random.key(0)
    loss = jax.jit(lambda p: objective.loss(p, batch, objective.denominators(batch), key, ("token2wav/dit",)))(same)
    # two evaluations that XLA may fuse in another way
    assert float(loss.total) < 1e-10


@pytest.fixture
def make_distillation(make_recipe: Callable[..., Recipe], speech_rows: Path) -> Callable[..., Recipe]:  # noqa: F811
    def make(name: str, **changes: Any) -> Recipe:
        data = {"train": (str(speech_rows),), "valid": (str(speech_rows),), "rows": 2, "streams": 2, "tokens": 72}
        data["media_root"] = str(speech_rows.parent)
        optimizer = {"learning_rate": 1e-3, "warmup": 0, "ema": 0.5}
        return make_recipe(name, data=data, optimizer=optimizer, eval={"every": 6}, checkpoint={"every": 6}, **changes)

    return make


def test_a_run(make_distillation: Callable[..., Recipe], tiny_model: Path, tmp_path: Path) -> None:
    """Guidance and steps are learnt, the checkpoint says so, and a run goes on without what it began from."""
    recipe = make_distillation("token2wav-distill", steps=12)
    assert train(recipe, tmp_path / "run")
    held_out = read_metrics(tmp_path / "run" / EVALUATIONS_FILE)
    assert held_out[1]["loss"] < held_out[0]["loss"] and held_out[1]["mel_error"] < held_out[0]["mel_error"]
    metrics = read_metrics(tmp_path / "run" / METRICS_FILE)

    trained = step_folder(tmp_path / "run", 12)
    assert Solver.load(trained) == Solver("euler", 4, guidance=False)
    # the teacher is beside the checkpoints, and the same file as the one that the run began from
    assert list(store.components(trained)) == ["thinker", "talker", "token2wav"]
    before = flatten_params(store.load(tiny_model, ["thinker", "talker", "token2wav"]))
    after = flatten_params(store.load(trained, ["thinker", "talker", "token2wav"]))
    changed = {path for path in before if not np.array_equal(before[path], after[path])}
    assert changed and all(path.startswith("token2wav/dit/") for path in changed)

    shutil.rmtree(trained)
    assert train(dataclasses.replace(recipe, init=None), tmp_path / "run")
    found = read_metrics(tmp_path / "run" / METRICS_FILE)
    assert [values["loss"] for values in found] == [values["loss"] for values in metrics]
    again = flatten_params(store.load(trained, ["token2wav"]))
    assert all(np.array_equal(again[path], after[path]) for path in again)


def test_guidance_alone(make_distillation: Callable[..., Recipe], tmp_path: Path) -> None:
    recipe = make_distillation("token2wav-guidance", steps=6)
    recipe = dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, valid=()))
    assert train(recipe, tmp_path / "run")
    losses = [values["loss"] for values in read_metrics(tmp_path / "run" / METRICS_FILE)]
    assert losses[-1] < losses[0]
    distilled = step_folder(tmp_path / "run", 6)
    assert Solver.load(distilled) == Solver("rk4", 9, guidance=False)
    # a run that trains something else passes it on, and those that train the DiT refuse it
    prepare_model(tmp_path / "other", distilled, ["thinker"])
    assert Solver.load(tmp_path / "other" / "model") == Solver("rk4", 9, guidance=False)
    for name, reason in (
        ("token2wav-distill", "is distilled already"),
        ("token2wav-dit", "has no velocity without conditions any more"),
    ):
        other = make_distillation(name, steps=1)
        with pytest.raises(ConfigError, match=reason):
            train(dataclasses.replace(other, init=distilled), tmp_path / name)


def test_runs_that_cannot_be(make_distillation: Callable[..., Recipe], tiny_model: Path, tmp_path: Path) -> None:
    recipe = make_distillation("token2wav-distill", steps=1)
    with pytest.raises(ConfigError, match="--init random has no teacher"):
        make_objective(dataclasses.replace(recipe, init=RANDOM))
    with pytest.raises(ConfigError, match="a phase trains teacher, which stays what it was"):
        phases = (Phase("all", (ParameterGroup(".*/dit/.*"),)),)
        train(dataclasses.replace(recipe, phases=phases), tmp_path / "run")
    folder = Path(shutil.copytree(tiny_model, tmp_path / "silent"))
    text = (folder / store.ABOUT_FILE).read_text()
    (folder / store.ABOUT_FILE).write_text(text.replace('"token2wav"', '"discriminators"'))
    with pytest.raises(ConfigError, match="has no token2wav, whose DiT is the teacher"):
        train(dataclasses.replace(recipe, init=folder), tmp_path / "other")
    with pytest.raises(ConfigError, match=r"objective.steps is -1; .*0: guidance alone"):
        make_objective(dataclasses.replace(recipe, objective=FlowDistillationOptions(steps=-1)))


@pytest.mark.parametrize("steps", [0, 4])
def test_flops(steps: int) -> None:
    """A kernel of each network: forward twice, three times or more."""
    objective = make(steps=steps, teacher_steps=2)
    sizes = {"token2wav/dit/proj/kernel": 100, "teacher/dit/proj/kernel": 100, "token2wav/bigvgan/conv/kernel": 9}
    flops = objective.count_flops(sizes, ["token2wav/dit/proj/kernel"], {"tokens": 10})
    evaluations = 3 + 2 if steps == 0 else 3 + 3 + 2 * 8
    assert flops == evaluations * 2 * 100 * 10 * CONFIG.repeats

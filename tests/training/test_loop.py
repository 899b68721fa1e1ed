"""Whole runs at tiny size: the stages in sequence, what they leave behind, and what stops them."""

from __future__ import annotations

import dataclasses
import json
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest

import omni_jax
from omni_jax.checkpoint import store, train_checkpoints
from omni_jax.checkpoint.convert import to_jax
from omni_jax.checkpoint.export import to_hf
from omni_jax.checkpoint.train_checkpoints import (
    CHECKPOINTS_FOLDER,
    FILES_FILE,
    MODEL_FOLDER,
    find_damage,
    resolve_checkpoint,
    step_folder,
)
from omni_jax.errors import CheckpointError, ConfigError, InputError, TrainingError
from omni_jax.processing.processor import Processor
from omni_jax.training import device_batches, loop
from omni_jax.training.loop import train
from omni_jax.training.metrics_log import EVALUATIONS_FILE, METRICS_FILE, PLOT_FILE, SAMPLES_FILE, read_metrics
from omni_jax.training.optimizer import flatten_params
from omni_jax.training.recipe import Phase, Recipe

STEPS = 4
# of each stage, the first part of the paths of what must not change
FROZEN = {
    "pretrain1": ("decoder/", "audio_encoder/bos_eos"),
    "pretrain2": ("audio_encoder/bos_eos",),
    "pretrain3": ("audio_encoder/bos_eos",),
    "thinker-sft": (
        *("audio_encoder/bos_eos", "audio_encoder/conv", "audio_encoder/layers", "audio_encoder/norm"),
        *("vision_encoder/layers", "vision_encoder/patch"),
    ),
}


def params_of(folder: Path) -> dict[str, np.ndarray]:
    return {path: np.asarray(leaf) for path, leaf in flatten_params(store.load(folder, ["thinker"])["thinker"]).items()}


@pytest.fixture(scope="module")
def stages(
    tiny_checkpoint: Path, make_recipe: Callable[..., Recipe], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """The folder of each stage, after what the first began from. The last computes in bfloat16."""
    folder = tmp_path_factory.mktemp("stages")
    found = {"begin": folder / "model"}
    to_jax(tiny_checkpoint, folder / "model", dtype="bfloat16")
    begin = folder / "model"
    for stage in FROZEN:
        dtype = "bfloat16" if stage == "thinker-sft" else "float32"
        # with rows of one length, stage 3 is the program of stage 2 and need not be compiled
        recipe = make_recipe(
            stage, init=begin, steps=STEPS, dtype=dtype, data={"seed": 1, "tokens": 256, "rows": 1, "streams": 1}
        )
        if len(recipe.phases) > 1:
            first = dataclasses.replace(recipe.phases[0], steps=2)
            recipe = dataclasses.replace(recipe, phases=(first, *recipe.phases[1:]))
        found[stage] = begin = folder / stage
        assert train(recipe, begin)
    return found


def test_each_stage_changes_what_it_trains_and_nothing_else(stages: dict[str, Path]) -> None:
    folders = list(stages.values())
    for stage, before, after in zip(FROZEN, folders, folders[1:], strict=False):
        old, new = params_of(resolve_checkpoint(before)), params_of(resolve_checkpoint(after))
        for path in old:
            same = np.array_equal(old[path], new[path])
            assert same == path.startswith(FROZEN[stage]), f"{stage}: {path}"


def test_the_adapters_come_before_the_encoders(stages: dict[str, Path]) -> None:
    begin, after = params_of(stages["begin"]), params_of(step_folder(stages["pretrain1"], 2))
    changed = {path for path in begin if not np.array_equal(begin[path], after[path])}
    assert changed and all(path.startswith(("audio_encoder/proj", "vision_encoder/merger")) for path in changed)


def test_what_a_run_leaves_behind(stages: dict[str, Path]) -> None:
    metrics = read_metrics(stages["pretrain2"] / METRICS_FILE)
    assert [m["step"] for m in metrics] == [1, 2, 3, 4]
    assert all(np.isfinite(m["loss"]) and m["grad_norm"] > 0 and m["tokens"] > m["target_tokens"] > 0 for m in metrics)
    assert all(m["seconds"] > m["data_wait"] >= 0 for m in metrics)
    assert (stages["pretrain2"] / PLOT_FILE).read_bytes().startswith(b"\x89PNG")
    assert list((stages["pretrain2"] / "tensorboard").glob("events.*"))


def test_any_checkpoint_is_a_model(stages: dict[str, Path], tmp_path: Path) -> None:
    """It loads, speaks, and goes to PyTorch's layout and back; what did not train takes its room once."""
    folder = step_folder(stages["pretrain2"], 2)
    assert set(store.components(folder)) == {"thinker", "talker", "token2wav"}
    model = omni_jax.load(folder)
    assert model.voices and model.config == omni_jax.OmniConfig.load(stages["begin"])
    to_hf(folder, tmp_path / "published")
    to_jax(tmp_path / "published", tmp_path / "again")
    found, expected = store.load(tmp_path / "again"), store.load(folder)
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    file = next(path for path in (folder / "params" / "talker").rglob("*") if path.is_file())
    same = step_folder(stages["pretrain2"], 4) / file.relative_to(folder)
    assert file.samefile(same)


def test_frozen_parameters_keep_the_dtype_of_the_checkpoint(stages: dict[str, Path]) -> None:
    """Which was bfloat16; what has trained is float32 from then on."""
    kinds = {
        stage: {str(leaf.dtype) for leaf in params_of(resolve_checkpoint(stages[stage])).values()} for stage in FROZEN
    }
    assert kinds["pretrain1"] == {"bfloat16", "float32"}
    assert params_of(resolve_checkpoint(stages["pretrain1"]))["decoder/head/kernel"].dtype == "bfloat16"
    assert params_of(resolve_checkpoint(stages["pretrain2"]))["decoder/head/kernel"].dtype == "float32"


@pytest.fixture(scope="module")
def finished_run(
    make_text_recipe: Callable[..., Recipe], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Recipe, Path]:
    recipe = make_text_recipe()
    workdir = tmp_path_factory.mktemp("finished") / "run"
    assert train(recipe, workdir)
    return recipe, workdir


@pytest.fixture
def short_run(finished_run: tuple[Recipe, Path], tmp_path: Path) -> tuple[Recipe, Path]:
    """Of six steps with the checkpoints 2, 4 and 6; a copy."""
    recipe, workdir = finished_run
    shutil.copytree(workdir, tmp_path / "run")
    return recipe, tmp_path / "run"


def test_damaged_checkpoints_are_named_and_passed_over(
    short_run: tuple[Recipe, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, workdir = short_run
    expected = read_metrics(workdir / METRICS_FILE)
    folders = [step_folder(workdir, step) for step in (2, 4, 6)]
    (folders[2] / "optimizer" / "moments" / "moments" / "_METADATA").unlink()
    # what Orbax reads to list its steps; it is written after files.json
    (folders[2] / "_CHECKPOINT_METADATA").unlink()
    arrays = [path for path in (folders[1] / "params" / "thinker").rglob("*") if path.is_file()]
    largest = max(arrays, key=lambda path: path.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:-1])
    assert train(recipe, workdir)
    out = capsys.readouterr().out
    assert f"checkpoint {folders[2]} is damaged and not used: optimizer/moments/moments/_METADATA is missing" in out
    assert f"checkpoint {folders[1]} is damaged" in out and "goes on after step 2" in out
    again = read_metrics(workdir / METRICS_FILE)
    assert [(m["step"], m["loss"]) for m in again] == [(m["step"], m["loss"]) for m in expected]
    assert [find_damage(folder) for folder in folders] == ["", "", ""]  # the damaged ones have been replaced
    for folder in folders:
        (folder / "files.json").unlink()
    with pytest.raises(CheckpointError, match=r"all checkpoints in .* are damaged; remove that folder"):
        train(recipe, workdir)


def test_a_run_goes_on_only_as_it_began(short_run: tuple[Recipe, Path]) -> None:
    recipe, workdir = short_run
    with pytest.raises(ConfigError, match="trains other parameters"):
        train(dataclasses.replace(recipe, steps=8, phases=_only_norms(recipe)), workdir)
    optimizer = dataclasses.replace(recipe.optimizer, kind="adafactor")
    with pytest.raises(ConfigError, match=r"is of a run with another optimizer .* count, mu, nu, and count, v_row"):
        train(dataclasses.replace(recipe, steps=8, optimizer=optimizer), workdir)
    other = dataclasses.replace(recipe, steps=8, data=dataclasses.replace(recipe.data, seed=5))
    with pytest.raises(ConfigError, match="seed was 0 and is 5"):
        train(other, workdir)
    assert train(dataclasses.replace(recipe, steps=6), workdir)  # done already


def _only_norms(recipe: Recipe):
    group = dataclasses.replace(recipe.phases[0].train[0], paths=".*norm/scale")
    return (dataclasses.replace(recipe.phases[0], train=(group,)),)


@pytest.mark.long
def test_old_checkpoints_go(make_text_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    """Also one that a kill left half removed; what it left half written goes at once."""
    workdir = tmp_path / "run"
    recipe = make_text_recipe(checkpoint={"every": 1, "keep": 2})
    assert train(dataclasses.replace(recipe, steps=3), workdir)
    (step_folder(workdir, 2) / "_CHECKPOINT_METADATA").unlink()
    (step_folder(workdir, 2) / FILES_FILE).unlink()
    (workdir / CHECKPOINTS_FOLDER / "00000004.orbax-checkpoint-tmp").mkdir()
    assert train(recipe, workdir)
    assert sorted(path.name for path in (workdir / CHECKPOINTS_FOLDER).iterdir()) == ["00000005", "00000006"]


def test_a_checkpoint_that_cannot_be_written_stops_the_run(
    make_text_recipe: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is written in the background; the run ends with the error, and the folder has no such step."""
    write_json = train_checkpoints._write_json

    def fail(path: Path, value: object) -> None:
        if path.name == FILES_FILE:
            raise OSError("no space left on device")
        write_json(path, value)

    monkeypatch.setattr(train_checkpoints, "_write_json", fail)
    workdir = tmp_path / "run"
    with pytest.raises(CheckpointError, match=r"could not be written.*no space left"):
        train(make_text_recipe(steps=4), workdir)
    assert not list((workdir / CHECKPOINTS_FOLDER).glob("0000000?"))


def test_a_loss_that_is_no_number_stops_the_run(
    make_text_recipe: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the checkpoint that is being written when it does is complete."""
    recipe = make_text_recipe(checkpoint={"every": 1})
    batches = []
    has_failing_batch = threading.Event()

    def damaged_batch(parts, abstract):
        batch = device_batches.to_devices(parts, abstract)
        batches.append(batch)
        if len(batches) != 2:
            return batch
        has_failing_batch.set()
        return batch.replace(weights=batch.weights * np.nan)

    monkeypatch.setattr(loop, "to_devices", damaged_batch)
    write_json = train_checkpoints._write_json
    comes_after = []

    def write_late(path: Path, value: object) -> None:
        # the file without which a checkpoint is no whole one, after the step that fails
        if path.name == FILES_FILE:
            comes_after.append(has_failing_batch.wait(60))
            time.sleep(1)
        write_json(path, value)

    monkeypatch.setattr(train_checkpoints, "_write_json", write_late)
    with pytest.raises(TrainingError, match=r"step 2: the loss is nan.* rows .*rows.jsonl:\d+.*after step 1 is saved"):
        train(recipe, tmp_path / "run")
    assert comes_after == [True]
    assert [path.name for path in (tmp_path / "run" / CHECKPOINTS_FOLDER).iterdir()] == ["00000001"]
    assert not find_damage(step_folder(tmp_path / "run", 1))


def test_a_step_that_is_not_finite_can_be_skipped(
    make_text_recipe: Callable[..., Recipe],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """It changes neither parameters nor moments, is counted, and there may not be too many."""
    recipe = make_text_recipe(checkpoint={"every": 1}, on_nonfinite="skip", max_skipped=1)
    batches = []

    def damaged_batch(parts, abstract):
        batch = device_batches.to_devices(parts, abstract)
        batches.append(batch)
        return batch.replace(weights=batch.weights * np.nan) if len(batches) in (2, 4) else batch

    monkeypatch.setattr(loop, "to_devices", damaged_batch)
    with pytest.raises(TrainingError, match=r"step 4: the loss is nan.* 2 steps were skipped, over --max-skipped"):
        train(recipe, tmp_path / "run")
    metrics = read_metrics(tmp_path / "run" / METRICS_FILE)
    assert [m["skipped"] for m in metrics] == [0, 1, 0] and metrics[1]["loss"] is None
    assert "skipped: step 2: the loss is nan" in capsys.readouterr().out
    first, second, third = (params_of(step_folder(tmp_path / "run", step)) for step in (1, 2, 3))
    assert all(np.array_equal(first[path], second[path]) for path in first)
    assert any(not np.array_equal(second[path], third[path]) for path in first)


def test_a_run_from_nothing_with_held_out_rows(
    make_recipe: Callable[..., Recipe], rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its model is made of random numbers and of nothing else; the best checkpoint stays; it goes on as it was."""
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"text": f"{n} and {n}"}) + "\n" for n in range(5)))
    recipe = make_recipe(
        data={"rows": 1, "valid": (str(text), str(rows)), "audio_blocks": 4},
        init=Path("random"),
        files="tiny",
        checkpoint={"every": 3, "keep": 1},
        eval={"every": 2},
    )
    workdir = tmp_path / "run"
    assert train(recipe, workdir)
    printed = capsys.readouterr().out
    # a model that begins here is asked with the sizes that it trains with
    assert recipe.data.pixels
    assert "preprocessor_config.json says" not in printed
    processor = Processor.load(workdir / MODEL_FOLDER)
    assert recipe.data.canvases and not loop.find_size_differences(recipe.data, processor)
    other = dataclasses.replace(recipe.data, video_max_pixels=56 * 56)
    (difference,) = loop.find_size_differences(other, processor)
    assert difference.startswith(f"data.video_max_pixels is {56 * 56}, and the model's preprocessor_config.json says")
    # without pictures their sizes do not matter
    assert not loop.find_size_differences(dataclasses.replace(other, canvases=0), processor)
    found = read_metrics(workdir / EVALUATIONS_FILE)
    assert [values["step"] for values in found] == [2, 4, 6]
    assert set(found[0]["sources"]) == {str(text), str(rows)}
    best = min(found, key=lambda values: values["loss"])
    kept = {int(folder.name) for folder in (workdir / CHECKPOINTS_FOLDER).iterdir()}
    assert kept == {best["step"], 6}
    assert f"the least held-out loss is {best['loss']:.4f}" in printed
    # the whole folder stands for its last checkpoint
    assert omni_jax.load(workdir).config.thinker_config == recipe.model.thinker_config
    to_hf(workdir, tmp_path / "published")


def test_a_run_stops_early_and_is_traced(make_text_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    recipe = make_text_recipe(
        data={"valid": make_text_recipe().data.train},
        optimizer={"learning_rate": 0.0},
        eval={"every": 1, "patience": 2},
        profile=(2, 9),
    )
    assert train(recipe, tmp_path / "run")
    assert list((tmp_path / "run" / "profile").rglob("perfetto_trace.json.gz"))
    assert [values["step"] for values in read_metrics(tmp_path / "run" / EVALUATIONS_FILE)] == [1, 2, 3]
    assert len(read_metrics(tmp_path / "run" / METRICS_FILE)) == 3
    # and does not go on when it is started again
    assert train(recipe, tmp_path / "run")
    assert len(read_metrics(tmp_path / "run" / METRICS_FILE)) == 3


def test_held_out_rows_are_answered(make_text_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    """As the checkpoint of the same step answers them; texts that ask for nothing are passed over."""
    prompt = [{"role": "user", "content": "What is this?"}]
    valid = []
    for name, row in (
        ("text", {"text": "one"}),
        ("chat", {"messages": [*prompt, {"role": "assistant", "content": "It"}]}),
    ):
        valid.append(str(tmp_path / f"{name}.jsonl"))
        Path(valid[-1]).write_text(json.dumps(row) + "\n")
    recipe = make_text_recipe(
        data={"valid": tuple(valid)},
        eval={"every": 2, "samples": 3, "max_tokens": 5},
        steps=2,
    )
    workdir = tmp_path / "run"
    assert train(recipe, workdir)
    (sample,) = read_metrics(workdir / SAMPLES_FILE)
    model = omni_jax.load(workdir, dtype="float32", components=("thinker",))
    answer = model.generate(prompt, max_tokens=5, temperature=0.0).text
    assert sample == {"step": 2, "row": f"{valid[1]}:1", "expected": "It", "answer": answer}


def test_a_held_out_row_that_cannot_be_used_is_named(make_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    text = tmp_path / "text.jsonl"
    text.write_text('{"text": ""}\n')
    with pytest.raises(InputError, match=r"data.valid: .*text.jsonl:1: the text is empty"):
        train(make_recipe(data={"valid": (str(text),)}), tmp_path / "run")


@pytest.mark.parametrize(
    ("phases", "warmup", "steps", "messages"),
    [
        ((Phase("a", (), 4), Phase("b", ())), 1, 4, ["the phase b is never reached: it begins after step 4 of 4"]),
        ((Phase("a", ()),), 9, 9, ["the phase a has 9 steps and a warm-up of 9"]),
        ((Phase("a", (), 4), Phase("b", ())), 1, 8, []),
    ],
)
def test_a_run_says_when_it_will_do_less(
    make_recipe: Callable[..., Recipe], phases: tuple[Phase, ...], warmup: int, steps: int, messages: list[str]
) -> None:
    found = make_recipe(phases=phases, optimizer={"warmup": warmup}, steps=steps).find_warnings()
    assert len(found) == len(messages)
    assert all(text.startswith(message) for text, message in zip(found, messages, strict=True))


def test_nothing_to_begin_from(make_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nothing to begin from"):
        train(make_recipe(init=None), tmp_path / "run")
    (tmp_path / "empty" / CHECKPOINTS_FOLDER).mkdir(parents=True)
    with pytest.raises(CheckpointError, match="a run without a whole checkpoint"):
        train(make_recipe(init=tmp_path / "empty"), tmp_path / "run")


def test_a_line_that_a_kill_cut_short_is_passed_over(tmp_path: Path) -> None:
    path = tmp_path / METRICS_FILE
    path.write_text(json.dumps({"step": 1, "loss": 2.0}) + "\n" + '{"step": 2, "lo')
    assert read_metrics(path) == [{"step": 1, "loss": 2.0}]

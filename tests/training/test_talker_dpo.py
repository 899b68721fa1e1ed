"""Preferences between spoken answers: pairs, their reference, and a planted preference."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from omni_jax.checkpoint import store
from omni_jax.checkpoint.fingerprint import fingerprint
from omni_jax.checkpoint.train_checkpoints import REFERENCE_FILE
from omni_jax.config import OmniConfig
from omni_jax.data.examples import Reject
from omni_jax.data.packing import Budget
from omni_jax.data.preference_pairs import PairPacking, PreparePairs
from omni_jax.data.resumed_rows import ResumedRows
from omni_jax.data.sources import Row
from omni_jax.data.spoken_examples import SpokenExample
from omni_jax.data.spoken_packing import SpokenBudget
from omni_jax.errors import CheckpointError, ConfigError, InputError
from omni_jax.processing.processor import Processor
from omni_jax.training.loop import train
from omni_jax.training.metrics_log import EVALUATIONS_FILE, METRICS_FILE, read_metrics
from omni_jax.training.objectives import make_objective
from omni_jax.training.objectives.talker_dpo import sum_by_utterance
from omni_jax.training.optimizer import flatten_params
from omni_jax.training.pair_scores import score_pairs
from omni_jax.training.recipe import RANDOM, Recipe
from tests.training.spoken import pack

CONFIG = OmniConfig.tiny()
COMPONENTS = ("thinker", "talker")


def make_row(number: int, **changes: Any) -> dict[str, Any]:
    """A pair; the better answer has low codes, the other high ones."""
    question = {"role": "user", "content": f"What is {number}?"}
    answer = {"role": "assistant", "content": f"It is {number}."}
    low = [(7 * number + 5 * k) % 30 for k in range(8 + number % 3)]
    high = [30 + (11 * number + 7 * k) % 30 for k in range(9)]
    speech = {"chosen": {"codec_ids": low, "errors": 0}, "rejected": {"codec_ids": high}, "voice": "Chelsie"}
    return {"messages": [question, answer], "speech": {**speech, **changes}}


@pytest.fixture(scope="module")
def prepare(tiny_model: Path) -> PreparePairs:
    budget = SpokenBudget(Budget(1, 128, 8, blocks=0, canvases=0, windows=1), positions=256, utterances=4)
    return PreparePairs(Processor.load(tiny_model), 128, budget.check, {"Chelsie": 603}, max_length_gap=0.5)


def read(prepare: PreparePairs, values: Any) -> SpokenExample | Reject:
    found = prepare(Row("rows.jsonl", 1, json.dumps(values).encode()))
    return found if isinstance(found, Reject) else found[0]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"chosen": None}, "speech.chosen is None; it must be an object with codec_ids"),
        ({"rejected": [1, 2]}, r"speech.rejected is \[1, 2\]; it must be an object"),
        ({"rejected": {"codec_ids": [77]}}, "a code of speech.rejected.codec_ids is 77; it must be from 0 to 65"),
        ({"rejected": make_row(1)["speech"]["chosen"]}, "speech.chosen and speech.rejected have the same codes"),
        ({"rejected": {"codec_ids": [1] * 14}}, "its answers have 9 and 14 codes, which is more apart than objective"),
        ({"rejected": {"codec_ids": [1] * 5}}, "its answers have 5 and 9 codes"),
        ({"codec_ids": [1]}, "speech has the unknown keys 'codec_ids'"),
    ],
)
def test_what_is_no_pair(prepare: PreparePairs, changes: dict[str, Any], reason: str) -> None:
    found = read(prepare, make_row(1, **changes))
    assert isinstance(found, Reject) and not found.is_fatal
    assert re.search(reason, found.reason), found.reason


@pytest.mark.parametrize(
    ("reference", "reason"),
    [
        (None, "speech.reference is None; tools/score_pairs.py writes"),
        (
            {"model": "other", "chosen": -1, "rejected": -2},
            "is of the model 'other', and this run started from 'own",
        ),
    ],
)
def test_scores_of_another_model_end_the_run(prepare: PreparePairs, reference: Any, reason: str) -> None:
    found = read(dataclasses.replace(prepare, reference="own"), make_row(1, reference=reference))
    assert isinstance(found, Reject) and found.is_fatal and reason in found.reason


def test_scores_are_numbers(prepare: PreparePairs) -> None:
    prepare = dataclasses.replace(prepare, reference="own")
    scores = {"model": "own", "chosen": -7.5, "rejected": -9, "row": 3}
    found = read(prepare, make_row(1, reference=scores))
    assert isinstance(found, SpokenExample) and found.reference.tolist() == [-7.5, -9]
    found = read(prepare, make_row(1, reference={**scores, "chosen": "x"}))
    assert isinstance(found, Reject) and "speech.reference.chosen is 'x'" in found.reason


def test_the_place_of_pairs(prepare: PreparePairs) -> None:
    """The Thinker reads a dialogue once; the answers are utterances that follow each other."""
    packing = PairPacking(prepare, SpokenBudget(Budget(1, 128, 8, 0, 0, 1), 256, 4), CONFIG)
    examples = []
    for number in (0, 1):
        found = read(prepare, make_row(number))
        assert isinstance(found, SpokenExample)
        examples.append(dataclasses.replace(found, reference=np.array([-1.0 - number, -2.0 - number])))
    part = packing.new_part()
    assert all(part.place(example) for example in examples)
    assert part.full and not part.place(examples[0])  # two pairs are all that a row holds
    batch = packing.assemble([part], first=0, streams=1)
    assert batch.reference.tolist() == [[[-1, -2], [-2, -3]]] and batch.is_pair.all()
    num_tokens = sum(len(example.dialogue.tokens) for example in examples)
    assert (np.asarray(batch.spoken.dialogues.inputs.segment_ids) > 0).sum() == num_tokens
    # the codes of an answer and its end
    lengths = sum_by_utterance(np.ones_like(batch.spoken.weights), batch.spoken, 4)
    assert np.asarray(lengths)[0].tolist() == [9, 10, 10, 10]
    assert packing.measure_fill(batch)["pairs"] == 2
    alone, _ = pack(examples[:1], packing.budget)
    first = len(alone.codes[0]) - np.argmax(alone.segment_ids[0][::-1] > 0)
    np.testing.assert_array_equal(batch.spoken.text_row[0, :first], alone.text_row[0, :first])


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    file.write_text("".join(json.dumps(make_row(number)) + "\n" for number in range(10)))
    return file


@pytest.fixture(scope="module")
def make_dpo_recipe(make_recipe: Callable[..., Recipe], pairs: Path) -> Callable[..., Recipe]:
    def make(rows: Path = pairs, **changes: Any) -> Recipe:
        data = {"train": (str(rows),), "rows": 2, "audio_blocks": 0, "canvases": 0, **changes.pop("data", {})}
        return make_recipe("talker-dpo", data=data, remat="none", **changes)

    return make


@pytest.fixture(scope="module")
def scored(make_dpo_recipe: Callable[..., Recipe], pairs: Path) -> Path:
    out = pairs.with_name("scored.jsonl")
    assert score_pairs(make_dpo_recipe(), out, print) == (10, 0)
    return out


def test_scoring_goes_on(
    make_dpo_recipe: Callable[..., Recipe], scored: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After it was killed in a line; rows that cannot be used are told and left out."""
    part = tmp_path / "part.jsonl"
    with pytest.raises(KeyboardInterrupt), monkeypatch.context() as patch:
        written: list[int] = []

        def stop(self: ResumedRows, number: int, *arguments: Any) -> None:
            if number == 4:
                raise KeyboardInterrupt
            written.append(number)
            add(self, number, *arguments)

        add = ResumedRows.add
        patch.setattr(ResumedRows, "add", stop)
        score_pairs(make_dpo_recipe(), part, print)
    assert written == [0, 1, 2, 3] and not part.exists()
    with part.with_name("part.jsonl.partial").open("ab") as file:
        file.write(b'{"number": 4, "row": {"mess')
    assert score_pairs(make_dpo_recipe(), part, print) == (10, 0)
    found, expected = (list(map(json.loads, path.read_text().splitlines())) for path in (part, scored))
    assert [row["messages"] for row in found] == [row["messages"] for row in expected]
    for one, other in zip(found, expected, strict=True):
        for name in ("chosen", "rejected"):
            score = one["speech"]["reference"][name]
            # in other batches, so in other places of a row
            assert score == pytest.approx(other["speech"]["reference"][name], abs=1e-4) and score < 0
    assert found[3]["speech"]["chosen"] == make_row(3)["speech"]["chosen"]

    bad = tmp_path / "bad.jsonl"
    bad.write_text(json.dumps(make_row(0)) + "\n" + json.dumps(make_row(1, rejected=None)) + "\n")
    told: list[str] = []
    assert score_pairs(make_dpo_recipe(bad), tmp_path / "out.jsonl", told.append) == (1, 1)
    assert len(told) == 1 and "bad.jsonl:2: speech.rejected is None" in told[0]

    # what an interrupted command with another model has left
    with ResumedRows(tmp_path / "other.jsonl", {"model": "other"}):
        pass
    with pytest.raises(InputError, match=r"other\.jsonl\.partial is of a command with other settings"):
        score_pairs(make_dpo_recipe(), tmp_path / "other.jsonl", print)


def test_a_planted_preference(
    make_dpo_recipe: Callable[..., Recipe], scored: Path, tiny_model: Path, tmp_path: Path
) -> None:
    """Within 30 steps the better answers gain in all pairs, held-out ones too; the reference has not moved by a bit."""
    before = fingerprint(tiny_model, COMPONENTS)
    values = flatten_params(store.load(tiny_model, COMPONENTS))
    train_rows = tmp_path / "train.jsonl"
    valid_rows = tmp_path / "valid.jsonl"
    lines = scored.read_text().splitlines(keepends=True)
    train_rows.write_text("".join(lines[:8]))
    valid_rows.write_text("".join(lines[8:]))
    recipe = make_dpo_recipe(
        train_rows,
        data={"valid": (str(valid_rows),)},
        steps=30,
        optimizer={"learning_rate": 5e-4, "warmup": 0},
        eval={"every": 30},
        checkpoint={"every": 30},
    )
    assert train(recipe, tmp_path / "run")
    metrics = read_metrics(tmp_path / "run" / METRICS_FILE)
    # the model is the reference at first: in the same float32, but in batches of other rows
    assert metrics[0]["margin"] == pytest.approx(0, abs=1e-3) and metrics[0]["kl"] == pytest.approx(0, abs=1e-3)
    assert metrics[0]["loss"] == pytest.approx(np.log(2), abs=1e-3)
    assert metrics[-1]["margin"] > 1 and metrics[-1]["preference_accuracy"] == 1 and metrics[-1]["loss"] < 0.4
    held_out = read_metrics(tmp_path / "run" / EVALUATIONS_FILE)[-1]
    assert held_out["margin"] > 0 and held_out["preference_accuracy"] == 1 and held_out["loss"] < np.log(2)

    assert fingerprint(tiny_model, COMPONENTS) == before
    after = flatten_params(store.load(tiny_model, COMPONENTS))
    assert all(np.array_equal(values[path], after[path]) for path in values)
    # and the run says what it was measured against
    file = tmp_path / "run" / "checkpoints" / "00000030" / REFERENCE_FILE
    assert json.loads(file.read_text()) == {"fingerprint": before}


def test_a_run_from_another_model(make_dpo_recipe: Callable[..., Recipe], pairs: Path, tmp_path: Path) -> None:
    """Rows without scores, or with those of another model, end the run."""
    with pytest.raises(InputError, match=r"speech.reference is None; tools/score_pairs.py writes"):
        train(make_dpo_recipe(pairs), tmp_path / "run")


def test_a_fingerprint_is_of_every_value(tiny_model: Path, tmp_path: Path) -> None:
    both = fingerprint(tiny_model, COMPONENTS)
    assert re.fullmatch("[0-9a-f]{16}", both) and both == fingerprint(tiny_model, COMPONENTS)
    assert both != fingerprint(tiny_model, ["talker"])
    with pytest.raises(CheckpointError, match="has no speech_tokenizer"):
        fingerprint(tiny_model, ["speech_tokenizer"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(objective={"beta": 0.0}), "objective.beta is 0.0; it must be above 0"),
        (dict(objective={"pairs": 0}), "objective.pairs is 0; it must be from 1"),
        (dict(objective={"voices": {"x": -1}}), "objective.voices, the token of 'x' is -1"),
        (dict(init=RANDOM), "preferences are measured against what a run begins from; --init must be a checkpoint"),
    ],
)
def test_recipes_that_cannot_be(make_dpo_recipe: Callable[..., Recipe], changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_objective(make_dpo_recipe(**changes))

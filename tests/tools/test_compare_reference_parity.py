"""The reference's answers beside ours, of a model as it is and of one that was exported wrongly."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from omni_jax.errors import InputError
from tests.tools.tone_world import make_test_rows
from tools import compare_reference, pack_checkpoint
from tools.compare_reference import Options, ReferenceModel, compare
from tools.task_rows import choose_in_turn

# pictures, videos with sound, silent ones, text; by voice each has a sound behind it
TASKS = ("colour", "colour-at-sound", "order", "day")


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_test_rows(tmp_path_factory.mktemp("world"), TASKS, items=2)


def test_rows_are_of_all_tasks_in_turn(rows: Path, tmp_path: Path) -> None:
    tasks = [task for task, _ in choose_in_turn(rows, 9)]
    names = [name for task in TASKS for name in (task, f"{task}-voice")]
    assert tasks == [*names, names[0]]
    assert len(choose_in_turn(rows, 100)) == 16
    empty = tmp_path / "empty.jsonl"
    empty.write_text('{"task": "colour", "text": "no dialogue"}\n')
    with pytest.raises(InputError, match="no row is a dialogue"):
        choose_in_turn(empty, 1)


def test_answers_are_the_same_until_a_parameter_differs(
    tiny_model: Path, rows: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = Options(tiny_model, rows, items=8, max_tokens=8, max_codes=12)
    found = list(compare(options))
    assert {answer.task for answer in found} == {name for task in TASKS for name in (task, f"{task}-voice")}
    for answer in found:
        assert answer.same_tokens and answer.same_codes and answer.reply.text == answer.reference_text
        # of each code, and of the end where there is one
        assert len(answer.reference.margins) - len(answer.reference.codes) in (0, 1)
        assert min(answer.reference.margins) >= 0
    # the random model does say something
    assert len({answer.reply.token_ids for answer in found}) > 1
    assert len({answer.reply.codec_ids for answer in found}) > 1

    class Damaged(ReferenceModel):
        def __init__(self, checkpoint: Path) -> None:
            super().__init__(checkpoint)
            with torch.no_grad():
                self.whole.talker.codec_head.weight.mul_(-1)

    monkeypatch.setattr(compare_reference, "ReferenceModel", Damaged)
    (answer,) = compare(Options(tiny_model, rows, items=1, max_tokens=8, max_codes=12))
    assert answer.same_tokens and not answer.same_codes


def test_a_thinker_alone(tiny_model: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    thinker = tmp_path / "thinker"
    pack_checkpoint.pack_checkpoint(pack_checkpoint.Options(tiny_model, thinker, components=("thinker",)))
    (answer,) = compare(Options(thinker, rows, items=1, max_tokens=8))
    assert answer.same_tokens and answer.reply.audio is None

    class Damaged(ReferenceModel):
        def __init__(self, checkpoint: Path) -> None:
            super().__init__(checkpoint)
            with torch.no_grad():
                self.thinker.lm_head.weight.mul_(-1)

    monkeypatch.setattr(compare_reference, "ReferenceModel", Damaged)
    (answer,) = compare(Options(thinker, rows, items=1, max_tokens=8))
    assert not answer.same_tokens

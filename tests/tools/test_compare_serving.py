"""A tiny model answers alike at once, streamed and by a file; what is not alike is told."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.tools.test_make_world import ToneSpeaker
from tools import make_world
from tools.compare_serving import Options, compare

TASKS = ("colour", "day")


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(make_world, "Speaker", ToneSpeaker)
        make_world.make_world(make_world.Options(folder, items=1, split="test", tasks=TASKS, voices=("slt",)))
    return folder / "test.jsonl"


def test_a_row_is_answered_alike_each_way(tiny_model: Path, rows: Path) -> None:
    options = Options(tiny_model, rows, items=3, slots=2, max_tokens=6, max_codes=8)
    found = list(compare(options))
    assert [one.question.task for one in found] == ["colour", "colour-voice", "day"]
    assert len({one.question.voice for one in found}) > 1
    for one in found:
        assert one.at_once == one.streamed == one.of_file and one.adds_up
        assert len(one.at_once.codes) > 1
    # a random model rarely ends by itself
    loose = Options(tiny_model, rows, max_tokens=6, max_codes=1000)
    one = next(one for one in found if one.at_once.finish_reason == "length")
    assert one.find_trouble(loose) == ["no end within 6 tokens"]
    assert one.find_trouble(options) == ["no end within 6 tokens", f"no end within {options.max_codes} codes"]
    ended = one._replace(at_once=one.at_once._replace(finish_reason="stop"))
    assert ended.find_trouble(loose) == []
    other = one.at_once._replace(text="other")
    assert ended._replace(of_file=other).find_trouble(loose) == [f"{one.at_once.text!r}, by a file 'other'"]
    silent = one.at_once._replace(codes=())
    assert ended._replace(streamed=silent).find_trouble(loose) == ["other codes streamed"]
    assert ended._replace(adds_up=False).find_trouble(loose) == ["pieces of the stream do not add up to its reply"]

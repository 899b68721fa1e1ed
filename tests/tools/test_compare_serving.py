"""A tiny model answers alike offline, streamed and in a batch file; what is not alike is told."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.tools.tone_world import make_test_rows
from tools.compare_serving import Options, compare

TASKS = ("colour", "day")


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_test_rows(tmp_path_factory.mktemp("world"), TASKS)


def test_a_row_is_answered_alike_each_way(tiny_model: Path, rows: Path) -> None:
    options = Options(tiny_model, rows, items=3, slots=2, max_tokens=6, max_codes=8)
    found = list(compare(options))
    assert [one.question.task for one in found] == ["colour", "colour-voice", "day"]
    assert len({one.question.voice for one in found}) > 1
    for one in found:
        assert one.offline == one.streamed == one.batch_file and one.adds_up
        assert len(one.offline.codes) > 1
    # a random model rarely ends by itself
    loose = Options(tiny_model, rows, max_tokens=6, max_codes=1000)
    one = next(one for one in found if one.offline.finish_reason == "length")
    assert one.find_differences(loose) == ["no end within 6 tokens"]
    assert one.find_differences(options) == ["no end within 6 tokens", f"no end within {options.max_codes} codes"]
    ended = one._replace(offline=one.offline._replace(finish_reason="stop"))
    assert ended.find_differences(loose) == []
    other = one.offline._replace(text="other")
    assert ended._replace(batch_file=other).find_differences(loose) == [
        f"{one.offline.text!r}, in a batch file 'other'"
    ]
    silent = one.offline._replace(codes=())
    assert ended._replace(streamed=silent).find_differences(loose) == ["other codes streamed"]
    assert ended._replace(adds_up=False).find_differences(loose) == ["pieces of the stream do not add up to its reply"]

"""The latency report: its arithmetic by hand, and a run of all of it at a tiny size. No times are looked at."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import budget, first_packet, latency
from benchmarks.budget import LINES, REST, UNTIL_TALKER, WHILE_TALKER_WAITS, PromptPlan, ReplyLength, StreamPlan
from benchmarks.budget_picture import draw_first_packets, draw_latency
from benchmarks.latency import LatencyRun, make_request
from benchmarks.ours import OmniJaxSide, make_stream_plan
from benchmarks.side import Call, Part, ReplyRequest
from omni_jax.config import OmniConfig
from omni_jax.engine.request import ChunkSizes
from tests.benchmarks.conftest import InProcess

SECONDS = [1, 2]
ROUNDING = 1e-9  # of sums of a few float64
PUBLISHED = StreamPlan(2, 12, 16, 36, 24, 12, 2, dit_look_ahead=12, vocoder_look_ahead=34, vocoder_look_back=34)


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("latency") / "out" / "latency.json"


@pytest.fixture(scope="module")
def results(folder: Path, out: Path) -> dict[str, Any]:
    return LatencyRun(folder, latency.SOUND, out, InProcess).run(SECONDS, SECONDS[:1], 1)


def test_packets_in_time_leave_no_gap() -> None:
    played = budget.play_packets([1.0, 1.25, 3.0], [24_000, 24_000, 12_000])
    assert played.begins == (1.0, 2.0, 3.0)
    assert played.gaps == ()


def test_packets_too_late_leave_gaps() -> None:
    # the second comes half a second late, the third in time because of that, the fourth a quarter late
    played = budget.play_packets([1.0, 2.5, 3.25, 4.75], [24_000, 24_000, 24_000, 100])
    assert played.begins == (1.0, 2.5, 3.5, 4.75)
    assert played.gaps == (0.5, 0.25)


def test_steps_in_turns() -> None:
    def count(plan: StreamPlan, seconds: int) -> tuple[int, ...]:
        return tuple(plan.count_steps(ReplyLength(seconds)).values())

    # 2 tokens; then 12 a turn, and as many codes as there are tokens but two: 12, 24, 36
    assert count(PUBLISHED, 30) == (2, 36, 36)
    # all 8 tokens are there after the second turn: 16 codes in each
    assert count(PUBLISHED, 2) == (2, 6, 48)
    assert count(dataclasses.replace(PUBLISHED, first_tokens=1, tokens=1), 30) == (2, 36, 36)


def test_the_first_packet_is_what_both_networks_do_not_have_to_look_ahead_to() -> None:
    assert PUBLISHED.chunks() == (36,)
    assert PUBLISHED.first_packet_seconds == pytest.approx((72 - 24 - 34) / 100)
    # 24 codes make 24 frames, fewer than the vocoder looks ahead
    short = dataclasses.replace(PUBLISHED, first_chunk_codes=24)
    assert short.chunks() == (24, 24)
    # unless it looks ahead less at first
    early = dataclasses.replace(short, first_look_ahead=10)
    assert early.chunks() == (24,) and early.first_packet_seconds == pytest.approx(0.14)
    work = early.predict_work(ReplyLength(30), PromptPlan(200, audio_blocks=4, positions=256))
    assert (work[Part.CODES], work[Part.DIT], work[Part.VOCODER]) == (24, 1, 24)


def test_the_work_to_the_first_packet() -> None:
    work = PUBLISHED.predict_work(ReplyLength(30), PromptPlan(200, audio_blocks=4, positions=256))
    assert (work[Part.ENCODERS], work[Part.PREFILL], work[Part.CODES]) == (4, 256, 36)
    assert (work[Part.DIT], work[Part.VOCODER], work[Part.COPY]) == (2, 48, 1)


CALLS = [
    Call(Part.INPUT, 0.0, 0.5, 1),
    Call(Part.TEXT, 0.5, 1.0, 2),
    Call(Part.TEXT, 1.0, 3.0, 8),
    Call(Part.BEGIN, 3.0, 3.25, 1),
    Call(Part.CODES, 3.5, 5.5, 8),
    Call(Part.DIT, 6.0, 9.0, 3),
]


def test_the_budget_adds_up() -> None:
    lines = budget.measured_budget(budget.calls_until(CALLS, 6.0), 6.0)
    assert lines[UNTIL_TALKER] == 0.5
    assert lines[WHILE_TALKER_WAITS] == 2.0
    assert lines["Talker"] == 2.25
    assert lines["DiT"] == 0.0
    assert lines[REST] == 0.75
    assert sum(lines.values()) == 6.0


def test_the_prediction_is_work_times_cost() -> None:
    costs = budget.unit_costs(CALLS)
    assert costs == {Part.INPUT: 0.5, Part.TEXT: 0.25, Part.BEGIN: 0.25, Part.CODES: 0.25, Part.DIT: 1.0}
    costs |= {Part.ENCODERS: 0.125, Part.PREFILL: 0.5, Part.SPEAKER: 2.0, Part.VOCODER: 0.25, Part.COPY: 0.0}
    work = {Part.INPUT: 1, Part.ENCODERS: 4, Part.PREFILL: 2, Part.SPEAKER: 1, UNTIL_TALKER: 2, WHILE_TALKER_WAITS: 40}
    work |= {Part.BEGIN: 1, Part.CODES: 40, Part.DIT: 3, Part.VOCODER: 4, Part.COPY: 1}
    predicted = budget.predicted_budget(work, costs)
    assert list(predicted.values()) == [0.5, 0.5, 1.0, 2.0, 0.5, 10.0, 10.25, 3.0, 1.0, 0.0]
    assert list(predicted) == list(LINES)


def test_the_talkers_prefill_belongs_to_the_thinkers_positions() -> None:
    calls = [Call(Part.PREFILL, 0.0, 1.0, 64), Call(Part.TALKER_PREFILL, 1.0, 1.5, 64)]
    assert budget.unit_costs(calls) == {Part.PREFILL: 1.5 / 64}
    assert budget.sum_work(calls) == {Part.PREFILL: 64}


def test_the_median_round_is_one_of_the_rounds() -> None:
    rounds = [{"t": 3.0, "other": 1}, {"t": 1.0, "other": 2}, {"t": 2.0, "other": 3}, {"t": 9.0, "other": 4}]
    assert budget.median_round(rounds, "t") == rounds[2]


def test_what_the_published_sizes_declare() -> None:
    assert make_stream_plan(OmniConfig.qwen2_5_omni_7b(), ChunkSizes()) == PUBLISHED


@pytest.mark.long
def test_the_parts_do_what_is_predicted(results: dict[str, Any]) -> None:
    for reply in results["replies"]:
        for kind in ("cold", "warm"):
            assert reply[kind]["work"] == {part: n for part, n in reply["predicted_work"].items() if n}
            assert reply[kind]["first_packet_seconds"] == pytest.approx(results["first_packet"]["seconds"])
        assert set(reply["predicted"]) == set(LINES)


@pytest.mark.long
def test_the_measured_budget_is_the_time_to_the_first_packet(results: dict[str, Any]) -> None:
    for reply in results["replies"]:
        for one in (reply["cold"], reply["warm"]):
            assert sum(one["budget"].values()) == pytest.approx(one["audio_ttfp"], rel=ROUNDING)
            assert min(one["budget"].values()) >= 0
            assert 0 < one["ttft"] < one["audio_ttfp"] <= one["first_audible"]
            assert one["audio_rtf"] == pytest.approx(one["wall"] / reply["seconds"])
            assert sum(seconds for _, seconds in one["packets"]) == pytest.approx(reply["seconds"])


@pytest.mark.long
def test_nothing_is_compiled_when_it_is_warm(results: dict[str, Any]) -> None:
    assert [reply["warm"]["compilations"] for reply in results["replies"]] == [0, 0]


@pytest.mark.long
def test_pytorch_answers_too(results: dict[str, Any]) -> None:
    first, second = results["replies"]
    assert "pytorch" not in second
    assert first["pytorch"]["audio_ttfp"] == pytest.approx(first["pytorch"]["audio_rtf"] * first["seconds"])
    assert first["pytorch"]["first_audible"] >= first["pytorch"]["audio_ttfp"]


def test_a_reply_of_another_length_is_no_figure() -> None:
    with pytest.raises(RuntimeError, match=r"4 tokens and 50 codes were asked for, and \(3, 50\) came"):
        ReplyRequest("what", 4, 50).check_reply(3, 50)
    ReplyRequest("what", 4, 50).check_reply(4, 0, spoken=False)


@pytest.mark.long
def test_table_file_and_picture(
    results: dict[str, Any], out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    latency.print_results(results)
    printed = capsys.readouterr().out
    assert all(line in printed for line in (*LINES, REST, "audio_ttfp", "pytorch", "underruns"))
    assert f"over that of the 1 s one, both warm: {results['ratio']:.3f}" in printed
    assert json.loads(out.read_text(encoding="utf-8"))["ratio"] == results["ratio"]
    draw_latency(results, tmp_path / "pictures" / "latency.png")
    assert (tmp_path / "pictures" / "latency.png").stat().st_size > 10_000


@pytest.mark.long
def test_first_packets_alone(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The same work leads to them as in whole replies, nothing compiles, and every round counts."""
    made = first_packet.run_all(folder, latency.SOUND, SECONDS, 2, InProcess)
    ours = InProcess(OmniJaxSide, folder)
    stream = ours.run(OmniJaxSide.plan_stream)
    prompt = ours.run(OmniJaxSide.plan_prompt, make_request(latency.SOUND, ReplyLength(1)))
    for seconds, reply in zip(SECONDS, made["replies"], strict=True):
        needed = stream.predict_work(ReplyLength(seconds), prompt)
        assert reply["work"] == {part: n for part, n in needed.items() if n}
        assert reply["compilations"] == 0
        assert sum(reply["budget"].values()) == pytest.approx(reply["audio_ttfp"], rel=ROUNDING)
        assert 0 < reply["ttft"] < reply["audio_ttfp"] and len(reply["rounds"]) == 2
    first, second = (sum(reply["rounds"]) / 2 for reply in made["replies"])
    assert made["replies"][1]["ratio"] == pytest.approx(second / first, rel=ROUNDING)
    first_packet.print_results(made)
    printed = capsys.readouterr().out
    assert all(line in printed for line in ("audio_ttfp", "median over that of 1 s"))
    draw_first_packets(made, tmp_path / "first.png")
    assert (tmp_path / "first.png").stat().st_size > 10_000

"""The latency report: its arithmetic by hand, and a run of all of it at a tiny size. No times are looked at."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import bench_first_packet, bench_latency, latency_figures, latency_ours, latency_picture
from benchmarks.latency_figures import LINES, REST, Call, Length, Streams
from benchmarks.latency_ours import Request
from omni_jax.config import BigVGANConfig, DiTConfig, OmniConfig, TalkerConfig, Token2WavConfig
from omni_jax.engine.prefill import ChunkSizes
from tests.tools import test_bench_parity
from tools import bench

# the published codes: of fewer, the ends could come among the 40 likeliest
ENDS = dict(tts_codec_pad_token_id=8292, tts_codec_start_token_id=8293, tts_codec_end_token_id=8294)
TALKER = TalkerConfig.tiny(vocab_size=8448, tts_codec_mask_token_id=8296, **ENDS)
WAVE = Token2WavConfig(dit_config=DiTConfig.tiny(num_embeds=8193), bigvgan_config=BigVGANConfig.tiny())
CONFIG = OmniConfig.tiny(talker_config=TALKER, token2wav_config=WAVE)
LENGTHS = [Length(1), Length(2)]
ROUNDING = 1e-9  # of sums of a few float64

USUAL = Streams(2, 8, 16, 36, 24, block=12, frames=2, dit_ahead=12, vocoder_ahead=34, vocoder_back=34)


class InProcess(test_bench_parity.InProcess):
    def close(self) -> None:
        """There is nothing to end."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("latency")


@pytest.fixture(scope="module")
def results(folder: Path) -> dict[str, Any]:
    request = Request(folder / "converted", bench_latency.SOUND)
    out = folder / "out" / "latency.json"
    return bench_latency.report(CONFIG, request, LENGTHS, LENGTHS[:1], 1, side=InProcess, json_out=out)


def test_packets_in_time_leave_no_gap() -> None:
    played = latency_figures.play([1.0, 1.25, 3.0], [24_000, 24_000, 12_000])
    assert played.begins == (1.0, 2.0, 3.0)
    assert (played.underruns, played.largest_gap) == (0, 0.0)


def test_packets_too_late_leave_gaps() -> None:
    # the second comes half a second late, the third in time because of that, the fourth a quarter late
    played = latency_figures.play([1.0, 2.5, 3.25, 4.75], [24_000, 24_000, 24_000, 100])
    assert played.begins == (1.0, 2.5, 3.5, 4.75)
    assert played.gaps == (0.5, 0.25)
    assert (played.underruns, played.largest_gap) == (2, 0.5)


def test_steps_in_turns() -> None:
    # 2 tokens; then 8 a turn, and as many codes as there are tokens but two: 8, 16, 24, 32, 40
    assert USUAL.lockstep(Length(30)) == {"think": 2, "think on": 40, "begin": 1, "talk": 40}
    # all 8 tokens are there after the second turn: 16 codes in each
    assert USUAL.lockstep(Length(2)) == {"think": 2, "think on": 6, "begin": 1, "talk": 48}
    slow = dataclasses.replace(USUAL, first_tokens=1, tokens=1)
    assert slow.lockstep(Length(30)) == {"think": 2, "think on": 36, "begin": 1, "talk": 36}


def test_the_first_packet_is_what_both_networks_do_not_have_to_see_ahead() -> None:
    assert USUAL.chunks() == (36,)
    assert USUAL.first_packet == pytest.approx((72 - 24 - 34) / 100)
    # 24 codes make 24 frames, fewer than the vocoder looks ahead
    assert dataclasses.replace(USUAL, first_chunk_codes=24).chunks() == (24, 24)


def test_the_work_to_the_first_packet() -> None:
    work = USUAL.work(Length(30), audio_blocks=4, positions=256)
    assert (work["encode"], work["read"], work["talk"]) == (4, 256, 40)
    assert (work["solve"], work["vocode"], work["copy"]) == (3, 34 + 34 + 72, 1)


CALLS = [
    Call("input", 0.0, 0.5, 1),
    Call("think", 0.5, 1.0, 2),
    Call("begin", 1.0, 1.25, 1),
    Call("think", 1.5, 3.5, 8),
    Call("talk", 3.5, 5.5, 8),
    Call("solve", 6.0, 9.0, 3),
]


def test_the_budget_adds_up() -> None:
    calls = latency_figures.named(CALLS)
    budget = latency_figures.measured(latency_figures.before(calls, 6.0), 6.0)
    assert budget["Thinker, until the Talker may start"] == 0.5
    assert budget["Thinker, while the Talker waits"] == 2.0
    assert budget["Talker"] == 2.25
    assert budget["DiT"] == 0.0
    assert budget[REST] == 0.75
    assert sum(budget.values()) == 6.0


def test_the_prediction_is_work_times_cost() -> None:
    prices = latency_figures.costs(CALLS)
    assert prices == {"input": 0.5, "think": 0.25, "begin": 0.25, "talk": 0.25, "solve": 1.0}
    prices |= dict(encode=0.125, read=0.5, voice=2.0, vocode=0.25, copy=0.0)
    work = dict(input=1, encode=4, read=2, voice=1, think=2, begin=1, talk=40, solve=3, vocode=4, copy=1)
    predicted = latency_figures.predicted({**work, "think on": 40}, prices)
    assert list(predicted.values()) == [0.5, 0.5, 1.0, 2.0, 0.5, 10.0, 10.25, 3.0, 1.0, 0.0]
    assert list(predicted) == list(LINES)


def test_the_middle_round_is_one_of_the_rounds() -> None:
    rounds = [dict(t=3.0, other=1), dict(t=1.0, other=2), dict(t=2.0, other=3), dict(t=9.0, other=4)]
    assert latency_figures.middle(rounds, "t") == rounds[2]


def test_what_the_published_sizes_declare() -> None:
    assert latency_ours.streams(OmniConfig.qwen2_5_omni_7b(), ChunkSizes()) == USUAL


def test_the_parts_do_what_is_predicted(results: dict[str, Any]) -> None:
    for reply in results["replies"]:
        for kind in ("cold", "warm"):
            assert reply[kind]["work"] == {part: n for part, n in reply["predicted_work"].items() if n}
            assert reply[kind]["first_packet_seconds"] == pytest.approx(results["first_packet"]["seconds"])
        assert set(reply["predicted"]) == set(LINES)


def test_the_measured_budget_is_the_time_to_the_first_packet(results: dict[str, Any]) -> None:
    for reply in results["replies"]:
        for one in (reply["cold"], reply["warm"]):
            assert sum(one["budget"].values()) == pytest.approx(one["audio_ttfp"], rel=ROUNDING)
            assert min(one["budget"].values()) >= 0
            assert 0 < one["ttft"] < one["audio_ttfp"] <= one["first_audible"]
            assert one["audio_rtf"] == one["wall"] / reply["seconds"]
            assert sum(sound for _, sound in one["packets"]) == pytest.approx(reply["seconds"])


def test_nothing_is_compiled_when_it_is_warm(results: dict[str, Any]) -> None:
    assert results["warmup"]["programs"] > 0
    for reply in results["replies"]:
        assert 0 < reply["cold"]["compilations_to_the_first_packet"] <= reply["cold"]["compilations"]
        assert reply["warm"]["compilations"] == 0


def test_pytorch_answers_too(results: dict[str, Any]) -> None:
    first, second = results["replies"]
    assert "pytorch" not in second
    assert first["pytorch"]["audio_ttfp"] == first["pytorch"]["audio_rtf"] * first["seconds"]
    assert first["pytorch"]["first_audible"] >= first["pytorch"]["audio_ttfp"]


def test_a_reply_of_another_length_is_no_figure(
    results: dict[str, Any], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = Request(folder / "converted", bench_latency.SOUND)
    model = latency_ours._session(request).model
    stream = model.stream
    monkeypatch.setattr(model, "stream", lambda *asked, **options: stream(*asked, **{**options, "max_tokens": 3}))
    with pytest.raises(RuntimeError, match=r"4 tokens and 50 codes were asked for, and \(3, 50\) came"):
        latency_ours.warm(request, Length(1))


def test_table_file_and_picture(results: dict[str, Any], folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bench_latency.show(results)
    printed = capsys.readouterr().out
    assert all(line in printed for line in (*LINES, REST, "audio_ttfp", "pytorch", "underruns"))
    assert f"over that of the 1 s one, both warm: {results['ratio']:.3f}" in printed
    written, picture = folder / "out" / "latency.json", folder / "pictures" / "latency.png"
    assert json.loads(written.read_text(encoding="utf-8"))["replies"][1]["warm"] == results["replies"][1]["warm"]
    latency_picture.main(written, picture)
    assert picture.stat().st_size > 10_000


def test_first_packets_alone(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The same work is_main_process to them as in whole replies, nothing compiles, and every round counts."""
    (folder / "apart").mkdir()
    request, out = Request(folder / "apart" / "converted", bench_latency.SOUND), folder / "first.json"
    results = bench_first_packet.report(CONFIG, request, LENGTHS, 2, side=InProcess, json_out=out)
    declared = latency_ours._session(request)
    for length, reply in zip(LENGTHS, results["replies"], strict=True):
        needed = declared.streams.work(length, *declared.plan())
        assert reply["work"] == {part: n for part, n in needed.items() if n}
        assert reply["compilations"] == 0
        assert sum(reply["budget"].values()) == pytest.approx(reply["audio_ttfp"], rel=ROUNDING)
        assert 0 < reply["ttft"] < reply["audio_ttfp"] and len(reply["rounds"]) == 2
    first, second = (sum(r["rounds"]) / 2 for r in results["replies"])
    assert results["replies"][1]["ratio"] == pytest.approx(second / first, rel=ROUNDING)
    bench_first_packet.show(results)
    printed = capsys.readouterr().out
    assert all(line in printed for line in ("audio_ttfp", "median over that of 1 s"))
    assert json.loads(out.read_text(encoding="utf-8")) == results
    latency_picture.draw_first(results, folder / "first.png")
    assert (folder / "first.png").stat().st_size > 10_000


def test_the_picture_needs_figures(tmp_path: Path) -> None:
    written = tmp_path / "a.json"
    written.write_text("[]", encoding="utf-8")
    with pytest.raises(SystemExit, match=r"holds no figures of bench\.py latency"):
        latency_picture.main(written, tmp_path / "a.png")
    written.write_text('{"replies": [{"seconds": 2}]}', encoding="utf-8")
    with pytest.raises(SystemExit, match="was written by a run that did not end"):
        latency_picture.main(written, tmp_path / "a.png")


def test_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as done:
        bench.main(["latency", "--help"])
    assert done.value.code == 0
    text = capsys.readouterr().out
    options = ("--json-out", "--picture", "--seconds", "--reference-seconds", "--repeats", "--sound")
    assert all(word in text for word in (*options, "Example", "warmup"))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--seconds", "0"], "--seconds 0: give different lengths of 1 to 327"),
        (["--seconds", "2", "2"], "--seconds 2 2: give different lengths"),
        (["--seconds", "2", "--reference-seconds", "10"], "each must be one of --seconds"),
        (["--repeats", "0"], "--repeats 0: it must be at least 1"),
        (["--sound", "none.wav"], r"--sound none.wav: there is no such file"),
        (["--picture", "a.txt"], r"--picture a.txt: its name must end in .png, .svg, .pdf"),
    ],
)
def test_wrong_options(given: list[str], message: str) -> None:
    with pytest.raises(SystemExit, match=message):
        bench.main(["latency", *given])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--seconds", "10", "2"], "--seconds 10 2: give different lengths from 1 on, shortest first"),
        (["--repeats", "0"], "--repeats 0: it must be at least 1"),
        (["--sound", "none.wav"], "--sound none.wav: there is no such file"),
        (["--picture", "a.txt"], r"--picture a.txt: its name must end in .png, .svg, .pdf"),
    ],
)
def test_wrong_options_of_first_packets(given: list[str], message: str) -> None:
    with pytest.raises(SystemExit, match=message):
        bench.main(["first-packet", *given])

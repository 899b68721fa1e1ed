"""``bench.py latency``: when a spoken reply's first text and first sound come, and what they had to wait for."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from benchmarks.budget import (
    AUDIBLE,
    LINES,
    REST,
    ReplyLength,
    median_round,
    predicted_budget,
    summarize_reply,
    unit_costs,
)
from benchmarks.budget_picture import draw_latency
from benchmarks.models import make_middle_config, write_model
from benchmarks.ours import OmniJaxSide
from benchmarks.pytorch_side import PyTorchSide
from benchmarks.report import (
    add_seconds,
    check_at_least_one,
    check_picture,
    check_seconds,
    check_sound,
    format_seconds,
    print_tables,
    write_json,
)
from benchmarks.side import CODES_PER_SECOND, TOKENS_PER_SECOND, ReplyRequest, Side, SideProcess

# what is asked: three seconds of speech, and a question in writing
QUESTION = "What do you hear?"
SOUND = Path(__file__).resolve().parents[1] / "tests" / "media" / "speech.wav"
CALIBRATION = ReplyLength(4)  # of the reply that the cost of a unit of work is taken from


def latency(
    json_out: Path | None = None,
    picture: Path | None = None,
    seconds: tuple[int, ...] = (2, 10, 30),
    reference_seconds: tuple[int, ...] = (2, 10, 30),
    repeats: int = 3,
    sound: Path = SOUND,
) -> None:
    """The time to the first packet, line by line, at the middle size with random parameters in float32.

    One request, three seconds of speech and a question in writing, is answered aloud at several lengths: 50 codes and
    4 tokens of text a second. The ends are made impossible, so that a reply is as long as it is asked to be; codes are
    sampled in the published way.

    Cold is the first request of a process that has just loaded the model: all is compiled on the way. Warm is one
    after model.warmup(): of several rounds the one with the median time to the first packet. Predicted is how much each
    part has to do until then, from what the parts declare, times what a unit of its work takes in another reply.
    PyTorch answers the same request from the same parameters; it has no sound before its reply is whole, and its time
    leaves out the reading of the input.

    Each call of a part is waited for while it is timed. audio_rtf is the time from the request to the last packet for a
    second of speech; underruns and gaps are those of a player that starts with the first packet, at normal speed.

    On two cores: about 25 minutes, half of it PyTorch's and the cold runs'.

    Example: python tools/bench.py latency --json-out out/latency.json --picture out/latency.png

    Example, in a few minutes: python tools/bench.py latency --seconds 2 4 --reference-seconds 2 --repeats 1

    Args:
      json_out: write the figures here as well.
      picture: draw the budgets here as stacked bars (.png, .svg or .pdf).
      seconds: of the replies, shortest first.
      reference_seconds: those of them that PyTorch speaks too, once each after a short one.
      repeats: rounds of the warm replies.
      sound: what the request has before its question.
    """
    # before half an hour of work
    check_seconds(seconds, reference_seconds)
    check_at_least_one(repeats=repeats)
    check_sound(sound)
    check_picture(picture)
    os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"  # of the processes to come: cold is to be cold
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_model(folder, make_middle_config())
        results = LatencyRun(folder, sound.resolve(), json_out).run(seconds, reference_seconds, repeats)
    print_results(results)
    if picture is not None:
        draw_latency(results, picture)


def make_request(sound: Path, length: ReplyLength) -> ReplyRequest:
    """A sound and a question, to be answered aloud."""
    return ReplyRequest(QUESTION, length.num_tokens, length.num_codes, sound)


@dataclass
class LatencyRun:
    """One run of the benchmark.

    Attributes:
      folder: of the model.
      sound: of the request.
      json_out: where the figures are written, each part as it is done.
      process: in which a side works.
    """

    folder: Path
    sound: Path
    json_out: Path | None = None
    process: type[SideProcess] = SideProcess

    def run(self, seconds: Sequence[int], reference_seconds: Sequence[int], repeats: int) -> dict[str, Any]:
        """All figures, as they are written."""
        lengths = [ReplyLength(length) for length in seconds]
        # of each reply, what is filled in as it is measured
        replies = []
        for length in lengths:
            replies.append({"seconds": length.seconds, "tokens": length.num_tokens, "codes": length.num_codes})
        results: dict[str, Any] = {
            "tokens_a_second": TOKENS_PER_SECOND,
            "codes_a_second": CODES_PER_SECOND,
            "audible": AUDIBLE,
            "sound": self.sound.name,
            "replies": replies,
        }
        with Progress(console=Console(stderr=True)) as progress:
            # cold replies and warm ones, the prediction, PyTorch's replies
            total = len(seconds) * (1 + repeats) + 1 + len(reference_seconds)
            bar = progress.add_task("cold replies", total=total)

            # a run that is broken off leaves the figures that it had
            def finish_step(next_steps: str) -> None:
                write_json(self.json_out, results)
                progress.update(bar, advance=1, description=next_steps)

            for length, reply in zip(lengths, replies, strict=True):
                # a process for each, for the first request compiles what the second would find
                with self.process(OmniJaxSide, self.folder) as ours:
                    load_seconds = ours.run(Side.load)
                    cold = ours.run(Side.stream_reply, make_request(self.sound, length))
                reply["cold"] = {**summarize_reply(cold), "load_seconds": load_seconds}
                finish_step("cold replies")
            with self.process(OmniJaxSide, self.folder) as ours:
                self._predict(ours, lengths, results)
                finish_step("warm replies")
                self._answer_warm(ours, lengths, repeats, replies, finish_step)
                requests = [make_request(self.sound, length) for length in lengths]
                inputs = ours.run(OmniJaxSide.make_inputs, requests)
            results["ratio"] = replies[-1]["warm"]["audio_ttfp"] / replies[0]["warm"]["audio_ttfp"]
            # our process has ended, and its memory is free for PyTorch's
            if reference_seconds:
                with self.process(PyTorchSide, self.folder) as pytorch:
                    results["pytorch_load_seconds"] = pytorch.run(Side.load)
                    pytorch.run(Side.warm_up, inputs)
                    for request, reply in zip(inputs, replies, strict=True):
                        if reply["seconds"] in reference_seconds:
                            reply["pytorch"] = summarize_reply(pytorch.run(Side.stream_reply, request))
                            finish_step("PyTorch")
        write_json(self.json_out, results)
        return results

    def _predict(self, ours: SideProcess[OmniJaxSide], lengths: Sequence[ReplyLength], results: dict[str, Any]) -> None:
        """Warms up, and works out what the first packets will take, before any of them is timed."""
        requests = [make_request(self.sound, length) for length in lengths]
        warmed = ours.run(Side.warm_up, requests)
        prompt = ours.run(OmniJaxSide.plan_prompt, requests[0])
        stream = ours.run(OmniJaxSide.plan_stream)
        # of another length than those that are predicted, so that nothing is predicted from itself
        calibration = ours.run(Side.stream_reply, make_request(self.sound, CALIBRATION))
        costs = unit_costs(calibration.calls)
        results["warmup"] = {"programs": warmed.count, "seconds": warmed.seconds}
        results["prompt_tokens"] = prompt.num_tokens
        results["first_packet"] = {"chunks": stream.chunks(), "seconds": stream.first_packet_seconds}
        results["unit_costs"] = costs
        for length, reply in zip(lengths, results["replies"], strict=True):
            reply["predicted_work"] = stream.predict_work(length, prompt)
            reply["predicted"] = predicted_budget(reply["predicted_work"], costs)

    def _answer_warm(
        self,
        ours: SideProcess[OmniJaxSide],
        lengths: Sequence[ReplyLength],
        repeats: int,
        replies: Sequence[dict[str, Any]],
        finish_step: Callable[[str], None],
    ) -> None:
        rounds: dict[ReplyLength, list[dict[str, Any]]] = {length: [] for length in lengths}
        # in turns, so that a slow minute of the machine hits all lengths alike
        for _ in range(repeats):
            for length in lengths:
                reply = ours.run(Side.stream_reply, make_request(self.sound, length))
                rounds[length].append(summarize_reply(reply))
                finish_step("warm replies")
        for length, figures in zip(lengths, replies, strict=True):
            figures["warm"] = median_round(rounds[length], "audio_ttfp")
            figures["warm_audio_ttfp"] = [one["audio_ttfp"] for one in rounds[length]]


def print_results(results: dict[str, Any]) -> None:
    """Budgets, replies, and what they were predicted from."""
    replies = results["replies"]
    warmed = results["warmup"]
    packet = results["first_packet"]
    chunks = " + ".join(map(str, packet["chunks"]))
    shortest = replies[0]["seconds"]
    longest = replies[-1]["seconds"]
    print_tables(
        _make_budget_table(replies),
        _make_reply_table(replies),
        f"audio_ttfp of the {longest} s reply over that of the {shortest} s one, both warm: {results['ratio']:.3f}",
        f"warm-up: {warmed['programs']} programs in {format_seconds(warmed['seconds'])}",
        f"the first packet: {format_seconds(packet['seconds'])} of sound, from {chunks} codes",
    )


def _make_budget_table(replies: Sequence[dict[str, Any]]) -> Table:
    # a column for each
    budgets = {}
    for reply in replies:
        budgets[f"{reply['seconds']} s, cold"] = reply["cold"]["budget"]
        budgets[f"{reply['seconds']} s, warm"] = reply["warm"]["budget"]
        budgets[f"{reply['seconds']} s, predicted"] = reply["predicted"]
    table = Table("to the first packet", *budgets)
    for line in (*LINES, REST):
        seconds = [budget.get(line) for budget in budgets.values()]  # a prediction has no rest
        add_seconds(table, line, seconds)
    # each column's sum, which of a measured one is audio_ttfp
    table.add_section()
    totals = [sum(budget.values()) for budget in budgets.values()]
    add_seconds(table, "together", totals)
    return table


def _make_reply_table(replies: Sequence[dict[str, Any]]) -> Table:
    heads = ("ttft", "audio_ttfp", "first audible", "whole", "audio_rtf", "underruns", "largest gap", "compilations")
    table = Table("reply", "", *heads, title=f"first audible: the first sample of at least {AUDIBLE:g} of full scale")
    for reply in replies:
        for kind in ("cold", "warm", "pytorch"):
            # PyTorch speaks some of the lengths
            if kind not in reply:
                continue
            one = reply[kind]
            compiled = str(one.get("compilations", "-"))
            if one.get("compilations"):
                compiled += f" in {format_seconds(one['compile_seconds'])}"
            times = [format_seconds(one[key]) for key in ("ttft", "audio_ttfp", "first_audible", "wall")]
            table.add_row(
                f"{reply['seconds']} s",
                kind,
                *times,
                f"{one['audio_rtf']:.2f}",
                str(one["underruns"]),
                format_seconds(one["largest_gap"]),
                compiled,
            )
    return table

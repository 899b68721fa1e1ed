"""Draws budgets of first packets as stacked bars."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.budget import LINES, REST
from benchmarks.report import save_figure


def draw_latency(results: dict[str, Any], picture: Path) -> None:
    """Draws two bars for each reply on the left, warm and what was predicted of it, and a cold one on the right.

    Args:
      results: of ``bench.py latency``.
      picture: where to; its folder is made.
    """
    from matplotlib import pyplot  # an extra, which only pictures need

    figure, panels = pyplot.subplots(1, 2, figsize=(13, 5.2), layout="constrained")
    # name of a bar -> its budget, line by line
    warm = {}
    cold = {}
    for reply in reversed(results["replies"]):  # bars are drawn from the bottom up
        warm[f"{reply['seconds']} s, predicted"] = reply["predicted"]
        warm[f"{reply['seconds']} s, measured"] = reply["warm"]["budget"]
        cold[f"{reply['seconds']} s, measured"] = reply["cold"]["budget"]
    _draw_bars(panels[0], warm, "warm: after model.warmup()")
    _draw_bars(panels[1], cold, "cold: the first request after loading, compiling included")
    _finish(figure, panels[0], picture)


def draw_first_packets(results: dict[str, Any], picture: Path) -> None:
    """Draws a bar for each reply.

    Args:
      results: of ``bench.py first-packet``.
      picture: where to; its folder is made.
    """
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(13, 4), layout="constrained")
    budgets = {f"reply of {reply['seconds']} s": reply["budget"] for reply in reversed(results["replies"])}
    _draw_bars(axes, budgets, "DiT and vocoder at the published size, after model.warmup()")
    _finish(figure, axes, picture)


def _draw_bars(axes: Any, budgets: dict[str, dict[str, float]], title: str) -> None:
    """One bar for each budget, with its sum behind it."""
    from matplotlib import colormaps

    names = list(budgets)
    ends = [0.0] * len(budgets)
    # one line of all bars at a time, each where the line before has ended, so that a line has one colour
    for i, line in enumerate((*LINES, REST)):
        # a predicted budget has no rest
        widths = [budgets[name].get(line, 0.0) for name in names]
        axes.barh(names, widths, left=ends, color=colormaps["tab20"](i), label=line)
        ends = [end + width for end, width in zip(ends, widths, strict=True)]
    for i, end in enumerate(ends):
        axes.text(end, i, f" {end:.2f} s", va="center")
    axes.set(title=title, xlabel="seconds", xlim=(0, 1.15 * max(ends)))


def _finish(figure: Any, axes: Any, picture: Path) -> None:
    # one legend for all panels, whose lines have the same colours
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4)
    figure.suptitle("From the request to the first packet of sound, for replies of several lengths")
    save_figure(figure, picture)

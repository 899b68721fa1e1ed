"""Draws budgets of first packets as stacked bars; as a program, those that ``bench.py latency`` wrote."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it also runs as a file

from benchmarks.latency_figures import LINES, REST

try:
    from matplotlib import colormaps, pyplot
except ImportError:
    sys.exit("pictures need matplotlib: pip install -e '.[plots]'")


def draw(results: dict[str, Any], picture: Path) -> None:
    """Draws a bar for each reply: warm and what is predicted of it on the left, cold on the right.

    Args:
      results: what ``bench.py latency`` gave.
      picture: where to; its folder is made.
    """
    figure, panels = pyplot.subplots(1, 2, figsize=(13, 5.2), layout="constrained")
    replies = results["replies"]
    warm = {}
    for r in reversed(replies):  # bars are drawn from the bottom up
        warm[f"{r['seconds']} s, predicted"] = r["predicted"]
        warm[f"{r['seconds']} s, measured"] = r["warm"]["budget"]
    cold = {f"{r['seconds']} s, measured": r["cold"]["budget"] for r in reversed(replies)}
    _bars(panels[0], warm, "warm: after model.warmup()")
    _bars(panels[1], cold, "cold: the first request after loading, compiling included")
    _save(figure, panels[0], picture)


def draw_first(results: dict[str, Any], picture: Path) -> None:
    """Draws a bar for each reply.

    Args:
      results: what ``bench.py first-packet`` gave.
      picture: where to; its folder is made.
    """
    figure, axes = pyplot.subplots(figsize=(13, 4), layout="constrained")
    budgets = {f"reply of {r['seconds']} s": r["budget"] for r in reversed(results["replies"])}
    _bars(axes, budgets, "DiT and vocoder at the published size, after model.warmup()")
    _save(figure, axes, picture)


def _save(figure: Any, axes: Any, picture: Path) -> None:
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4)
    figure.suptitle("From the request to the first packet of sound, for replies of several lengths")
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, dpi=120)
    pyplot.close(figure)


def _bars(axes: Any, budgets: dict[str, dict[str, float]], title: str) -> None:
    """One bar for each budget, with its sum behind it."""
    names, ends = list(budgets), [0.0] * len(budgets)
    for i, line in enumerate((*LINES, REST)):
        widths = [budgets[name].get(line, 0.0) for name in names]
        axes.barh(names, widths, left=ends, color=colormaps["tab20"](i), label=line)
        ends = [end + width for end, width in zip(ends, widths, strict=True)]
    for i, end in enumerate(ends):
        axes.text(end, i, f" {end:.2f} s", va="center")
    axes.set(title=title, xlabel="seconds", xlim=(0, 1.15 * max(ends)))


def main(figures: tyro.conf.Positional[Path], picture: tyro.conf.Positional[Path]) -> None:
    """Draws the budgets of FIGURES into PICTURE (.png, .svg or .pdf).

    Args:
      figures: what python tools/bench.py latency --json-out wrote.
      picture: where to.
    """
    try:
        results = json.loads(figures.read_text(encoding="utf-8"))
        ready = all("warm" in reply and "cold" in reply for reply in results["replies"])
    except (OSError, ValueError, KeyError, TypeError) as e:
        sys.exit(f"{figures} holds no figures of bench.py latency: {e}")
    if not ready:
        sys.exit(f"{figures} was written by a run that did not end; run bench.py latency again")
    draw(results, picture)


if __name__ == "__main__":
    tyro.cli(main)

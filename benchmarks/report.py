"""Tables, JSON and pictures of the benchmarks, and the checks of options that several of them have."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from benchmarks.runner import CaseResult
from benchmarks.side import CODES_PER_SECOND
from omni_jax.config import OmniConfig

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PICTURE_SUFFIXES = (".png", ".svg", ".pdf")


def write_json(json_out: Path | None, results: Any) -> None:
    """Writes the figures, where a file is asked for."""
    if json_out is not None:
        json_out.parent.mkdir(parents=True, exist_ok=True)
        json_out.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


def case_records(results: Sequence[CaseResult]) -> list[dict[str, Any]]:
    """As they are written."""
    return [asdict(result) for result in results]


def print_cases(results: Sequence[CaseResult]) -> None:
    """A row for each case, with both sides beside each other."""
    table = Table("", "omni_jax", "PyTorch", "PyTorch / omni_jax", "rate", "memory, GB")
    for result in results:
        # some cases are ours alone, for PyTorch would take too long
        sides = [result.ours] if result.pytorch is None else [result.ours, result.pytorch]
        theirs = "" if result.pytorch is None else format_seconds(result.pytorch.seconds)
        ratio = "" if result.ratio is None else f"{result.ratio:.2f}"
        rates = f"{_pair([side.rate for side in sides])} {result.unit}"
        memory = _pair([side.gigabytes for side in sides])
        table.add_row(result.case, format_seconds(result.ours.seconds), theirs, ratio, rates, memory)
    print_tables(table)


def _pair(values: Sequence[float | None]) -> str:
    return " : ".join(f"{value:.1f}" for value in values if value)


def print_tables(*parts: Table | str) -> None:
    """Prints as wide as it needs, also where the output is no terminal."""
    # a file or a pipe would otherwise get 80 columns, and broken rows
    console = Console(width=170)
    for part in parts:
        console.print(part)


def add_seconds(table: Table, name: str, values: Iterable[float | None]) -> None:
    """Adds a row of times."""
    table.add_row(name, *map(format_seconds, values))


def format_seconds(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    return f"{1000 * seconds:.1f} ms" if seconds < 1 else f"{seconds:.2f} s"


def save_figure(figure: Figure, picture: Path) -> None:
    """Writes a drawing; its folder is made."""
    from matplotlib import pyplot  # an extra, which only pictures need

    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, dpi=120)
    pyplot.close(figure)


def check_picture(picture: Path | None) -> None:
    """Exits, saying why, if no picture could be drawn there."""
    if picture is None:
        return
    if picture.suffix not in PICTURE_SUFFIXES:
        sys.exit(f"--picture {picture}: its name must end in {', '.join(PICTURE_SUFFIXES)}")
    if importlib.util.find_spec("matplotlib") is None:
        sys.exit("--picture needs matplotlib: pip install -e '.[plots]'")


def check_at_least_one(**options: int | Sequence[int]) -> None:
    """Exits, naming the option, the value and the limit, if one is empty or holds a number under 1."""
    for name, value in options.items():
        numbers = [value] if isinstance(value, int) else value
        if not numbers or min(numbers) < 1:
            sys.exit(f"{_option(name)} {_shown(numbers)}: it must be at least 1")


def check_seconds(seconds: Sequence[int], reference_seconds: Sequence[int] = ()) -> None:
    """Exits, saying why, if replies of these lengths cannot be made and compared."""
    # the published DiT takes so many mel frames at most
    dit = OmniConfig.qwen2_5_omni_7b().token2wav_config.dit_config
    longest = dit.max_position_embeddings // dit.repeats // CODES_PER_SECOND
    in_range = all(1 <= length <= longest for length in seconds)
    # the first and the last are compared, and tables have a column for each
    if not seconds or not in_range or list(seconds) != sorted(set(seconds)):
        sys.exit(f"--seconds {_shown(seconds)}: give different lengths of 1 to {longest}, shortest first")
    if set(reference_seconds) - set(seconds):
        sys.exit(f"--reference-seconds {_shown(reference_seconds)}: each must be one of --seconds {_shown(seconds)}")


def check_sound(sound: Path) -> None:
    """Exits if there is no such file."""
    if not sound.is_file():
        sys.exit(f"--sound {sound}: there is no such file")


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _shown(numbers: Sequence[int]) -> str:
    return " ".join(map(str, numbers))

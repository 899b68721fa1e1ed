"""The report on omni-tiny: tables and pictures of what its runs have left behind, written into a page.

    python tools/report_tiny.py out/omni-tiny --page docs/omni-tiny.md

Reads from OUT, where it is there:

* ``stages.json`` and the runs' ``eval.jsonl``, of ``tools/train_tiny.py``;
* ``answers.jsonl`` and ``answers_in_text.jsonl``, of ``tools/score_world.py``;
* ``ablation.json``, of ``tools/ablate_tmrope.py``;
* ``robustness.json``, of ``tools/robustness.py``;
* ``latency.json``, of ``tools/measure_latency.py``;
* ``speech.json``, which is the ``report.json`` of ``tools/measure_speech.py`` of texts that are read aloud, and
  ``speech_replies.json``, of spoken answers to questions.

A section is written for each of these, between two markers of the page. What is not there leaves its section as it is,
and the page keeps all outside the markers; pictures lie beside it.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it also runs as a file

from omni_jax.checks import printable
from omni_jax.errors import InputError
from omni_jax.evaluation.word_errors import count_word_errors
from omni_jax.plain_files import replace_file
from tools import train_tiny
from tools.ablate_tmrope import FRAME_RATE_FACTORS, MEASURES, TIMING_TASKS, VARIANTS, summarise
from tools.row_files import read_values
from tools.score_world import Answered, Score, score
from tools.world.vocabulary import COLOURS, EFFECTS, NUMBERS, PLACES, SHAPES, SIGNS

# an optional dependency; without it there is nothing to do here
try:
    from matplotlib import pyplot
except ImportError:
    sys.exit("pictures need matplotlib: pip install -e '.[plots]'")

# in this order
SECTIONS = ("Stages", "Answers", "Speech", "Spoken replies", "Ablation of TMRoPE", "Damaged input", "Latency")
MARKERS = ("<!-- report -->", "<!-- end of report -->")
# of answers, each with the tasks whose answers have one of its words
_KINDS: dict[str, tuple[Sequence[str], tuple[str, ...]]] = {
    "colours": (tuple(COLOURS), ("colour", "colour-at-sound")),
    "shapes": (SHAPES, ("shape", "order")),
    "numbers": (NUMBERS, ("count",)),
    "places": (tuple(PLACES), ("place", "dialogue")),
    "effects": (EFFECTS, ("effect",)),
    "words": (SIGNS, ("sign", "word-at-shape")),
}
_TRANSCRIPTIONS = ("transcribe", "phrase", "hear", "words")
# that names of tasks end with: their media told in words, or the question spoken
_IN_WORDS = "-text"
_VOICE = "-voice"
_NO_WORD = "none of them"


@dataclass(frozen=True)
class Options:
    """What is reported."""

    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]
    """Folder of the training."""
    page: Path
    """The page, which has the two markers."""


def make_table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown; all columns but the first are of numbers."""
    lines = [f"| {' | '.join(heads)} |", f"|---|{'---:|' * (len(heads) - 1)}"]
    lines += [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join(lines) + "\n"


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def _with_interval(found: Score) -> tuple[str, str]:
    low, high = found.interval
    return _percent(found.right / found.asked), f"{100 * low:.1f} to {100 * high:.1f}"


def tell_stages(out: Path) -> str:
    """The table of stages that are complete: their time, their device and their held-out loss."""
    log = json.loads((out / train_tiny.STAGES_FILE).read_text(encoding="utf-8"))
    rows = []
    for stage in train_tiny.Training(train_tiny.Options(out)).stages:
        if stage.name in log["complete"]:
            best = out / stage.folder / "best.json" if stage.folder else None
            loss = "" if best is None or not best.exists() else f"{json.loads(best.read_text())['loss']:.4f}"
            rows.append((stage.name, f"{log['seconds'][stage.name] / 60:.1f}", log["devices"][stage.name], loss))
    return make_table(("stage", "minutes", "device", "held-out loss"), rows)


def draw_curves(out: Path, picture: Path) -> bool:
    """Draws the held-out losses of all stages, each against its own steps; False if there are none."""
    curves = {}
    for stage in train_tiny.Training(train_tiny.Options(out)).stages:
        path = out / stage.folder / "eval.jsonl" if stage.folder else None
        if path is not None and path.exists():
            values = [v for v in read_values(path) if "loss" in v]
            curves[stage.name] = ([v["step"] for v in values], [v["loss"] for v in values])
    if not curves:
        return False
    columns = min(len(curves), 4)
    rows = -(-len(curves) // columns)
    figure, axes = pyplot.subplots(
        rows, columns, figsize=(3.2 * columns, 2.6 * rows), layout="constrained", squeeze=False
    )
    for axis in axes.flat[len(curves) :]:
        axis.set_visible(False)
    for axis, (name, (steps, losses)) in zip(axes.flat, curves.items(), strict=False):
        axis.plot(steps, losses, marker=".")
        axis.set(title=name, xlabel="step", ylabel="held-out loss")
        axis.set_ylim(min(0.0, *losses), 1.05 * max(0.0, *losses))
    _save(figure, picture)
    return True


def _save(figure: Any, picture: Path) -> None:
    # without the date and the version, so that the same figures give the same file
    figure.savefig(picture, dpi=90, metadata={"Software": None})
    pyplot.close(figure)


def tell_answers(answered: Sequence[Answered]) -> str:
    """The table of tasks, each with its media told in words, shown, and asked about by voice."""
    scores = score(answered)
    rows = []
    for task in sorted({name.removesuffix(_IN_WORDS).removesuffix(_VOICE) for name in scores}):
        cells = [task]
        for name in (task + _IN_WORDS, task, task + _VOICE):
            if name in scores:
                right, interval = _with_interval(scores[name])
                cells.append(f"{right} ({interval}) of {scores[name].asked}")
            else:
                cells.append("")
        rows.append(cells)
    told = make_table(("task", "media told in words", "media shown", "and asked by voice"), rows)
    for task in _TRANSCRIPTIONS:
        of_task = [a for a in answered if a.task == task]
        if of_task:
            errors = count_word_errors([a.expected for a in of_task], [a.answer for a in of_task])
            low, high = errors.interval
            told += (
                f"\nWord errors of {len(of_task)} items of {task}: "
                f"{_percent(errors.rate)} ({100 * low:.1f} to {100 * high:.1f}).\n"
            )
    return told


def count_confusions(answered: Sequence[Answered], words: Sequence[str], tasks: Sequence[str]) -> np.ndarray:
    """How often each word was answered where another was expected.

    Args:
      answered: all answers.
      words: W of a kind.
      tasks: whose answers have a word of the kind, whether asked in text or by voice.

    Returns:
      [W, W + 1], int: by the expected word and the answered one; the last column is of answers without one.
    """
    counts = np.zeros((len(words), len(words) + 1), int)
    for a in answered:
        if a.task.removesuffix(_VOICE) in tasks:
            expected = _find_word(a.expected, words)
            if expected is not None:
                found = _find_word(a.answer, words)
                counts[expected, len(words) if found is None else found] += 1
    return counts


def _find_word(text: str, words: Sequence[str]) -> int | None:
    """The place of the word of the kind that is the last in a text, or None."""
    for word in reversed(re.findall("[a-z]+", text.lower())):
        for form in (word, word.removesuffix("s")):
            if form in words:
                return words.index(form)
    return None


def draw_confusions(answered: Sequence[Answered], picture: Path) -> bool:
    """Draws what was answered in place of what; False if no answer has such a word."""
    counts = {kind: count_confusions(answered, words, tasks) for kind, (words, tasks) in _KINDS.items()}
    counts = {kind: found for kind, found in counts.items() if found.any()}
    if not counts:
        return False
    rows = -(-len(counts) // 2)
    figure, axes = pyplot.subplots(rows, 2, figsize=(11, 4.6 * rows), layout="constrained", squeeze=False)
    for axis in axes.flat[len(counts) :]:
        axis.set_visible(False)
    for axis, (kind, found) in zip(axes.flat, counts.items(), strict=False):
        words = list(_KINDS[kind][0])
        axis.imshow(found / np.maximum(found.sum(1, keepdims=True), 1), cmap="Blues", vmin=0, vmax=1)
        axis.set_xticks(range(len(words) + 1), [*words, _NO_WORD], rotation=60, ha="right")
        axis.set_yticks(range(len(words)), words)
        axis.set(title=f"{kind}, {found.sum()} answers", xlabel="answered", ylabel="expected")
        for (row, column), count in np.ndenumerate(found):
            if count:
                dark = count > 0.5 * found[row].sum()
                axis.text(column, row, count, ha="center", va="center", fontsize=7, color="white" if dark else "black")
    _save(figure, picture)
    return True


def tell_ablation(found: dict[str, dict[str, dict[str, float]]]) -> str:
    """The tables of variants of TMRoPE: means over seeds with their intervals."""
    names = {name: variant.about for name, variant in VARIANTS.items()}
    names |= {name: f"(f) {factor} of the frame rate, where it answers" for name, factor in FRAME_RATE_FACTORS.items()}
    parts = []
    for title, (of, by) in MEASURES.items():
        rows = []
        for name, about in names.items():
            cells = [summarise(found, name, task, of, by) for task in TIMING_TASKS]
            if any(cells):
                rows.append((about, *cells))
        parts.append(f"{title[0].upper()}{title[1:]}:\n\n{make_table(('variant', *TIMING_TASKS), rows)}")
    return "\n".join(parts)


def tell_robustness(found: dict[str, dict[str, dict[str, int]]]) -> str:
    """The table of packets that came late, twice or never: what is answered rightly, and what the session does."""
    rows = []
    for damage, counts in found.items():
        cells = [damage]
        for values in counts.values():
            right, interval = _with_interval(Score(values["right"], values["asked"]))
            cells.append(f"{right} ({interval})")
        for event in ("refused", "failed"):
            cells.append(str(sum(values[event] for values in counts.values())))
        rows.append(cells)
    tasks = next(iter(found.values()))
    asked = sum(values["asked"] for values in tasks.values())
    heads = ("packets", *tasks, "pictures refused", f"of {asked} sessions ended in an error")
    return make_table(heads, rows)


def tell_speech(found: dict[str, Any]) -> str:
    """The table of judges' figures of recordings, copies and spoken answers."""
    rows = []
    for kind in ("source", "copy", "spoken", "cloned"):
        if kind in found:
            report = found[kind]
            cells = [kind, str(report["sentences"])]
            for judge in ("pocketsphinx_closed", "whisper"):
                low, high = report[judge]["interval"]
                cells.append(f"{_percent(report[judge]['word_errors'])} ({100 * low:.1f} to {100 * high:.1f})")
            cells.append(_percent(report["own_voice"]) if "own_voice" in report else "")
            cells.append("" if report["dnsmos"] is None else f"{report['dnsmos']:.2f}")
            for errors in report["word_times"].values():
                cells.append("" if errors is None else f"{1000 * errors['median']:.0f} ms of {errors['words']}")
            rows.append(cells)
    heads = ("sounds", "sentences", "word errors, pocketsphinx", "word errors, Whisper base", "own voice", "DNSMOS")
    heads += ("word times, all", "word times, rightly spoken")
    judges = "; ".join(found["judges"])
    return f"{make_table(heads, rows)}\nJudges: {judges}.\n"


def tell_latency(found: dict[str, Any]) -> str:
    """The table of when what came, and of what each stage took: medians by task, and 95th percentiles."""
    names = list(next(iter(found["tasks"].values())))
    rows = []
    for name in names:
        times = (figures.get(name) for figures in found["tasks"].values())
        rows.append((name, *("" if time is None else f"{time['median']:.2f} ({time['p95']:.2f})" for time in times)))
    about = (
        f"Seconds, medians of {found['items']} replies (95th percentile), one request at a time; {found['device']}.\n"
    )
    return f"{make_table(('stage', *found['tasks']), rows)}\n{about}"


def make_sections(out: Path, page: Path) -> dict[str, str]:
    """The sections that there are files for, in Markdown, by name; their pictures are written beside the page.

    Raises:
      InputError: if nothing is there to report.
    """
    found: dict[str, str] = {}
    names = {kind: page.with_name(f"{page.stem.replace('-', '_')}_{kind}.png") for kind in ("curves", "confusions")}
    if (out / train_tiny.STAGES_FILE).exists():
        found["Stages"] = tell_stages(out)
        if draw_curves(out, names["curves"]):
            found["Stages"] += f"\n![held-out losses of the stages]({names['curves'].name})\n"
    answers = [path for name in (train_tiny.ANSWERS, train_tiny.ANSWERS_IN_TEXT) if (path := out / name).exists()]
    if answers:
        answered = [Answered(**values) for path in answers for values in read_values(path)]
        found["Answers"] = f"To {len(answered)} held-out items:\n\n{tell_answers(answered)}"
        if draw_confusions(answered, names["confusions"]):
            found["Answers"] += f"\n![what was answered in place of what]({names['confusions'].name})\n"
    for file, title, tell in (
        ("speech.json", "Speech", tell_speech),
        ("speech_replies.json", "Spoken replies", tell_speech),
        ("ablation.json", "Ablation of TMRoPE", tell_ablation),
        ("robustness.json", "Damaged input", tell_robustness),
        ("latency.json", "Latency", tell_latency),
    ):
        if (out / file).exists():
            found[title] = tell(json.loads((out / file).read_text(encoding="utf-8")))
    if not found:
        raise InputError(f"{out}: there is nothing to report; see python tools/report_tiny.py --help")
    return found


def insert(page: str, sections: Mapping[str, str]) -> str:
    """A page with sections between its markers, in place of those of the same names; others stay as they are.

    Raises:
      InputError: if it has not both markers, once and in their order, or a section of another name between them.
    """
    before, first, rest = page.partition(MARKERS[0])
    old, second, after = rest.partition(MARKERS[1])
    if not first or not second or MARKERS[0] in rest or MARKERS[1] in after:
        raise InputError(f"the page must have the lines {MARKERS[0]} and {MARKERS[1]}, once and in this order")
    kept = dict(part.split("\n", 1) for part in re.split("^## ", old, flags=re.MULTILINE)[1:])
    unknown = sorted(kept.keys() - set(SECTIONS))
    if unknown:
        raise InputError(f"between the page's markers is a section that is not of the report: {unknown[0]!r}; move it")
    told = {name: text.strip() for name, text in {**kept, **sections}.items()}
    report = "\n\n".join(f"## {name}\n\n{told[name]}" for name in sorted(told, key=SECTIONS.index))
    return f"{before}{first}\n\n{report}\n\n{second}{after}"


def main() -> None:
    options = tyro.cli(Options, description=__doc__)
    try:
        page = options.page.read_text(encoding="utf-8")
        insert(page, {})  # before pictures are drawn
        replace_file(options.page, insert(page, make_sections(options.out, options.page)).encode())
    except (InputError, OSError) as e:
        raise SystemExit(f"error: {printable(str(e))}") from None


if __name__ == "__main__":
    main()

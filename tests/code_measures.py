"""Measures of how code reads, by its syntax alone: ``python -m tests.code_measures [FOLDER ...]``.

A line counts if it is not blank. The comment share is that of lines which hold nothing but a comment; the lines that
have a comment behind code are given apart. Docstrings are code here.
"""

from __future__ import annotations

import argparse
import ast
import io
import math
import statistics
import tokenize
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[1]
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)


@dataclass
class Measures:
    """Counts over some files.

    Attributes:
      lines: that are not blank.
      comment_lines: that hold nothing but a comment.
      trailing_comments: lines of code with a comment behind it.
      comprehensions: of lists, sets and dictionaries, and generator expressions.
      packed_assignments: ``a, b = x, y``; what unpacks one value (``a, b = f()``) is none.
      function_lengths: lines from ``def`` to the last one, of functions within functions too.
      names: of functions, without the dunder methods.
    """

    lines: int = 0
    comment_lines: int = 0
    trailing_comments: int = 0
    comprehensions: int = 0
    packed_assignments: int = 0
    function_lengths: list[int] = field(default_factory=list)
    names: list[str] = field(default_factory=list)

    def add_source(self, text: str) -> None:
        """Counts one file in."""
        self.lines += sum(bool(line.strip()) for line in text.splitlines())
        self._add_comments(text)
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, COMPREHENSIONS):
                self.comprehensions += 1
            elif isinstance(node, ast.Assign) and is_packed(node):
                self.packed_assignments += 1
            elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                self._add_function(node)

    def _add_comments(self, text: str) -> None:
        for token in tokenize.generate_tokens(io.StringIO(text).readline):
            if token.type != tokenize.COMMENT:
                continue
            if token.line[: token.start[1]].strip():
                self.trailing_comments += 1
            else:
                self.comment_lines += 1

    def _add_function(self, node: ast.FunctionDef | ast.AsyncFunctionDef) -> None:
        assert node.end_lineno is not None
        self.function_lengths.append(node.end_lineno - node.lineno + 1)
        is_dunder = node.name.startswith("__") and node.name.endswith("__")
        if not is_dunder:
            self.names.append(node.name)

    def per_thousand(self, count: int) -> float:
        """A count for 1,000 lines."""
        return 1000 * count / max(self.lines, 1)

    def report(self) -> str:
        """All measures, one a line."""
        one_word = sum("_" not in name.strip("_") for name in self.names)
        comments = self.comment_lines + self.trailing_comments
        rows = [
            ("lines", f"{self.lines:,}"),
            ("functions", f"{len(self.function_lengths):,}"),
            ("median length of a function", f"{statistics.median(self.function_lengths or [0]):.0f}"),
            ("90th percentile", f"{percentile(self.function_lengths, 0.9)}"),
            ("comprehensions per 1,000 lines", f"{self.per_thousand(self.comprehensions):.1f}"),
            ("packed assignments per 1,000 lines", f"{self.per_thousand(self.packed_assignments):.1f}"),
            ("comment lines", f"{100 * self.comment_lines / max(self.lines, 1):.1f} %"),
            ("lines with a comment", f"{100 * comments / max(self.lines, 1):.1f} %"),
            ("one-word function names", f"{100 * one_word / max(len(self.names), 1):.0f} %"),
        ]
        return "\n".join(f"{name:<36}{value:>8}" for name, value in rows)


def is_packed(node: ast.Assign) -> bool:
    """Whether a statement makes two assignments of two values that it writes out."""
    return isinstance(node.value, ast.Tuple) and any(isinstance(target, ast.Tuple) for target in node.targets)


def percentile(values: Sequence[int], share: float) -> int:
    """The least of the values that ``share`` of all do not exceed."""
    if not values:
        return 0
    return sorted(values)[math.ceil(share * len(values)) - 1]


def measure(folders: Sequence[Path]) -> Measures:
    """The measures of every Python file under some folders."""
    measures = Measures()
    for folder in folders:
        for path in sorted(folder.rglob("*.py")):
            measures.add_source(path.read_text(encoding="utf-8"))
    return measures


def main() -> None:
    parser = argparse.ArgumentParser(description="Measures of how code reads, by its syntax alone.")
    parser.add_argument("folders", nargs="*", type=Path, default=[ROOT / "omni_jax"], metavar="FOLDER")
    folders = parser.parse_args().folders
    for folder in folders:
        if not folder.is_dir():
            parser.error(f"{folder} is no folder")
    print(measure(folders).report())


if __name__ == "__main__":
    main()

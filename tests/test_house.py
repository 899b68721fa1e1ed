"""The rules of the house that a machine can check: see docs/architecture.md."""

from __future__ import annotations

import ast
import functools
import graphlib
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import pytest

from tests.code_measures import Measures

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "omni_jax"

# from the top floor down; a module may import what stands on its own floor or below
FLOORS: Sequence[str] = """serving evaluation training generation engine data models checkpoint processing layers
    mrope segments batch distributed compile_cache sharding mini_config speaker_verifier_config
    speech_tokenizer_config config config_file plain_files checks errors""".split()
MAX_MODULE_LINES = 500
MAX_FUNCTION_LINES = 70
MAX_SCHEDULER_LINES = 200

# words that stood for things which have a name of their own in the field (docs/architecture.md); no identifier has
# one, alone or as a part
BANNED_PARTS = {
    *("heard", "said", "seat", "seats", "script", "scripts", "marks", "shares"),
    *("barred", "begun", "meet", "leads", "lowest"),
}
# of classes and of constants, so in this case alone
BANNED_CASED_PARTS = {"Ask", "Talk", "Voicing", "Stretch", "Feed", "NOBODY", "NOTHING"}

MODULES = sorted(PACKAGE.rglob("*.py"))
TOOLS = sorted([*ROOT.glob("*.py"), *(ROOT / "tools").rglob("*.py"), *(ROOT / "benchmarks").rglob("*.py")])
CONFIGS = sorted((ROOT / "configs").rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


@functools.cache
def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def count_lines(path: Path) -> int:
    return path.read_text(encoding="utf-8").count("\n")


def assert_none(violations: Iterable[str]) -> None:
    found = sorted(set(violations))
    if found:
        pytest.fail("\n".join([f"{len(found)} places:", *found]), pytrace=False)


def find_imports(path: Path) -> Iterator[str]:
    """The full name of everything that a file imports, wherever in it."""
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import; write it out"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_imports_go_down() -> None:
    violations = []
    for path in MODULES:
        here = path.relative_to(PACKAGE).with_suffix("").parts[0]
        if here == "__init__":  # the public face stands above all
            continue
        allowed = FLOORS[FLOORS.index(here) :]
        for name in find_imports(path):
            root, *rest = name.split(".")
            is_above = root == "omni_jax" and (not rest or rest[0] not in allowed)
            is_outside = root in ("tools", "tests", "benchmarks", "configs", "serve", "train")
            if is_above or is_outside:
                violations.append(f"{name_of(path)} imports {name}, which stands above {here}")
    assert_none(violations)


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def test_no_circle_of_imports() -> None:
    """Floors leave circles within a floor possible; there are none. Imports inside functions count."""
    known = {module_name(path) for path in [*MODULES, *TOOLS, *CONFIGS]}
    graph: dict[str, set[str]] = {}
    for path in [*MODULES, *TOOLS, *CONFIGS]:
        here = module_name(path)
        imported = graph.setdefault(here, set())
        for name in find_imports(path):
            # ``from a.b import c``: the module is a.b.c if there is one, else a.b
            module = name if name in known else name.rpartition(".")[0]
            if module in known and module != here:
                imported.add(module)
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        pytest.fail(f"a circle of imports: {' -> '.join(error.args[1])}")


def test_neither_pytorch_nor_nnx() -> None:
    violations = []
    for path in MODULES:
        for name in find_imports(path):
            is_torch = name.split(".")[0] in ("torch", "transformers", "torchvision")
            if is_torch or name.startswith("flax.nnx"):
                violations.append(f"{name_of(path)} imports {name}")
    assert_none(violations)


def test_modules_have_one_subject() -> None:
    violations = []
    for path in [*MODULES, *TOOLS, *CONFIGS, *TESTS]:
        if count_lines(path) > MAX_MODULE_LINES:
            violations.append(f"{name_of(path)} has {count_lines(path)} lines; {MAX_MODULE_LINES} at most")
    assert_none(violations)


def test_functions_fit_on_a_screen() -> None:
    violations = []
    for path in [*MODULES, *TOOLS, *CONFIGS]:
        for node in ast.walk(parse(path)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                assert node.end_lineno is not None
                length = node.end_lineno - node.lineno + 1
                if length > MAX_FUNCTION_LINES:
                    violations.append(f"{name_of(path)}: {node.name} has {length} lines; {MAX_FUNCTION_LINES} at most")
    assert_none(violations)


def test_scheduler_only_admits_and_orders() -> None:
    """The stages own the arrays; the scheduler holds none."""
    path = PACKAGE / "engine" / "scheduler.py"
    assert count_lines(path) <= MAX_SCHEDULER_LINES
    for name in find_imports(path):
        assert name.split(".")[0] not in ("jax", "numpy", "jaxtyping", "flax"), f"the scheduler imports {name}"


def find_jits(tree: ast.AST) -> Iterator[int]:
    """The lines that name ``jit`` or ``pjit``."""
    for node in ast.walk(tree):
        name = getattr(node, "attr", getattr(node, "id", None))
        if isinstance(node, ast.Attribute | ast.Name) and name in ("jit", "pjit"):
            yield node.lineno


def test_no_constructor_jits() -> None:
    """Jitted functions stand at module level, so that a second model of equal shape compiles none of them again."""
    violations = []
    for path in [*MODULES, *TOOLS]:
        for node in ast.walk(parse(path)):
            if isinstance(node, ast.FunctionDef) and node.name in ("__init__", "__post_init__", "setup"):
                violations.extend(f"{name_of(path)}:{line} jits in {node.name}" for line in find_jits(node))
    assert_none(violations)


def find_identifiers(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Every name that a file gives or uses, with its line: of variables, attributes, arguments, functions, modules."""
    for node in ast.walk(tree):
        if isinstance(node, ast.keyword) and node.arg == "marks":
            continue  # the word of pytest.param; its value is walked on its own
        line = getattr(node, "lineno", 0)
        for field in ("id", "attr", "name", "arg", "asname", "module", "rest"):
            value = getattr(node, field, None)
            if isinstance(value, str):
                yield value, line
        if isinstance(node, ast.Global | ast.Nonlocal):
            yield from ((name, line) for name in node.names)


def split_identifier(name: str) -> list[str]:
    """``firstSeat``, ``first_seat`` and ``FIRST_SEAT`` have two parts each; a part keeps its case."""
    return re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", name)


def is_banned(part: str) -> bool:
    return part.lower() in BANNED_PARTS or part in BANNED_CASED_PARTS


def test_identifiers_are_split_at_underscores_and_capitals() -> None:
    assert split_identifier("omni_jax.TextState._SEAT2row") == ["omni", "jax", "Text", "State", "SEAT", "row"]
    banned = ("num_seats", "TalkParams", "NOTHING", "_said", "firstScript", "leads", "SpeechAsk", "FeedState")
    allowed = ("Talker", "TalkerParams", "description", "transcript", "ask", "Task", "feedback", "leading", "shared")
    for name in banned:
        assert any(is_banned(part) for part in split_identifier(name)), name
    for name in allowed:
        assert not any(is_banned(part) for part in split_identifier(name)), name


def test_no_private_words() -> None:
    violations = []
    for path in [*MODULES, *TOOLS, *TESTS]:
        for name, line in [(module_name(path), 1), *find_identifiers(parse(path))]:
            if any(is_banned(part) for part in split_identifier(name)):
                violations.append(f"{name_of(path)}:{line}: {name}")
    assert_none(violations)


def find_private_attributes(tree: ast.AST) -> Iterator[ast.Attribute]:
    """Attributes with a leading underscore of anything but ``self`` and ``cls``."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Attribute) or not node.attr.startswith("_") or node.attr.startswith("__"):
            continue
        if not (isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")):
            yield node


def test_tools_use_no_private_attribute() -> None:
    """What tools and benchmarks need of the package, the package offers."""
    violations = []
    for path in TOOLS:
        for node in find_private_attributes(parse(path)):
            if node.attr != "_from_config":  # of PyTorch's side: there is no other way to a model without weights
                violations.append(f"{name_of(path)}:{node.lineno} takes {ast.unparse(node)}")
    assert_none(violations)


MEASURED = """
# a comment
class A:
    def __init__(self):  # behind code
        self.a, self.b = 1, 2

    def read(self):
        a, b = self.both()
        return [x for x in a if any(y for y in b)]

    def both_values(self):
        def inner():
            return "# no comment"
        return inner, inner
"""


def test_measures_count_what_they_say() -> None:
    measures = Measures()
    measures.add_source(MEASURED)
    assert measures.lines == 11
    assert (measures.comment_lines, measures.trailing_comments) == (1, 1)
    assert (measures.comprehensions, measures.packed_assignments) == (2, 1)
    assert sorted(measures.function_lengths) == [2, 2, 3, 4]
    assert measures.names == ["read", "both_values", "inner"]
    assert "one-word function names" in measures.report()

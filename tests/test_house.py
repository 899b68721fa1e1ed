"""The rules of the house that a machine can check: see docs/architecture.md."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "omni_jax"

# from the roof down; a module may import what stands on its own floor or below
FLOORS = """serving evaluation training generation engine data models checkpoint processing layers
    mrope batch distributed sharding config checks errors""".split()
LONGEST_MODULE = 500
LONGEST_FUNCTION = 70

MODULES = sorted(PACKAGE.rglob("*.py"))
SOURCES = sorted([*MODULES, *ROOT.glob("*.py"), *(ROOT / "tools").rglob("*.py"), *(ROOT / "benchmarks").rglob("*.py")])


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def imports(path: Path) -> Iterator[str]:
    """The full name of everything that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import; write it out"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_imports_go_down(path: Path) -> None:
    here = path.relative_to(PACKAGE).with_suffix("").parts[0]
    if here == "__init__":  # the public face stands above all
        return
    below = FLOORS[FLOORS.index(here) :]
    for name in imports(path):
        root, *rest = name.split(".")
        if root == "omni_jax":
            assert rest and rest[0] in below, f"{name} stands above {here}"
        assert root not in ("tools", "tests", "benchmarks", "configs", "serve", "train"), f"the package imports {name}"


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_neither_pytorch_nor_nnx(path: Path) -> None:
    for name in imports(path):
        assert name.split(".")[0] not in ("torch", "transformers", "torchvision")
        assert not name.startswith("flax.nnx")


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_a_module_has_one_subject_and_a_function_fits_a_screen(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert text.count("\n") <= LONGEST_MODULE
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            assert node.end_lineno - node.lineno < LONGEST_FUNCTION, f"{node.name} is too long"

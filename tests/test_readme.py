"""What README and docs/ tell a reader to do can be done, and what they list is all there is."""

from __future__ import annotations

import ast
import re
import shlex
import shutil
from pathlib import Path

import pytest
import tyro

from configs import RECIPES
from omni_jax.config import OmniConfig
from omni_jax.generation.options import Options
from omni_jax.processing import chat
from omni_jax.serving import command_line

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
USAGE = ROOT / "docs" / "usage.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
OTHER_PROGRAMS = ("gcloud", "gcluster", "kubectl")  # that a page may name; only their names are checked


def read_blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def read_commands(page: Path) -> list[str]:
    commands = []
    for block in read_blocks(page, "sh"):
        for line in block.replace("\\\n", " ").splitlines():
            command = line.split(" # ")[0].strip()
            if command:
                commands.append(command)
    return commands


COMMANDS = [
    pytest.param(command, id=f"{page.name}: {command[:60]}") for page in PAGES for command in read_commands(page)
]


@pytest.mark.parametrize("command", COMMANDS)
def test_command_exists(command: str) -> None:
    program, *arguments = shlex.split(command)
    if program == "make":
        assert re.search(rf"^{arguments[0]}:", MAKEFILE, re.MULTILINE), f"the Makefile has no target {arguments[0]}"
        return
    if program == "pip":
        assert arguments[:2] == ["install", "-e"]
        return
    if program != "python":
        # options alone, which a page explains, or a program of somebody else's
        assert program.startswith("--") or program in OTHER_PROGRAMS, f"{program} is not known here"
        return
    if arguments[0] == "-m":
        module = ROOT / arguments[1].replace(".", "/")
        assert module.with_suffix(".py").is_file() or (module / "__main__.py").is_file()
        return
    file, *rest = arguments
    assert (ROOT / file).is_file()
    if file == "serve.py":
        tyro.extras.subcommand_cli_from_dict(command_line.COMMANDS, args=rest)
    elif file == "train.py":
        assert rest[0] in RECIPES
    elif file == "tools/convert.py":
        assert f'"{rest[0]}"' in (ROOT / file).read_text(encoding="utf-8")


@pytest.mark.parametrize("page", [README, USAGE], ids=lambda page: page.name)
def test_python_example_runs(page: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "7b").symlink_to(tiny_model)
    shutil.copy(ROOT / "tests" / "media" / "video.mp4", tmp_path / "clip.mp4")
    monkeypatch.chdir(tmp_path)
    example, *others = read_blocks(page, "python")
    # of a network that no checkpoint has; tests/generation/test_cloned_voice.py runs what they say
    for other in others:
        compile(other, str(page), "exec")
    names: dict = {}
    exec(example, names)
    assert names["reply"].token_ids
    if page == USAGE:
        assert names["replies"][0].token_ids == names["reply"].token_ids
        assert len(names["replies"]) == 2
        assert len(names["wav"]) == 480 * len(names["spoken"].codec_ids)


def test_usage_lists_every_option() -> None:
    usage = USAGE.read_text(encoding="utf-8")
    for name in Options.names():
        assert f"`{name}`" in usage, name


def test_usage_lists_every_part_of_a_message() -> None:
    usage = USAGE.read_text(encoding="utf-8")
    for role in chat.ROLES:
        assert f'"{role}"' in usage, role
    for kind, options in chat._OPTIONS.items():
        for name in options:
            assert f"`{name}`" in usage, name
        assert f'"type": "{kind}"' in usage
    for kind in chat._READERS:
        assert f'"type": "{kind}"' in usage


def test_usage_states_the_context() -> None:
    context = OmniConfig.qwen2_5_omni_7b().thinker_config.text_config.max_position_embeddings
    assert f"{context:,} tokens" in USAGE.read_text(encoding="utf-8")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if not re.match(r"[a-z]+:", target):
            path, _, heading = target.partition("#")
            assert (page.parent / path).exists(), f"{page.name} links to {target}"
            assert not heading, f"{page.name}: link to pages, not to headings, which change: {target}"


def find_citations() -> list[tuple[str, str]]:
    """Every (page, section) that code or documentation cites, as in "docs/reference.md, 7.2 and 8.1"."""
    section = r"\d+(?:\.\d+)?"
    pattern = re.compile(rf"docs/([a-z-]+\.md)((?:(?:,| and| to)\s+{section})*)")
    found = set()
    for path in [*PAGES, *ROOT.glob("*.py"), *(ROOT / "configs").glob("*.py")]:
        found.update(pattern.findall(path.read_text(encoding="utf-8")))
    for folder in ("omni_jax", "tests", "benchmarks", "tools"):
        for path in (ROOT / folder).rglob("*.py"):
            found.update(pattern.findall(path.read_text(encoding="utf-8")))
    citations = []
    for name, sections in sorted(found):
        citations.append((name, ""))
        citations.extend((name, number) for number in re.findall(section, sections))
    return sorted(set(citations))


@pytest.mark.parametrize(("name", "section"), find_citations())
def test_cited_sections_exist(name: str, section: str) -> None:
    page = ROOT / "docs" / name
    assert page.is_file(), f"docs/{name} is cited and is not there"
    if section:
        heading = rf"^#+ {re.escape(section)}[. ]"
        assert re.search(heading, page.read_text(encoding="utf-8"), re.MULTILINE), f"docs/{name} has no {section}"


def find_defined_names() -> set[str]:
    """Everything that the package defines: functions, classes, modules."""
    names = set()
    for path in (ROOT / "omni_jax").rglob("*.py"):
        names.add(path.stem)
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                names.add(node.name)
    return names


def test_walks_name_what_there_is() -> None:
    """The walks in docs/architecture.md name functions, classes and methods (``Class.method``) of the package."""
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    walks = page.partition("## Three walks")[2].partition("\n## ")[0]
    cited = set(re.findall(r"`([A-Za-z_]+(?:\.[a-z_]+)?)(?:\([^`]*\))?`", walks))
    assert len(cited) > 40
    defined = find_defined_names()
    others = {"rows.jsonl", "talker_inputs"}  # a file and a field
    unknown = sorted(name for name in cited - others if not set(name.split(".")) <= defined)
    assert not unknown, f"docs/architecture.md names what is not there: {', '.join(unknown)}"

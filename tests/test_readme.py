"""What the README tells a reader to do can be done."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path

import pytest
import tyro

import serve
from configs import RECIPES
from omni_jax.config import OmniConfig
from omni_jax.engine.outputs import Options
from omni_jax.processing import chat

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.DOTALL | re.MULTILINE)


COMMANDS = [line.split(" # ")[0].strip() for block in blocks("sh") for line in block.splitlines()]


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_exist(command: str) -> None:
    program, *arguments = shlex.split(command)
    if program == "make":
        assert re.search(rf"^{arguments[0]}:", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    elif program == "python":
        assert (ROOT / arguments[0]).is_file()
        if arguments[0] == "serve.py":
            tyro.extras.subcommand_cli_from_dict(serve.COMMANDS, args=arguments[1:])
        elif arguments[0] in ("train.py", "tools/aot_compile.py"):
            assert arguments[1] in RECIPES
        else:
            assert f'"{arguments[1]}"' in (ROOT / arguments[0]).read_text(encoding="utf-8")
    else:
        assert program == "pip" and arguments[:2] == ["install", "-e"]


def test_the_python_example_runs(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "7b").symlink_to(tiny_model)
    shutil.copy(ROOT / "tests" / "media" / "video.mp4", tmp_path / "clip.mp4")
    monkeypatch.chdir(tmp_path)
    (example,) = blocks("python")
    names: dict = {}
    exec(example, names)
    assert len(names["replies"]) == 2 and names["replies"][0].token_ids == names["reply"].token_ids
    assert names["reply"].text in capsys.readouterr().out


def test_nothing_is_left_out() -> None:
    for name in (*Options.__dataclass_fields__, *chat.ROLES):
        assert f"`{name}`" in README or f'"{name}"' in README, name
    for kind, options in chat._OPTIONS.items():
        assert f'"type": "{kind}"' in README
        for name in options:
            assert f"`{name}`" in README, name
    for kind in chat._READERS:
        assert f'"type": "{kind}"' in README
    context = OmniConfig.qwen2_5_omni_7b().thinker_config.text_config.max_position_embeddings
    assert f"{context:,} tokens" in README

"""Says whether a checkpoint's voices were made by the recipe that this repository makes voices by.

    python tools/check_voices.py out/7b
    python tools/check_voices.py Qwen2.5-Omni-7B/spk_dict.pt --audio Ethan=ethan.wav

Each number of a voice is compared with what the recipe can give (omni_jax/checkpoint/voice_recipe.py). With the sound
that a voice was made from, its clip is compared value by value. The exit status is 0 if all voices fit, 1 if one does
not, and 2 if something cannot be read.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it also runs as a file

from omni_jax.checkpoint.train_checkpoints import resolve_checkpoint
from omni_jax.checkpoint.voice_recipe import Finding, check_all
from omni_jax.checkpoint.voices import PUBLISHED_FILE, VOICES_FILE, Voice, load_voices, read_spk_dict
from omni_jax.checks import printable
from omni_jax.config import OmniConfig
from omni_jax.errors import CheckpointError, ConfigError, InputError
from omni_jax.plain_files import has_file
from omni_jax.processing.voice_clip import read_clip


@dataclass(frozen=True)
class Options:
    """What is looked at."""

    source: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DIR_OR_SPK_DICT")]
    """A converted checkpoint, the folder of a training run, a published folder, or its spk_dict.pt."""
    audio: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME=CLIP.wav")] = ()
    """The sound that the voice NAME is said to be made from."""


def read_voices(source: Path) -> tuple[dict[str, Voice], OmniConfig]:
    """The voices, and the configuration of their model.

    Raises:
      CheckpointError, ConfigError: if there are none, or config.json is not beside them.
    """
    if not source.is_dir():
        return read_spk_dict(source), OmniConfig.load(source.parent)
    folder = resolve_checkpoint(source)
    config = OmniConfig.load(folder)
    if not has_file(folder / VOICES_FILE) and has_file(folder / PUBLISHED_FILE):
        return read_spk_dict(folder / PUBLISHED_FILE), config
    return load_voices(folder), config


def read_clips(pairs: Sequence[str], voices: Mapping[str, Voice]) -> dict[str, np.ndarray]:
    """The mel of the sound that each voice is said to be made from.

    Raises:
      InputError: for what is no NAME=CLIP, an unknown voice, and a sound that cannot be read.
    """
    clips = {}
    for pair in pairs:
        # a path may hold "=", and a name hardly
        name, separator, path = pair.partition("=")
        if not separator or not path:
            raise InputError(f"--audio {pair} is not NAME=CLIP.wav")
        if name not in voices:
            raise InputError(f"--audio {pair}: there is no voice {name!r}; there are {', '.join(voices)}")
        try:
            clips[name] = read_clip(path).mel
        except InputError as e:
            raise InputError(f"--audio {pair}: {e}") from e
    return clips


def make_table(findings: Sequence[Finding]) -> Table:
    """One line for each finding."""
    table = Table(box=box.SIMPLE)
    for heading in ("voice", "part", "found", "the recipe has", ""):
        table.add_column(heading)
    for finding in findings:
        cells = (finding.voice, finding.part, finding.found, finding.expected, "" if finding.fits else "does not fit")
        # names come from files
        table.add_row(*(Text(printable(cell)) for cell in cells))
    return table


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; ``arguments`` are those of the process if None. Returns the exit status."""
    options = tyro.cli(Options, description=__doc__, args=arguments)
    try:
        voices, config = read_voices(options.source)
        findings = check_all(voices, config, read_clips(options.audio, voices))
    except (CheckpointError, ConfigError, InputError) as e:
        print(f"error: {printable(str(e))}", file=sys.stderr)
        return 2
    Console(soft_wrap=True).print(make_table(findings))
    misfits = [finding.voice for finding in findings if not finding.fits]
    if misfits:
        print(f"made in another way: {printable(', '.join(dict.fromkeys(misfits)))}")
        return 1
    print(f"all {len(voices)} voices fit the recipe")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Adds a voice to a checkpoint of ours, or takes one out, with the consent of whoever's voice it is.

::

    FOLDER/voices.npz               all voices (checkpoint/voices.py)
    FOLDER/voices.consent.json      {"NAME": {...}}: of each voice that was added, a ``VoiceRecord``

A voice that came with the published model has no record. The record goes along with the checkpoint, into those of
training runs and into PyTorch's folder, and goes with its voice when that is removed.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omni_jax.checkpoint import store
from omni_jax.checkpoint.model_files import CONSENT_FILE
from omni_jax.checkpoint.train_checkpoints import FILES_FILE, RUN_FILES
from omni_jax.checkpoint.voices import VOICES_FILE, Voice, check, choose, is_voice_name, load_voices, make_archive
from omni_jax.checks import shown
from omni_jax.config import OmniConfig
from omni_jax.errors import CheckpointError, InputError
from omni_jax.plain_files import copy_file, has_file, link_folder, read_object, replace_file
from omni_jax.processing.tokenizer import TextTokenizer

_PARAMS = "params"


@dataclass(frozen=True)
class VoiceRecord:
    """What is kept of how a voice came into a checkpoint.

    Attributes:
      consent: the statement of whoever adds it: who agreed, when, and to what.
      text: what the clip says.
      clip: name of the clip's file, without its folder.
      clip_sha256: of the file's bytes.
      seconds: that the clip lasts.
      bos_token: the id that speech in this voice begins with.
      like: the voice whose id that is; None if the voice has an id of its own.
      speaker_vector: where the speaker vector came from; None: it is zeros.
      added: date, as 2026-11-28.
    """

    consent: str
    text: str
    clip: str
    clip_sha256: str
    seconds: float
    bos_token: int
    like: str | None
    speaker_vector: str | None
    added: str

    def __post_init__(self) -> None:
        if not self.consent.strip():
            raise InputError(
                "no voice is added without the consent of the person whose voice it is: state who agreed, when, and to "
                "what (docs/responsible-use.md)"
            )


def read_records(folder: Path) -> dict[str, Any]:
    """The records of the voices that were added, by name.

    Raises:
      CheckpointError: if the file is damaged.
    """
    path = folder / CONSENT_FILE
    return read_object(path) if has_file(path) else {}


def read_voices(folder: Path) -> dict[str, Voice]:
    """The voices of a checkpoint of ours; none where it has no file of them.

    Raises:
      CheckpointError: if it is no checkpoint, or the file is damaged.
    """
    store.components(folder)  # for its error alone
    return load_voices(folder) if has_file(folder / VOICES_FILE) else {}


def choose_token(folder: Path, voices: Mapping[str, Voice], config: OmniConfig) -> int:
    """An id of the Thinker's vocabulary that stands for nothing yet, for a voice that the Talker is to be trained with.

    It is the first behind those of the voices and of the Talker that the tokenizer has no name for. Its embedding has
    never been trained.

    Raises:
      CheckpointError: if the vocabulary has none left.
    """
    tokenizer = TextTokenizer.load(folder)
    talker = config.talker_config
    used = [voice.bos_token for voice in voices.values()]
    used += [talker.tts_text_start_token_id, talker.tts_text_end_token_id, talker.tts_text_pad_token_id]
    vocab_size = config.thinker_config.text_config.vocab_size
    for token in range(max(used) + 1, vocab_size):
        if not tokenizer.has_name(token):
            return token
    raise CheckpointError(
        f"{folder}: all {vocab_size} ids of the vocabulary are taken; let the voice begin like another"
    )


def add_voice(folder: Path, voice: Voice, record: VoiceRecord, target: Path | None = None) -> None:
    """Adds a voice; the values of the others stay as they are, bit by bit. There may be none yet.

    Args:
      folder: a checkpoint of ours.
      voice: with a name that is not there yet.
      record: how it came about.
      target: a path where nothing is yet, for a checkpoint with the voice; None: it is added in place.

    Raises:
      CheckpointError: if the voice does not fit the model, ``target`` exists, or ``folder`` is a checkpoint of a
        training run, which must not be changed in place.
      InputError: if there is a voice of this name.
    """
    voices = read_voices(folder)
    if not is_voice_name(voice.name):
        raise InputError(f"{shown(voice.name)} is no name of a voice: 1 to 100 printable characters")
    if voice.name in voices:
        raise InputError(f"{folder} has a voice {voice.name!r} already; remove it first, or give another name")
    check({voice.name: voice}, OmniConfig.load(folder), folder / VOICES_FILE)
    records = read_records(folder)
    records[voice.name] = dataclasses.asdict(record)
    edited = {**voices, voice.name: voice}
    if target is not None:
        _copy_checkpoint(folder, target, edited, records)
        return
    _refuse_run(folder)
    # in this order: where the second is not written, a statement stands without its voice, and never the other way
    _write_records(folder, records)
    _write_voices(folder, edited)


def remove_voice(folder: Path, name: str, target: Path | None = None) -> None:
    """Takes a voice and its record out of a checkpoint; see ``add_voice`` for ``folder``, ``target`` and errors.

    Raises:
      InputError: if there is no such voice, or no other.
    """
    voices = load_voices(folder)
    choose(voices, name)  # for its error alone
    edited = {other: voice for other, voice in voices.items() if other != name}
    if not edited:
        raise InputError(f"{folder}: {name!r} is the only voice, and a model that speaks needs one")
    records = read_records(folder)
    records.pop(name, None)
    if target is not None:
        _copy_checkpoint(folder, target, edited, records)
        return
    _refuse_run(folder)
    _write_voices(folder, edited)
    _write_records(folder, records)


def _refuse_run(folder: Path) -> None:
    if has_file(folder / FILES_FILE):
        raise CheckpointError(
            f"{folder} is a checkpoint of a training run, whose files are counted; give a new folder for the result"
        )


def _copy_checkpoint(folder: Path, target: Path, voices: Mapping[str, Voice], records: Mapping[str, Any]) -> None:
    """A checkpoint with other voices; its arrays are hard links where the file system has them."""
    store.components(folder)  # for its error alone
    with store.new_folder(target) as unfinished:
        for path in sorted(folder.iterdir()):
            if has_file(path) and path.name not in (*RUN_FILES, VOICES_FILE, CONSENT_FILE):
                copy_file(path, unfinished / path.name)
        link_folder(folder / _PARAMS, unfinished / _PARAMS, folder)
        _write_voices(unfinished, voices)
        _write_records(unfinished, records)


def _write_voices(folder: Path, voices: Mapping[str, Voice]) -> None:
    _replace(folder / VOICES_FILE, make_archive(voices))


def _write_records(folder: Path, records: Mapping[str, Any]) -> None:
    path = folder / CONSENT_FILE
    if not records:
        path.unlink(missing_ok=True)
        return
    _replace(path, (json.dumps(records, indent=2, ensure_ascii=False) + "\n").encode(errors="backslashreplace"))


def _replace(path: Path, data: bytes) -> None:
    try:
        replace_file(path, data)
    except OSError as e:
        raise CheckpointError(f"cannot write {path}: {e.strerror or e}") from e

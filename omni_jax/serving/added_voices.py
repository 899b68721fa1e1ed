"""Voices that were added to a running server: clips of people who have agreed to it (docs/responsible-use.md)."""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import json
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omni_jax.checks import shown
from omni_jax.errors import InputError
from omni_jax.generation.cloned_voice import ClonedVoice
from omni_jax.generation.model import OmniModel
from omni_jax.generation.options import Options
from omni_jax.plain_files import replace_file
from omni_jax.processing.voice_clip import VoiceClip
from omni_jax.serving.http_errors import ConflictError, NotFoundError

MAX_VOICES = 1000
MIN_CONSENT = 20  # characters of a statement
MAX_CONSENT = 4000
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
_SUFFIX = ".voice.json"


@dataclass(frozen=True)
class AddedVoice:
    """A voice that was added.

    Attributes:
      name: that requests choose it by.
      consent: the statement of whoever added it that the speaker has agreed.
      created: seconds since 1970.
      voice: as requests have it.
      clip: what its recording was decoded to; None until it is asked for the first time after a start.
    """

    name: str
    consent: str
    created: int
    voice: ClonedVoice
    clip: VoiceClip | None = None


class AddedVoices:
    """Voices by name, in memory, and in a folder where they are to outlast the server.

    What is in the folder counts: other replicas of the server add and delete there too.
    """

    def __init__(self, model: OmniModel, folder: str | None):
        """Takes the voices that are in the folder.

        Raises:
          InputError: if one of them cannot be read.
        """
        self._model = model
        self._folder = None if folder is None else Path(folder)
        self._voices: dict[str, AddedVoice] = {}
        self._times: dict[Path, int] = {}  # when the files were written that were read
        if self._folder is not None:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._read_folder()

    def list(self) -> list[AddedVoice]:
        """All of them, in the order in which they came.

        Raises:
          InputError: as all methods do, if a file in the folder cannot be read.
        """
        self._read_folder()
        return list(self._voices.values())

    def _read_folder(self) -> None:
        """Takes what is new in the folder, and forgets what is gone.

        Raises:
          InputError: if a file cannot be read.
        """
        if self._folder is None:
            return
        times = {}
        for path in sorted(self._folder.glob(f"*{_SUFFIX}")):
            with contextlib.suppress(FileNotFoundError):  # another replica may delete it meanwhile
                times[path] = path.stat().st_mtime_ns
        if times == self._times:
            return
        voices = {}
        for path, time_written in times.items():
            name = path.name.removesuffix(_SUFFIX)
            known = self._times.get(path) == time_written and name in self._voices
            voices[name] = self._voices[name] if known else _read(path)
        self._voices = dict(sorted(voices.items(), key=lambda item: item[1].created))
        self._times = times

    def check(self, name: Any, consent: Any) -> str:
        """The name of a voice that may be added.

        Raises:
          InputError: for a name or a consent that cannot be taken.
          ConflictError: if there is a voice of this name.
        """
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise InputError(
                f"name is {shown(name)}; it must be up to 64 letters, digits, -, _ and ., a letter or digit first"
            )
        if not isinstance(consent, str) or not MIN_CONSENT <= len(consent.strip()) <= MAX_CONSENT:
            raise InputError(
                f"consent must be a statement of {MIN_CONSENT} to {MAX_CONSENT} characters: who speaks, and that they "
                "have agreed to their voice being used so"
            )
        self._read_folder()
        if name in self._model.voices or name in self._voices:
            raise ConflictError(f"there is a voice {name!r} already")
        if len(self._voices) >= MAX_VOICES:
            raise ConflictError(f"there are {MAX_VOICES} voices, which is the limit; delete one")
        return name

    def add(self, name: str, consent: str, voice: ClonedVoice, clip: VoiceClip) -> AddedVoice:
        """Adds a voice whose name was checked and whose clip was read.

        Raises:
          InputError: if the model cannot speak in it.
        """
        self._model.check(Options.create(modalities=("text", "audio"), voice=voice))
        added = AddedVoice(name, consent.strip(), int(time.time()), voice, clip)
        if self._folder is not None:
            path = self._folder / f"{name}{_SUFFIX}"
            replace_file(path, _write(added))
            self._times[path] = path.stat().st_mtime_ns
        self._voices[name] = added
        return added

    def delete(self, name: str) -> None:
        """Forgets a voice that was added.

        Raises:
          NotFoundError: if there is none.
          ConflictError: if it is one of the checkpoint's.
        """
        if name in self._model.voices:
            raise ConflictError(f"{name} is a voice of the checkpoint, which only its files can lose")
        self._read_folder()
        if name not in self._voices:
            raise NotFoundError(f"there is no voice {name!r}")
        if self._folder is not None:
            path = self._folder / f"{name}{_SUFFIX}"
            path.unlink(missing_ok=True)
            self._times.pop(path, None)
        del self._voices[name]

    def resolve(self, options: Options) -> Options:
        """The options with the clip of an added voice in place of its name."""
        if not isinstance(options.voice, str):
            return options
        self._read_folder()
        added = self._voices.get(options.voice)
        return options if added is None else dataclasses.replace(options, voice=added.voice)

    def find(self, voice: ClonedVoice) -> AddedVoice | None:
        """The added voice that this one is, if it is any."""
        for added in self._voices.values():
            if added.voice is voice:
                return added
        return None

    def keep_clip(self, added: AddedVoice, clip: VoiceClip) -> None:
        """Keeps what the recording of a voice was decoded to."""
        if self._voices.get(added.name) is added:
            self._voices[added.name] = dataclasses.replace(added, clip=clip)


def _write(added: AddedVoice) -> bytes:
    values = {
        "name": added.name,
        "consent": added.consent,
        "created": added.created,
        "ref_text": added.voice.ref_text,
        "audio": base64.b64encode(added.voice.ref_audio).decode(),
    }
    return (json.dumps(values, indent=2, ensure_ascii=False) + "\n").encode()


def _read(path: Path) -> AddedVoice:
    try:
        values = json.loads(path.read_bytes())
        voice = ClonedVoice(base64.b64decode(values["audio"], validate=True), values["ref_text"])
        return AddedVoice(values["name"], values["consent"], int(values["created"]), voice)
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise InputError(f"{path} is no voice that was added by a server: {type(e).__name__}: {e}") from e

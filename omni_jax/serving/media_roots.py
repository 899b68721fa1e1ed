"""Which files of this machine a request may name."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from omni_jax.errors import InputError
from omni_jax.generation.cloned_voice import ClonedVoice
from omni_jax.generation.options import Options
from omni_jax.processing.chat import MediaPart, Message
from omni_jax.processing.sources import confine_source, describe_source, find_scheme
from omni_jax.serving.chat_request import map_media


@dataclass(frozen=True)
class MediaRoots:
    """Folders, paths or ``gs://`` URLs.

    Attributes:
      folders: within which files must lie, links followed; none: no file may be named.
      base_dir: that relative paths are taken from; the first of the folders if None.
    """

    folders: tuple[str, ...] = ()
    base_dir: str | None = None

    def confine(self, messages: Sequence[Message]) -> tuple[Message, ...]:
        """The messages with the paths of media as they are to be opened.

        Raises:
          InputError: for a file outside of the folders, and for what is neither a path, a URL nor the bytes of a file.
        """

        def confine_part(part: MediaPart) -> MediaPart:
            # a video may be a list of frames, each with a source of its own
            if isinstance(part.source, list | tuple):
                source: Any = [self._confine_source(frame, part.where) for frame in part.source]
            else:
                source = self._confine_source(part.source, part.where)
            return dataclasses.replace(part, source=source)

        return map_media(messages, confine_part)

    def confine_voice(self, options: Options) -> Options:
        """The options with the clip of a voice likewise; raises the same."""
        voice = options.voice
        if not isinstance(voice, ClonedVoice):
            return options
        source = self._confine_source(voice.ref_audio, "audio.voice.ref_audio")
        return dataclasses.replace(options, voice=dataclasses.replace(voice, ref_audio=source))

    def _confine_source(self, source: Any, where: str) -> Any:
        if isinstance(source, np.ndarray):  # of this process: no request can hold one
            return source
        is_path = isinstance(source, str) and find_scheme(source) in ("", "file")
        if is_path and not self.folders:
            raise InputError(
                f"{where}: {describe_source(source)}: no files of this machine may be named; send the file itself "
                "(data:...;base64,...), or start the server with --media-root DIR"
            )
        error: InputError | None = None
        # what is no path is the same for every folder, also where there is none
        for folder in self.folders or ("/",):
            try:
                return confine_source(source, self.base_dir or folder, folder, "--media-root")
            except InputError as e:
                error = error or e
        raise InputError(f"{where}: {error}") from error

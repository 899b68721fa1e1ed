"""Which rows a run is trained on, and how much of them goes into a step."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omni_jax.checks import SEED_MAX
from omni_jax.data.examples import TooLong
from omni_jax.data.mixture import MixBy
from omni_jax.data.rows import VideoSound
from omni_jax.errors import ConfigError, InputError
from omni_jax.processing.fetch import RemoteAccess

# the least that each count may be; 0 where a run can do without
_MINIMA = {
    "rows": 1,
    "tokens": 2,  # the first is never a target
    "spans": 1,
    "audio_blocks": 0,
    "canvases": 0,
    "windows": 1,
    "lookahead": 1,
    "workers": 0,
}


@dataclass(frozen=True)
class DataConfig:
    """Rows, and the budgets of a step; every step has the same shapes. docs/data.md explains each field.

    Budgets of media are for each row of the batch, and the rows of a stream share theirs.
    """

    train: tuple[str, ...] = ()
    """Files of rows: JSONL, ArrayRecord or Parquet, on a disk or gs://; patterns like rows-*.jsonl are allowed."""
    weights: tuple[float, ...] = ()
    """How much of each of the files is read; without it, one epoch shows every row of all of them once."""
    mix_by: MixBy = "rows"
    """What the weights count: the rows that are read, or the tokens in them."""
    valid: tuple[str, ...] = ()
    """Files of rows that are not trained on: every eval.every steps the loss of all of them is taken."""
    seed: int = 0
    """Of the order of rows, below 2**32."""
    rows: int = 1
    """Rows of the batch of a step, over all processes."""
    streams: int = 1
    """Parts that rows are divided among and packed in; a multiple of the processes. Batches depend on it, and not on
    how many processes there are."""
    tokens: int = 8192
    """Positions in a row of the batch."""
    spans: int = 512
    """Spans of position ids in a row: one for a text, three for a picture, about one for each second of a video."""
    audio_blocks: int = 32
    """Blocks of two seconds of sound; 0: no sound at all."""
    canvases: int = 8
    """Canvases that frames of pictures and videos are put on; 0: no pictures at all."""
    windows: int = 64
    """Windows of 112 x 112 pixels on a canvas, and so in the largest frame; smaller ones at its edges that fit into one
    together count as one."""
    lookahead: int = 16
    """Examples that may wait for a place while smaller ones fill the batch."""
    too_long: TooLong = "split"
    """What becomes of a row that is longer than a row of the batch. split: a document becomes several examples, and a
    dialogue cannot be used; skip: neither can; error: the run stops."""
    windows_in_order: bool = False
    """Whether the examples of a document that was split come one after the other; else other rows come between."""
    workers: int = 0
    """Processes that decode for each stream, divided among the files where there are weights; 0: threads do."""
    isolate_media: bool = False
    """Whether each medium is decoded within two minutes and 8 GiB, by the same processes (one, if workers is 0): a file
    that was made to do harm costs its row, and not the run."""
    use_audio_in_video: VideoSound = "auto"
    """Whether the sound of videos is used that do not say so themselves. Under always, the sound that a row lists
    beside a video (`<video><audio>`) is the video's own."""
    max_pixels: int | None = None
    """Maximum of pixels of a picture; larger ones are made smaller. None: what the checkpoint's preprocessor says."""
    video_max_pixels: int | None = None
    """Maximum of pixels of a frame of a video."""
    fps: float | None = None
    """Frames a second that are taken of a video; 2 if nothing is said."""
    max_frames: int | None = None
    """Maximum of frames of a video."""
    media_root: str | None = None
    """Folder that the media of rows must lie within; without it, that of the file of each row."""
    allow_web: tuple[str, ...] = ()
    """Hosts that media may be fetched from: example.com, '*.example.com' for all below it, '*' for every public one."""
    allow_buckets: tuple[str, ...] = ()
    """Where in buckets media may be read, with the account of this machine: gs://BUCKET/FOLDER."""
    max_reject_share: float = 0.01
    """The run stops when more than this share of the rows cannot be used."""
    rejects: Path | None = None
    """File that names each row that cannot be used, and why, as JSONL."""

    def check(self, process_count: int) -> None:
        """Raises ConfigError if the fields do not go together."""
        if not self.train:
            raise ConfigError("data.train is empty; name at least one file of rows (--data.train ROWS.jsonl)")
        if self.weights and len(self.weights) != len(self.train):
            raise ConfigError(f"data.weights has {len(self.weights)} numbers, but data.train {len(self.train)} files")
        for weight in self.weights:
            if not 0 < weight < math.inf:
                raise ConfigError(
                    f"data.weights must be finite and over 0, got {self.weights}; leave out what is not to be drawn"
                )

        # every stream packs as many rows, and every process has as many streams
        if self.streams < 1 or self.rows % self.streams:
            raise ConfigError(f"data.rows is {self.rows}, which data.streams, {self.streams}, must divide")
        if self.streams % process_count:
            raise ConfigError(
                f"data.streams is {self.streams}, but must be a multiple of the {process_count} processes; "
                f"data.streams={self.rows} gives every row of the batch a stream of its own"
            )

        for name, minimum in _MINIMA.items():
            if getattr(self, name) < minimum:
                raise ConfigError(f"data.{name} must be at least {minimum}, got {getattr(self, name)}")
        if not 0 <= self.max_reject_share < 1:
            raise ConfigError(f"data.max_reject_share must be from 0 to below 1, got {self.max_reject_share}")
        if not 0 <= self.seed <= SEED_MAX:
            raise ConfigError(f"data.seed must be from 0 to {SEED_MAX}, got {self.seed}")
        try:
            _ = self.access
        except InputError as e:
            raise ConfigError(f"data.{e}") from e

    @property
    def access(self) -> RemoteAccess:
        """From where media may be fetched.

        Raises:
          InputError: for what is no host, and no place in a bucket.
        """
        return RemoteAccess(self.allow_web, self.allow_buckets)

    @property
    def pixels(self) -> dict[str, Any]:
        """What it changes of ``PixelSettings``."""
        # None leaves what the checkpoint's preprocessor says
        settings: dict[str, Any] = {}
        for name in ("max_pixels", "video_max_pixels", "fps", "max_frames"):
            value = getattr(self, name)
            if value is not None:
                settings[name] = value
        return settings

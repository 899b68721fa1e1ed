"""The size of a network of speaker vectors, in ``speaker_verifier.json`` of a checkpoint that has one."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omni_jax.config import DiTConfig
from omni_jax.config_file import ConfigSection
from omni_jax.errors import CheckpointError
from omni_jax.plain_files import has_file, read_object

SPEAKER_VERIFIER_FILE = "speaker_verifier.json"
SPEAKER_VERIFIER = "speaker_verifier"  # the component of a checkpoint


@dataclass(frozen=True)
class SpeakerVerifierConfig(ConfigSection):
    """An ECAPA-TDNN, as Token2Wav has one for clips (https://arxiv.org/abs/2005.07143), and the speakers it tells."""

    MODEL_TYPE = "omni_jax_speaker_verifier"

    width: int = 192  # of a vector; what Token2Wav takes
    channels: tuple[int, ...] = (512, 512, 512, 512, 1536)
    attention_channels: int = 128
    squeeze_channels: int = 128
    segment: int = 300  # mel frames that it reads at a time
    num_speakers: int = 2  # that it is trained to tell, perturbed ones among them
    mel_dim: int = 80

    @property
    def encoder(self) -> DiTConfig:
        """The sizes as ``models.speaker_encoder`` takes them; the rest of it is not used."""
        return DiTConfig(
            mel_dim=self.mel_dim,
            enc_dim=self.width,
            enc_channels=self.channels,
            enc_attention_channels=self.attention_channels,
            enc_se_channels=self.squeeze_channels,
        )

    @classmethod
    def tiny(cls, **changes: Any) -> SpeakerVerifierConfig:
        """Small enough for a test."""
        sizes: dict[str, Any] = dict(width=12, channels=(16, 16, 16, 16, 48), attention_channels=8, squeeze_channels=8)
        return cls(**{**sizes, **changes})

    @classmethod
    def load(cls, folder: Path) -> SpeakerVerifierConfig:
        """Of a checkpoint.

        Raises:
          CheckpointError: if it has none.
          ConfigError: if the file describes none.
        """
        path = folder / SPEAKER_VERIFIER_FILE
        if not has_file(path):
            raise CheckpointError(
                f"{folder} has no {SPEAKER_VERIFIER_FILE}, so no network of speaker vectors; train one "
                "(docs/speech-training.md)"
            )
        return cls.from_dict(read_object(path), str(path))

    def to_json(self) -> str:
        """The text of the file."""
        return json.dumps(self.to_dict(), indent=2) + "\n"

"""The size of a network of speaker vectors, in ``speaker_verifier.json`` of a checkpoint that has one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from omni_jax.config import DiTConfig
from omni_jax.config_file import ComponentConfig

SPEAKER_VERIFIER_FILE = "speaker_verifier.json"
SPEAKER_VERIFIER = "speaker_verifier"  # the component of a checkpoint


@dataclass(frozen=True)
class SpeakerVerifierConfig(ComponentConfig):
    """An ECAPA-TDNN, as Token2Wav has one for clips (https://arxiv.org/abs/2005.07143), and the speakers it tells."""

    MODEL_TYPE = "omni_jax_speaker_verifier"
    FILE = SPEAKER_VERIFIER_FILE
    NETWORK = "network of speaker vectors"

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

"""The size of a speech tokenizer, in ``speech_tokenizer.json`` of a checkpoint that has one."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omni_jax.config import AudioEncoderConfig
from omni_jax.config_file import ConfigSection
from omni_jax.errors import CheckpointError, ConfigError
from omni_jax.plain_files import has_file, read_object

SPEECH_TOKENIZER_FILE = "speech_tokenizer.json"
SPEECH_TOKENIZER = "speech_tokenizer"  # the component of a checkpoint
_AUDIO = AudioEncoderConfig()  # as published


@dataclass(frozen=True)
class SpeechTokenizerConfig(ConfigSection):
    """A tower like the audio encoder's with a vector quantizer in its middle (``WhisperEncoderVQ`` of qwen-tts)."""

    MODEL_TYPE = "omni_jax_speech_tokenizer"

    audio_config: AudioEncoderConfig = _AUDIO  # its blocks are those of the tokenizer
    quantizer_layer: int = 6  # layers before the quantizer
    codebook_size: int = 8192
    num_labels: int = 257  # of the content: 0 is none, then the bytes of UTF-8
    mel_channels: int = 512  # of the decoder to mel
    mel_dim: int = 80

    def __post_init__(self) -> None:
        layers = self.audio_config.encoder_layers
        if self.quantizer_layer >= layers:
            raise ConfigError(
                f"quantizer_layer is {self.quantizer_layer}, but encoder_layers {layers}; one must come behind it"
            )

    @property
    def block_codes(self) -> int:
        """Codes of a full block, one for each two mel frames of 10 ms."""
        return self.audio_config.n_window

    @classmethod
    def tiny(cls, **changes: Any) -> SpeechTokenizerConfig:
        """Small enough for a test."""
        audio = AudioEncoderConfig.tiny(encoder_layers=3, n_window=20)
        sizes: dict[str, Any] = dict(audio_config=audio, quantizer_layer=1, codebook_size=64, mel_channels=24)
        return cls(**{**sizes, **changes})

    @classmethod
    def load(cls, folder: Path) -> SpeechTokenizerConfig:
        """Of a checkpoint.

        Raises:
          CheckpointError: if it has none.
          ConfigError: if the file describes none.
        """
        path = folder / SPEECH_TOKENIZER_FILE
        if not has_file(path):
            raise CheckpointError(
                f"{folder} has no {SPEECH_TOKENIZER_FILE}, so no speech tokenizer; train one (docs/speech-training.md)"
            )
        return cls.from_dict(read_object(path), str(path))

    def to_json(self) -> str:
        """The text of the file."""
        return json.dumps(self.to_dict(), indent=2) + "\n"

    def with_blocks(self, n_window: int | None) -> SpeechTokenizerConfig:
        """The same with blocks of another length, in codes; no parameter depends on it. None: as it is."""
        if n_window is None:
            return self
        return dataclasses.replace(self, audio_config=dataclasses.replace(self.audio_config, n_window=n_window))

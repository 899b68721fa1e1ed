"""The size of a speech tokenizer, in ``speech_tokenizer.json`` of a checkpoint that has one."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from omni_jax.config import AudioEncoderConfig
from omni_jax.config_file import ComponentConfig
from omni_jax.errors import ConfigError

SPEECH_TOKENIZER_FILE = "speech_tokenizer.json"
SPEECH_TOKENIZER = "speech_tokenizer"  # the component of a checkpoint
_AUDIO = AudioEncoderConfig()  # as published


@dataclass(frozen=True)
class SpeechTokenizerConfig(ComponentConfig):
    """A tower like the audio encoder's with a vector quantizer in its middle (``WhisperEncoderVQ`` of qwen-tts)."""

    MODEL_TYPE = "omni_jax_speech_tokenizer"
    FILE = SPEECH_TOKENIZER_FILE
    NETWORK = "speech tokenizer"

    audio_config: AudioEncoderConfig = _AUDIO  # its blocks are those of the tokenizer
    quantizer_layer: int = 6  # layers before the quantizer
    codebook_size: int = 8192
    codebook_dim: int = _AUDIO.d_model  # channels that are quantized; linear maps unless they are those of the layers
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
        sizes: dict[str, Any] = dict(
            audio_config=audio, quantizer_layer=1, codebook_size=64, codebook_dim=audio.d_model, mel_channels=24
        )
        return cls(**{**sizes, **changes})

    def with_blocks(self, n_window: int | None) -> SpeechTokenizerConfig:
        """The same with blocks of another length, in codes; no parameter depends on it. None: as it is."""
        if n_window is None:
            return self
        return dataclasses.replace(self, audio_config=dataclasses.replace(self.audio_config, n_window=n_window))

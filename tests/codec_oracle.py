"""The PyTorch class that the speech tokenizer is compared with: ``WhisperEncoderVQ`` of the package qwen-tts.

The package asks for other releases of transformers than the oracle of everything else, and its module imports readers
of sound that the class does not use. So the Makefile keeps it in a folder of its own, of which the one module is
imported here, without the package's own ``__init__`` and with empty modules in place of what it does not need.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

FOLDER = Path(sys.prefix) / "qwen_tts"
_PACKAGES = ("qwen_tts", "qwen_tts.core", "qwen_tts.core.tokenizer_25hz", "qwen_tts.core.tokenizer_25hz.vq")
_UNUSED = (
    *("sox", "onnxruntime", "torchaudio", "torchaudio.compliance", "torchaudio.compliance.kaldi"),
    *("librosa", "librosa.filters"),
)


@contextmanager
def _stand_ins() -> Iterator[None]:
    """Modules that are there for the time of an import."""
    before = dict(sys.modules)
    for name in _UNUSED:
        sys.modules[name] = ModuleType(name)
    sys.modules["librosa.filters"].mel = None  # type: ignore[attr-defined]
    for name in _PACKAGES:
        package = ModuleType(name)
        package.__path__ = [str(FOLDER / name.replace(".", "/"))]
        sys.modules[name] = package
    sys.path.append(str(FOLDER))  # einops
    try:
        yield
    finally:
        sys.path.remove(str(FOLDER))
        for name in set(sys.modules) - set(before):
            if name.split(".")[0] in {"qwen_tts", *_UNUSED}:
                del sys.modules[name]
        for name in _UNUSED:
            if name in before:
                sys.modules[name] = before[name]


def load_encoder_class() -> Any:
    """``WhisperEncoderVQ``."""
    with _stand_ins():
        return importlib.import_module("qwen_tts.core.tokenizer_25hz.vq.speech_vq").WhisperEncoderVQ

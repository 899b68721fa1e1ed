"""A speaker model in an ONNX file: its vector is the largest log-energy of each of the first bins."""

from __future__ import annotations

import base64
from pathlib import Path

WIDTH = 12  # of OmniConfig.tiny()

# of onnx.helper: ReduceMax over the axis of time of [1, frames, 80], then a Slice of WIDTH bins
_MODEL = """
CAgSADqCAgo1CghmZWF0dXJlcwoEYXhlcxIHbG91ZGVzdCIJUmVkdWNlTWF4Kg8KCGtlZXBkaW1zGACgAQIKLAoHbG91ZGVzdAoGc3RhcnRzCgRlbmRz
CgRkaW1zEgZ2ZWN0b3IiBVNsaWNlEgFnKhQIARAHQgRheGVzSggBAAAAAAAAACoWCAEQB0IGc3RhcnRzSggAAAAAAAAAACoUCAEQB0IEZW5kc0oIDAAA
AAAAAAAqFAgBEAdCBGRpbXNKCAEAAAAAAAAAWiQKCGZlYXR1cmVzEhgKFggBEhIKAggBCggSBmZyYW1lcwoCCFBiGAoGdmVjdG9yEg4KDAgBEggKAggB
CgIIDEIECgAQEg==
"""


def write_speaker_model(path: Path) -> Path:
    path.write_bytes(base64.b64decode(_MODEL))
    return path

"""A Thinker put together from the models that its training begins with (paper section 3).

Qwen2.5 gives the language model, Qwen2.5-VL the vision encoder, Whisper-large-v3 the audio encoder. Their tensors have
other names than in the published Thinker, and nothing else is different, but that Qwen2.5-VL keeps query, key and value
in one tensor. So each of the Thinker's tensors is looked up in ``SOURCES``, and then goes the way of a conversion.
"""

from __future__ import annotations

import math
import re
import shutil
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from omni_jax.checkpoint import store
from omni_jax.checkpoint.convert import CONSTANTS_FILE, side_files
from omni_jax.checkpoint.name_map import Entry, differences, listed, make_name_table
from omni_jax.checkpoint.pytorch import read_headers
from omni_jax.checkpoint.tensor_file import StoredTensor, write_file
from omni_jax.config import OmniConfig
from omni_jax.errors import CheckpointError

# a tensor of the Thinker -> the part that has it, and its names there, of which one must be there
SOURCES: dict[str, tuple[str, tuple[str, ...]]] = {
    # small models of text use their embeddings as the head too, and have no tensor of that name
    r"thinker\.lm_head\.weight": ("llm", ("lm_head.weight", "model.embed_tokens.weight")),
    r"thinker\.(model\..*)": ("llm", (r"\1",)),
    r"thinker\.visual\.(blocks\.\d+\.attn)\.[qkv]\.(weight|bias)": (
        "vision",
        (r"visual.\1.qkv.\2", r"model.visual.\1.qkv.\2"),
    ),
    r"thinker\.visual\.(.*)": ("vision", (r"visual.\1", r"model.visual.\1")),
    r"thinker\.audio_tower\.ln_post\.(.*)": ("audio", (r"model.encoder.layer_norm.\1", r"encoder.layer_norm.\1")),
    r"thinker\.audio_tower\.((conv|layers).*)": ("audio", (r"model.encoder.\1", r"encoder.\1")),
}
_FUSED = re.compile(r"thinker\.visual\.blocks\.\d+\.attn\.([qkv])\.")


@dataclass(frozen=True)
class _Source:
    """A tensor of another model, or its first, second or third part."""

    tensor: StoredTensor
    third: int | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        first, *rest = self.tensor.shape
        return (first if self.third is None else first // 3, *rest)

    def read(self) -> np.ndarray:
        whole = self.tensor.read()
        return whole if self.third is None else np.split(whole, 3)[self.third]


def assemble_thinker(files: Path, target: Path, parts: Mapping[str, Path], seed: int = 0) -> list[str]:
    """Writes a checkpoint with a Thinker alone. All is checked before the first number is read.

    Args:
      files: a folder with config.json, tokenizer.json and the other small files of the model.
      target: a path where nothing is yet.
      parts: Hugging Face folders of "llm", "vision" and "audio"; one that is not given begins at random.
      seed: of what begins at random: what no part holds.

    Returns:
      the published names of the tensors that begin at random.

    Raises:
      CheckpointError: if a part lacks a tensor of the Thinker, or has it in another shape.
      ConfigError: if config.json is not the model's.
    """
    entries = make_name_table(OmniConfig.load(files), ["thinker"])
    tensors = {part: read_headers(folder) for part, folder in parts.items()}
    found = {name: source for entry in entries for name in entry.names if (source := _find(name, tensors))}
    expected = {name: entry.shape for entry in entries for name in entry.names if _part(name) in parts}
    if trouble := differences(expected, {name: source.shape for name, source in found.items()}):
        given = ", ".join(f"{part} {folder}" for part, folder in parts.items())
        raise CheckpointError(f"{given}: not the Thinker that {files / 'config.json'} describes:{trouble}")
    kinds = {e.names: {found[n].tensor.dtype for n in e.names if n in found} for e in entries}
    if mixed := [names[0] for names, k in kinds.items() if len(k) > 1]:
        raise CheckpointError(f"the parts have layers of several dtypes:{listed('of them', mixed)}")

    def pieces(entry: Entry) -> Iterator[np.ndarray]:
        for name in entry.names:
            yield entry.to_jax(found[name].read() if name in found else _random(entry, name, seed))

    def leaf(entry: Entry) -> store.Leaf:
        kind = next(iter(kinds[entry.names]), np.dtype(np.float32))
        return store.Leaf(entry.path, entry.leaf_shape, kind, entry.stacked, lambda: pieces(entry))

    def beside(folder: Path) -> None:
        for file in side_files(files):
            shutil.copyfile(file, folder / file.name)
        write_file(folder / CONSTANTS_FILE, [])

    store.save(target, [leaf(entry) for entry in entries], beside)
    return [name for entry in entries for name in entry.names if name not in found]


def _part(name: str) -> str | None:
    """Which part has a tensor."""
    return next((part for pattern, (part, _) in SOURCES.items() if re.fullmatch(pattern, name)), None)


def _find(name: str, tensors: Mapping[str, Mapping[str, StoredTensor]]) -> _Source | None:
    for pattern, (part, names) in SOURCES.items():
        if match := re.fullmatch(pattern, name):
            known = (tensors.get(part, {}).get(match.expand(other)) for other in names)
            tensor = next((t for t in known if t is not None), None)
            fused = _FUSED.match(name)
            return tensor and _Source(tensor, "qkv".index(fused[1]) if fused else None)
    return None


def _random(entry: Entry, name: str, seed: int) -> np.ndarray:
    """What a tensor begins with: kernels normal, such that they keep the variance of what they multiply."""
    kind = entry.path[-1]
    if kind == "scale":
        return np.ones(entry.shape, np.float32)
    if kind == "bias":
        return np.zeros(entry.shape, np.float32)
    std = 0.02 if kind == "embedding" else 1 / math.sqrt(math.prod(entry.shape[1:]))
    rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
    return np.float32(std) * rng.standard_normal(entry.shape, dtype=np.float32)

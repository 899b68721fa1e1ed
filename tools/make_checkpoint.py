"""Writes a checkpoint with random parameters in the published layout: for tests, demonstrations and measurements.

    python tools/make_checkpoint.py out/published --size small

It has two voices with the published names. The parameters are such that activations neither vanish nor explode and that
no tensor is constant, so that a mistake in any of them shows in the output. Tensors are made one at a time; the same
seed gives the same values however the files are cut.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import ml_dtypes
import numpy as np
import tyro
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as ProgressBar

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it also runs as a file

from omni_jax.checkpoint import voices
from omni_jax.checkpoint.convert import Progress, ProgressCounter
from omni_jax.checkpoint.export import SHARD_BYTES
from omni_jax.checkpoint.name_map import Entry, make_constants, make_name_table
from omni_jax.checkpoint.pytorch import write_tensors
from omni_jax.checkpoint.tensor_file import NewTensor
from omni_jax.config import (
    AudioEncoderConfig,
    BigVGANConfig,
    OmniConfig,
    TalkerConfig,
    ThinkerConfig,
    Token2WavConfig,
    VisionEncoderConfig,
)
from omni_jax.processing.tokenizer_files import write_generation_config, write_tokenizer

Size = Literal["tiny", "small", "2gb", "3b", "7b"]

_DTYPES = {"bfloat16": np.dtype(ml_dtypes.bfloat16), "float32": np.dtype(np.float32)}
# the published speakers: how far their token id lies after the Talker's text padding, and the frames of a random clip
_SPEAKERS = {"Chelsie": (13, 37), "Ethan": (11, 52)}


def make_config(size: Size) -> OmniConfig:
    """The sizes of the published models, of the tests, and two between them."""
    if size == "7b":
        return OmniConfig.qwen2_5_omni_7b()
    if size == "3b":
        return OmniConfig.qwen2_5_omni_3b()
    if size == "2gb":
        return _two_gigabytes()
    return _small() if size == "small" else OmniConfig.tiny()


def _small() -> OmniConfig:
    """Some tens of megabytes, with the tiny vocabulary."""
    width = 256  # of the Thinker, and so of what the encoders give and the Talker takes
    tiny = ThinkerConfig.tiny()
    text = dict(hidden_size=width, intermediate_size=704, num_hidden_layers=6, num_attention_heads=8, head_dim=32)
    rope = dataclasses.replace(tiny.text_config.rope_scaling, mrope_section=(4, 6, 6))
    audio = dict(d_model=128, encoder_layers=4, encoder_ffn_dim=512, output_dim=width)
    vision = dict(depth=4, hidden_size=128, num_heads=4, intermediate_size=344, fullatt_block_indexes=(1, 3))
    thinker = dataclasses.replace(
        tiny,
        text_config=dataclasses.replace(tiny.text_config, rope_scaling=rope, **text),
        audio_config=dataclasses.replace(tiny.audio_config, **audio),
        vision_config=dataclasses.replace(tiny.vision_config, out_hidden_size=width, **vision),
    )
    talker = TalkerConfig.tiny(embedding_size=width)
    vocoder = BigVGANConfig(upsample_initial_channel=64)
    token2wav = Token2WavConfig.tiny(bigvgan_config=vocoder)
    return OmniConfig.tiny(thinker_config=thinker, talker_config=talker, token2wav_config=token2wav)


def _two_gigabytes() -> OmniConfig:
    """The 3B with few layers and small encoders: a little over 2 GB in bfloat16, most of it in large tensors."""
    published = OmniConfig.qwen2_5_omni_3b()
    text = dataclasses.replace(published.thinker_config.text_config, num_hidden_layers=8)
    thinker = dataclasses.replace(
        published.thinker_config,
        text_config=text,
        audio_config=AudioEncoderConfig.tiny(output_dim=text.hidden_size),
        vision_config=VisionEncoderConfig.tiny(out_hidden_size=text.hidden_size),
    )
    talker = TalkerConfig.tiny(embedding_size=text.hidden_size)
    return OmniConfig.tiny(thinker_config=thinker, talker_config=talker)


def write_checkpoint(
    folder: Path,
    config: OmniConfig,
    *,
    seed: int = 0,
    dtype: Literal["bfloat16", "float32"] = "bfloat16",
    shard_bytes: int = SHARD_BYTES,
    progress: Progress = lambda done, total: None,
) -> None:
    """Writes a complete checkpoint folder.

    Args:
      folder: where to; it is made, and files of the same names in it are replaced.
      config: what the model is like.
      seed: of the random parameters.
      dtype: of the Thinker's and the Talker's tensors; Token2Wav's are float32, as in the published files.
      shard_bytes: the largest size of one file.
      progress: called after each tensor with the number written and the total.

    Raises:
      ConfigError: if the special tokens of ``config`` do not follow the published order.
    """
    # the small files first: what is wrong with a configuration shows before gigabytes are written
    folder.mkdir(parents=True, exist_ok=True)
    write_tokenizer(folder, config)
    config.save(folder)
    write_generation_config(folder, config)
    voices.write_spk_dict(folder / voices.PUBLISHED_FILE, _make_voices(config, seed))
    write_tensors(folder, _make_tensors(config, seed, _DTYPES[dtype], progress), shard_bytes)


def _make_tensors(config: OmniConfig, seed: int, dtype: np.dtype, progress: Progress) -> Iterator[NewTensor]:
    entries = make_name_table(config)
    counter = ProgressCounter(entries, progress)

    # called when the tensor is written, so that one of them is in memory at a time
    def make(entry: Entry, name: str, tensor_dtype: np.dtype) -> np.ndarray:
        tensor = _init_tensor(entry, name, seed).astype(tensor_dtype)
        counter.advance()
        return tensor

    for entry in entries:
        tensor_dtype = np.dtype(np.float32) if entry.component == "token2wav" else dtype
        for name in entry.names:
            yield NewTensor(name, entry.shape, tensor_dtype, functools.partial(make, entry, name, tensor_dtype))
    # the published files hold a few arrays that are no parameters, which a converter has to pass over
    for name, values in make_constants(config).items():
        yield NewTensor(name, values.shape, values.dtype, lambda values=values: values)


def _make_voices(config: OmniConfig, seed: int) -> dict[str, voices.Voice]:
    dit = config.token2wav_config.dit_config
    made = {}
    for name, (place, frames) in _SPEAKERS.items():
        # seeded by name, as tensors are: a voice does not depend on those before it
        rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
        cond = rng.standard_normal((1, dit.enc_emb_dim), dtype=np.float32)
        mel = 2 * rng.standard_normal((1, frames, dit.mel_dim), dtype=np.float32) - 4  # about as loud as speech
        made[name] = voices.Voice(name, config.talker_config.tts_text_pad_token_id + place, cond, mel)
    return made


def _init_tensor(entry: Entry, name: str, seed: int) -> np.ndarray:
    """float32 [entry.shape]: kernels keep the variance of what they multiply, scales lie around 1."""
    # seeded by name, so that the order of the tensors does not matter; hash() would differ from run to run
    rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
    x = rng.standard_normal(entry.shape, dtype=np.float32)
    kind = entry.path[-1]
    if kind == "kernel":
        fan_in = math.prod(entry.shape[1:])  # PyTorch's [out, in, ...]
        if entry.path[-2] == "upsample":
            # [in, out, k], of which about half of the kernel reaches each sample
            fan_in = entry.shape[0] * entry.shape[2] / 2
        return x / np.float32(math.sqrt(fan_in))
    # around 1 and not at it, so that a norm that leaves its scale out shows
    if kind == "scale":
        return np.float32(1) + np.float32(0.2) * x
    if kind == "embedding":
        return x
    return np.float32(0.1) * x  # biases, and SnakeBeta's alpha and beta, which are logarithms


def main(
    folder: tyro.conf.Positional[Path],
    size: Size = "tiny",
    seed: int = 0,
    dtype: Literal["bfloat16", "float32"] = "bfloat16",
) -> None:
    """Writes a checkpoint with random parameters in the published layout, as if fetched from the Hub.

    What a model of it answers is noise. ``tools/convert.py to-jax FOLDER MODEL`` makes a folder that runs here.

    Args:
      folder: where to; it must not exist yet.
      size: tiny (1 MB) and small (40 MB) have a vocabulary of bytes; 2gb, 3b and 7b the published one's size and
        special tokens.
      seed: of the random parameters.
      dtype: of the Thinker's and the Talker's tensors; Token2Wav's are float32.
    """
    if folder.exists():
        raise SystemExit(f"error: {folder} exists already; give a new folder")
    columns = TextColumn("writing"), BarColumn(), MofNCompleteColumn(), TextColumn("tensors"), TimeRemainingColumn()
    with ProgressBar(*columns) as bar:
        task = bar.add_task("", total=None)
        config = make_config(size)
        write_checkpoint(
            folder,
            config,
            seed=seed,
            dtype=dtype,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )


if __name__ == "__main__":
    tyro.cli(main)

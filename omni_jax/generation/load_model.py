"""Loads a checkpoint as an ``OmniModel``."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from jax.sharding import Mesh

from omni_jax.checkpoint.train_checkpoints import resolve_checkpoint
from omni_jax.checkpoint.voices import VOICES_FILE, Voice, load_voices
from omni_jax.checkpoint.voices import check as check_voices
from omni_jax.compile_cache import keep_compiled_programs
from omni_jax.config import OmniConfig
from omni_jax.engine.request import ChunkSizes, TalkerParams
from omni_jax.generation.components import choose_components, load_engines, load_speaker_model, load_speech_tokenizer
from omni_jax.generation.model import OmniModel
from omni_jax.generation.quantization import CacheDtype, NumberFormat, Quantization
from omni_jax.models.ode_solver import Solver
from omni_jax.processing.fetch import RemoteAccess
from omni_jax.processing.media_workers import isolate
from omni_jax.processing.processor import Processor


def load(
    folder: str | os.PathLike[str],
    *,
    dtype: str | None = None,
    mesh: Mesh | None = None,
    components: Sequence[str] | None = None,
    allow_web: Sequence[str] = (),
    allow_buckets: Sequence[str] = (),
    isolate_media: bool = False,
    chunk_sizes: ChunkSizes | None = None,
    token2wav: Mapping[str, Any] = MappingProxyType({}),
    quantization: Quantization | None = None,
    kv_cache_dtype: CacheDtype | None = None,
    adapters: Mapping[str, str | os.PathLike[str]] = MappingProxyType({}),
    speaker_model: str | os.PathLike[str] | None = None,
    speech_tokenizer: str | os.PathLike[str] | None = None,
) -> OmniModel:
    """Loads a checkpoint that ``tools/convert.py to-jax`` wrote.

    What this process compiles from then on is kept on disk (``compile_cache.keep_compiled_programs``).

    Args:
      folder: the checkpoint; or the folder of a training run, whose last one it is.
      dtype: "bfloat16" or "float32" for parameters and computation; what the checkpoint holds if None. Token2Wav
        always computes in float32.
      mesh: from ``omni_jax.sharding.make_mesh``, to shard the parameters over several devices.
      components: ("thinker",) to read and write only; all that the checkpoint has if None.
      allow_web: hosts that media may be fetched from: "example.com", "*.example.com" for all below it, "*" for every
        public one. Without any, nothing is fetched.
      allow_buckets: ("gs://bucket/folder",): media that lie in it may be read, with the account of this machine.
      isolate_media: whether media are decoded in a process of its own, with limits of time and memory, so that a file
        made to do harm costs its request alone (``processing.media_workers``). A script that asks for it needs
        ``if __name__ == "__main__":``, as always where Python starts processes.
      chunk_sizes: how much is computed at a time while a reply is streamed; the defaults if None.
      token2wav: {"solver": "midpoint", "steps": 9}, how its flow is integrated (``models.ode_solver.Solver``), if not
        as the checkpoint says: with fewer evaluations than the published 36 sound is made sooner, and is another.
      quantization: "int8" or "int4", to keep the linear maps of Thinker and Talker in so many bits
        (``generation.quantization``); without a mesh, the host holds the parameters before that.
      kv_cache_dtype: "int8", to keep keys and values of the decoders in 8 bits, with a scale for each position and
        head.
      adapters: folders of adapters of the Thinker (LoRA), as peft writes them or of training runs, by the names that
        requests choose them by. The adapter of a run whose folder is given as ``folder`` is merged instead.
      speaker_model: an ONNX file or a checkpoint that makes speaker vectors of clips; if None, ``folder``, if it can.
      speech_tokenizer: a checkpoint whose speech tokenizer makes codes of clips; if None, ``folder``, if it has one.

    Raises:
      CheckpointError: if the folder is not such a checkpoint or lacks a part.
      ConfigError: if its config.json does not describe the model, or the mesh does not divide a parameter.
      InputError: if what is allowed is no host, or no place in a bucket; for another quantization or solver.
    """
    number_format = NumberFormat(dtype, quantization, kv_cache_dtype)
    Solver().override(token2wav)  # for its errors alone
    folder = resolve_checkpoint(Path(folder))
    access = RemoteAccess(allow_web, allow_buckets)
    wanted = choose_components(folder, components)
    keep_compiled_programs()
    # small files first: what is wrong with them is found before gigabytes are read
    config = OmniConfig.load(folder)
    solver = Solver.load(folder).override(token2wav)
    talker_params = TalkerParams.load(folder)
    processor = Processor.load(folder, access=access)
    vectors = load_speaker_model(folder, config, speaker_model)
    tokenizer = load_speech_tokenizer(folder, wanted, speech_tokenizer)
    folders = {name: Path(adapter) for name, adapter in adapters.items()}
    engines = load_engines(folder, config, wanted, number_format, mesh, chunk_sizes or ChunkSizes(), solver, folders)
    voices = _load_voices(folder, config) if "talker" in wanted else {}
    processor = isolate(processor) if isolate_media else processor
    return OmniModel(config, processor, engines, voices, vectors, tokenizer, talker_params)


def _load_voices(folder: Path, config: OmniConfig) -> dict[str, Voice]:
    voices = load_voices(folder)
    check_voices(voices, config, folder / VOICES_FILE)
    return voices

"""The components of a checkpoint as engines: which there are, their modules, and their parameters on the devices."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.typing import Dtype
from jax.sharding import Mesh, SingleDeviceSharding

from omni_jax.checkpoint import store
from omni_jax.checkpoint.name_map import COMPONENTS
from omni_jax.checkpoint.peft import read_adapter
from omni_jax.checkpoint.train_checkpoints import resolve_checkpoint
from omni_jax.config import OmniConfig
from omni_jax.engine.adapters import AdapterTable
from omni_jax.engine.prefill import Engines
from omni_jax.engine.request import ChunkSizes
from omni_jax.engine.speaker_engine import SpeakerEngine
from omni_jax.engine.speech_tokenizer_engine import SpeechTokenizerEngine
from omni_jax.engine.talker_engine import APPEND_WIDTH, TalkerEngine
from omni_jax.engine.thinker_engine import ThinkerEngine
from omni_jax.engine.token2wav_engine import Token2WavEngine
from omni_jax.errors import CheckpointError
from omni_jax.generation.adapters import attach_table, make_table, merge_adapter, read_adapters
from omni_jax.generation.lane_padding import pad_params, widen_config
from omni_jax.generation.quantization import NumberFormat, quantize_params
from omni_jax.layers.stack import unstack_layers
from omni_jax.models import talker, thinker, token2wav
from omni_jax.models.ode_solver import Solver
from omni_jax.processing.speaker_vectors import OnnxSpeakerModel, SpeakerModel
from omni_jax.sharding import batch_shards, param_shardings
from omni_jax.speaker_verifier_config import SPEAKER_VERIFIER
from omni_jax.speech_tokenizer_config import SPEECH_TOKENIZER


def choose_components(folder: Path, components: Sequence[str] | None) -> tuple[str, ...]:
    """The components to load: those that are asked for, or all that the checkpoint has.

    Raises:
      CheckpointError: if the Thinker is not among them.
    """
    stored = [name for name in store.components(folder) if name in COMPONENTS]
    wanted = tuple(stored if components is None else components)
    if "thinker" not in wanted or "thinker" not in stored:
        raise CheckpointError(
            f"{folder} has {', '.join(stored)}, and {', '.join(wanted)} was asked for; nothing goes without thinker"
        )
    return wanted


def load_speaker_model(folder: Path, config: OmniConfig, path: str | os.PathLike[str] | None) -> SpeakerModel | None:
    """What makes speaker vectors of clips.

    Args:
      folder: the checkpoint.
      config: of it.
      path: an ONNX file, or a checkpoint with such a network, or a training run's folder; None: that of ``folder``, if
        it has one.

    Raises:
      CheckpointError: if it cannot be loaded.
    """
    width = config.token2wav_config.dit_config.enc_emb_dim
    if path is not None and not Path(path).is_dir():
        return OnnxSpeakerModel(Path(path), width)
    if path is not None:
        return SpeakerEngine.load(resolve_checkpoint(Path(path)), width)
    return SpeakerEngine.load(folder, width) if SPEAKER_VERIFIER in store.components(folder) else None


def load_speech_tokenizer(
    folder: Path, wanted: Sequence[str], other: str | os.PathLike[str] | None
) -> SpeechTokenizerEngine | None:
    """What makes codes of clips, for a model that speaks.

    Args:
      folder: the checkpoint.
      wanted: from ``choose_components``.
      other: a checkpoint that has it, or a training run's folder; None: ``folder``, if that has it.

    Raises:
      CheckpointError: if ``other`` has none, or it is damaged.
    """
    if "talker" not in wanted:
        return None
    if other is not None:
        return SpeechTokenizerEngine.load(resolve_checkpoint(Path(other)))
    return SpeechTokenizerEngine.load(folder) if SPEECH_TOKENIZER in store.components(folder) else None


def load_engines(
    folder: Path,
    config: OmniConfig,
    wanted: Sequence[str],
    number_format: NumberFormat,
    mesh: Mesh | None,
    chunk_sizes: ChunkSizes,
    solver: Solver,
    adapters: Mapping[str, Path],
) -> Engines:
    """Reads the parameters of components.

    Args:
      folder: the checkpoint.
      config: of it.
      wanted: from ``choose_components``.
      number_format: of Thinker and Talker.
      mesh: to shard the parameters over.
      chunk_sizes: how much a call computes.
      solver: of Token2Wav's flow.
      adapters: folders of adapters that requests may choose, by name.

    Raises:
      CheckpointError: if something of them is missing or damaged.
      ConfigError: if the mesh does not divide a parameter.
    """
    # of several dtypes in the checkpoint the one that holds them all
    compute_dtype = jnp.dtype(number_format.dtype or jnp.result_type(*store.components(folder)["thinker"]))
    quantization = number_format.quantization
    # slices of stacked layers are copies on a CPU; see omni_jax/layers/stack.py
    scan_layers = mesh is not None or jax.default_backend() != "cpu"
    # stacked, as they are stored and quantised
    stacked = {name: _make_model(config, name, compute_dtype, True) for name in wanted}
    shardings = None
    if mesh is not None:
        # each host reads only what its devices hold
        shardings = {name: param_shardings(_abstract_params(model), mesh) for name, model in stacked.items()}
    elif quantization is not None:
        # the device may have no room for them before they are quantised
        shardings = SingleDeviceSharding(jax.local_devices(backend="cpu")[0])
    # before the model, which takes longer
    found = read_adapters(adapters, config)
    params = store.load(folder, wanted, dtype=compute_dtype, shardings=shardings)
    if store.has_adapter(folder):
        params = merge_adapter(params, read_adapter(folder, config))
    if jax.default_backend() == "tpu":
        config = widen_config(config, 1 if mesh is None else mesh.shape["tensor"])
        stacked = {name: _make_model(config, name, compute_dtype, True) for name in wanted}
        params["thinker"] = pad_params(params["thinker"], _wider_params(stacked["thinker"], mesh))
    if quantization is not None:
        for name in stacked:
            params[name] = quantize_params(name, config, params[name], quantization)
        if mesh is None:
            params = jax.device_put(params, jax.local_devices()[0])
    if found:
        params["thinker"] = attach_table(params["thinker"], found, compute_dtype)
    if not scan_layers:
        params = unstack_layers(params)
    cache_dtype = None if number_format.kv_cache_dtype is None else jnp.dtype(number_format.kv_cache_dtype)
    models = {name: _make_model(config, name, compute_dtype, scan_layers, cache_dtype) for name in wanted}
    return make_engines(config, models, params, mesh, chunk_sizes, solver, make_table(found))


def make_thinker_engines(config: OmniConfig, params: Any, dtype: Dtype, mesh: Mesh) -> Engines:
    """Engines that understand and write, of a Thinker whose parameters are on the devices already.

    Args:
      config: of the whole model.
      params: of the Thinker, its layers stacked, in ``dtype``.
      dtype: of computation.
      mesh: over which the parameters are sharded.
    """
    if jax.default_backend() == "tpu":
        config = widen_config(config, mesh.shape["tensor"])
        params = pad_params(params, _wider_params(_make_model(config, "thinker", dtype, True), mesh))
    model = _make_model(config, "thinker", dtype, True)
    return make_engines(config, {"thinker": model}, {"thinker": params}, mesh, ChunkSizes())


def _wider_params(model: thinker.Thinker, mesh: Mesh | None) -> Any:
    boxed = thinker.abstract_params(model)
    if mesh is None:
        return nn.unbox(boxed)

    def place(leaf: Any, sharding: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree.map(place, nn.unbox(boxed), param_shardings(boxed, mesh))


def make_engines(
    config: OmniConfig,
    models: Mapping[str, Any],
    params: Mapping[str, Any],
    mesh: Mesh | None,
    chunk_sizes: ChunkSizes,
    solver: Solver = Solver(),  # noqa: B008, frozen
    adapters: AdapterTable = AdapterTable(),  # noqa: B008, frozen
) -> Engines:
    """The engines of a model's components.

    Args:
      config: of the whole model.
      models: the Linen modules, by name: thinker, and where it speaks talker and token2wav.
      params: of each.
      mesh: over which the parameters are sharded.
      chunk_sizes: how much a call computes.
      solver: of Token2Wav's flow.
      adapters: that the Thinker's parameters have beside its kernels.
    """
    speaks = "talker" in models
    thinker_engine = ThinkerEngine(
        models["thinker"],
        params["thinker"],
        mesh=mesh,
        # one program for both: a call stops at the number that it is given
        tokens_per_call=max(chunk_sizes.tokens, chunk_sizes.first_tokens),
        collect_talker_inputs=speaks,
        adapters=adapters,
    )
    talker_engine = None
    if speaks:
        talker_engine = TalkerEngine(
            models["talker"],
            params["talker"],
            config,
            thinker_engine.embed_tokens,
            mesh=mesh,
            codes_per_call=chunk_sizes.codes,
            # at least what the Thinker decodes in a call, or the Talker would fall behind
            append_width=max(APPEND_WIDTH, thinker_engine.tokens_per_call),
        )
    token2wav_engine = None
    if "token2wav" in models:
        token2wav_engine = Token2WavEngine(models["token2wav"], params["token2wav"], mesh, solver)
    # slots are sharded over these two axes, which must divide them
    slot_multiple = 1 if mesh is None else batch_shards(mesh)
    return Engines(config, chunk_sizes, thinker_engine, talker_engine, token2wav_engine, slot_multiple)


def _make_model(
    config: OmniConfig, component: str, dtype: Any, scan_layers: bool, cache_dtype: Dtype | None = None
) -> Any:
    decoder_options: dict[str, Any] = dict(
        scan_layers=scan_layers, dtype=dtype, param_dtype=dtype, cache_dtype=cache_dtype
    )
    if component == "thinker":
        return thinker.Thinker(config.thinker_config, **decoder_options)
    if component == "talker":
        return talker.Talker(config.talker_config, **decoder_options)
    # always float32, its default: errors add up over the evaluations of the flow (docs/reference.md, 10)
    return token2wav.Token2Wav(config.token2wav_config, scan_layers, token2wav.device_precision())


def _abstract_params(model: Any) -> Any:
    if isinstance(model, thinker.Thinker):
        return thinker.abstract_params(model)
    return talker.abstract_params(model) if isinstance(model, talker.Talker) else token2wav.abstract_params(model)

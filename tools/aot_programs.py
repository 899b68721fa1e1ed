"""The programs of generation with abstract arguments, laid over a mesh: what ``aot_compile.py`` has compiled."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from omni_jax.batch import AudioBlocks, Spans, VisionFrames
from omni_jax.config import OmniConfig
from omni_jax.engine import talker_programs
from omni_jax.engine.decode_state import jit_method
from omni_jax.engine.sampling import init_sampling_state, sample
from omni_jax.engine.talker_engine import TalkerEngine
from omni_jax.engine.talker_programs import NO_SLOT, TextCounters, decode_codes, suppressed_codes
from omni_jax.engine.thinker_engine import ThinkerEngine
from omni_jax.engine.thinker_programs import (
    BlockPlaces,
    ThinkerPrefix,
    ThinkerState,
    decode_text,
    prefill_blocks,
    prefill_chunk,
)
from omni_jax.engine.token2wav_engine import (
    MIN_CLIP_FRAMES,
    MIN_VOICES,
    WINDOW_NEW_FRAMES,
    encode_speakers,
    make_vocoder_weights,
    vocode_windows,
)
from omni_jax.engine.token2wav_lists import ListRequest, fill_lists, solve_blocks
from omni_jax.engine.token2wav_streaming import CodeChunk, solve_chunk, vocode_chunk, vocode_first_chunk
from omni_jax.generation.lane_padding import widen_config
from omni_jax.generation.quantization import CacheDtype, Quantization, quantize_params
from omni_jax.layers.streaming import Block
from omni_jax.models import talker, thinker, token2wav
from omni_jax.models.bigvgan import BigVGAN
from omni_jax.models.bigvgan_streaming import StreamedBigVGAN, reach
from omni_jax.models.decoder import KVCache
from omni_jax.models.dit import DiT
from omni_jax.models.dit_streaming import CarriedDiT, Speaker
from omni_jax.models.ode_solver import Solver
from omni_jax.processing.prefill_plan import AUDIO_BLOCKS, BLOCK_WIDTH, CALL_BLOCKS, VISION_WINDOWS, WIDE_CHUNK
from omni_jax.sharding import RULES, batch_shards, param_shardings

EARLY_LOOK_AHEAD = 10  # mel frames, of a first packet that looks ahead less


@dataclass(frozen=True)
class Shapes:
    """Sizes of a program of generation.

    Attributes:
      batch: slots.
      cache: positions of each.
      tokens: of a prompt's chunk.
      blocks: of 24 mel frames in a step of Token2Wav, or of a list of whole replies.
      quantization: of the linear maps of Thinker and Talker, "int8" or "int4".
      kv_cache_dtype: of their keys and values, "int8"; bfloat16 if None.
      solver: of Token2Wav's flow.
    """

    batch: int = 32
    cache: int = 8192
    tokens: int = WIDE_CHUNK
    blocks: int = 2
    quantization: Quantization | None = None
    kv_cache_dtype: CacheDtype | None = None
    solver: Solver = Solver()  # noqa: RUF009, frozen

    @property
    def cache_dtype(self) -> Any:
        """That a module is made with."""
        return None if self.kv_cache_dtype is None else jnp.dtype(self.kv_cache_dtype)


@dataclass(frozen=True)
class Program:
    """Something to compile.

    Attributes:
      function: jitted, its state donated.
      arguments: abstract, with their shardings.
      static: arguments before these, which are no arrays.
      floor: bytes that a chip must at least move, weights and cache read once; 0 where nobody has worked it out.
      shard: bytes of the largest array of the cache on a chip.
    """

    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    static: tuple[Any, ...] = ()
    floor: float = 0.0
    shard: float = 0.0


def audio_encoder(config: OmniConfig, mesh: Mesh, shapes: Shapes) -> Program:
    """Blocks of two seconds, as many as one call takes."""
    c = config.thinker_config.audio_config
    mel = np.zeros((AUDIO_BLOCKS, c.block_frames, c.num_mel_bins), np.float32)
    media = AudioBlocks(mel, np.zeros(AUDIO_BLOCKS, np.int32))
    return _encoder("audio_encoder", "encode_audio", config, mesh, media, shapes)


def vision_encoder(config: OmniConfig, mesh: Mesh, shapes: Shapes) -> Program:
    """A frame with as many windows as one call takes."""
    c = config.thinker_config.vision_config
    place = np.zeros((1, VISION_WINDOWS, (c.window_cells * c.spatial_merge_size) ** 2), np.int32)
    patches = np.zeros((*place.shape, c.patch_dim), np.float32)
    media = VisionFrames(patches, place, place, place == 0)
    return _encoder("vision_encoder", "encode_vision", config, mesh, media, shapes)


def _encoder(
    tower: str, method: str, config: OmniConfig, mesh: Mesh, media: AudioBlocks | VisionFrames, shapes: Shapes
) -> Program:
    model, params = _abstract_thinker(config, mesh, shapes)
    floor = sum(map(on_chip, jax.tree.leaves(params[tower])))
    return Program(jit_method, (params, _place_abstract(media, mesh)), (model, method), floor)


def thinker_decode(config: OmniConfig, mesh: Mesh, shapes: Shapes) -> Program:
    """A token of every slot."""
    model, params = _abstract_thinker(config, mesh, shapes)
    state: ThinkerState = jax.eval_shape(lambda: _thinker_engine(model, params).init_state(shapes.batch, shapes.cache))
    state = _place_abstract(state, mesh)
    # one step: no slot has finished, and the limit is 1
    finished = np.zeros(shapes.batch, bool)
    rest = _place_abstract((finished, np.int32(1)), mesh)
    read = _without_embedding(params["decoder"])
    return _with_floor(Program(decode_text, (params, state, *rest), (model, 1)), read, state.context.cache)


def thinker_prefill(config: OmniConfig, mesh: Mesh, shapes: Shapes) -> Program:
    """A chunk of every slot's prompt."""
    model, params = _abstract_thinker(config, mesh, shapes)
    prefix: ThinkerPrefix = jax.eval_shape(
        lambda: _thinker_engine(model, params).init_prefix(shapes.batch, shapes.cache)
    )
    prefix = _place_abstract(prefix, mesh)
    ids, spans = _chunk(shapes)
    x = jax.ShapeDtypeStruct((*ids.shape, config.thinker_config.text_config.hidden_size), model.dtype)  # [B, C, D]
    rest = _place_abstract((spans, ids == 0, x, ids == 0), mesh)
    program = Program(prefill_chunk, (params, prefix, *rest), (model,))
    return _with_floor(program, params["decoder"]["layers"], prefix.context.cache)


def thinker_blocks(config: OmniConfig, mesh: Mesh, shapes: Shapes) -> Program:
    """A call's blocks of the prompts of a batch, right into slots."""
    model, params = _abstract_thinker(config, mesh, shapes)
    state: ThinkerState = jax.eval_shape(lambda: _thinker_engine(model, params).init_state(shapes.batch, shapes.cache))
    state = _place_abstract(state, mesh)
    ids, spans = _chunk(dataclasses.replace(shapes, batch=CALL_BLOCKS[-1], tokens=BLOCK_WIDTH))
    x = jax.ShapeDtypeStruct((*ids.shape, config.thinker_config.text_config.hidden_size), model.dtype)  # [R, C, D]
    none = np.zeros(len(ids), np.int32)
    is_new = np.zeros(shapes.batch, bool)
    rest = _place_abstract((BlockPlaces(none, none), spans, ids == 0, x, ids == 0, is_new), mesh)
    program = Program(prefill_blocks, (params, state, *rest), (model,))
    # of the cache only the slots of the blocks are read
    weights = sum(map(on_chip, jax.tree.leaves(params["decoder"]["layers"])))
    cache = state.context.cache
    return dataclasses.replace(program, floor=weights, shard=max(map(on_chip, jax.tree.leaves((cache.k, cache.v)))))


def talker_prefill(config: OmniConfig, mesh: Mesh, shapes: Shapes) -> Program:
    """A chunk of every slot's prompt, which the Thinker has read."""
    model, params, engine = _abstract_talker(config, mesh, shapes)
    prefix = _place_abstract(jax.eval_shape(lambda: engine.init_prefix(shapes.batch, shapes.cache)), mesh)
    ids, spans = _chunk(shapes)
    text = jax.ShapeDtypeStruct((*ids.shape, config.talker_config.embedding_size), model.dtype)  # [B, C, E]
    rest = _place_abstract((text, spans, ids == 0), mesh)
    program = Program(talker_programs.prefill_chunk, (params, prefix, *rest), (model,))
    return _with_floor(program, {"proj": params["proj"], "layers": params["decoder"]["layers"]}, prefix.cache)


def talker_decode(config: OmniConfig, mesh: Mesh, shapes: Shapes) -> Program:
    """A code of every slot."""
    model, params, engine = _abstract_talker(config, mesh, shapes)
    state = _place_abstract(jax.eval_shape(lambda: engine.init_state(shapes.batch, shapes.cache)), mesh)
    # no slot follows one of the Thinker: all text is there
    none = np.zeros(shapes.batch, np.int32)
    thinker_slot = np.full(shapes.batch, NO_SLOT, np.int32)
    rest = (suppressed_codes(config), thinker_slot, none, none == 0, TextCounters(none, none))
    program = Program(decode_codes, (params, state, *_place_abstract(rest, mesh)), (model, 1))
    read = {"proj": params["proj"], **_without_embedding(params["decoder"])}
    return _with_floor(program, read, state.context.cache)


def sampler(config: OmniConfig, mesh: Mesh, shapes: Shapes) -> Program:
    """The choice of a token of every slot from its logits."""
    vocab_size = config.thinker_config.text_config.vocab_size
    logits = np.zeros((shapes.batch, vocab_size), np.float32)
    state = init_sampling_state(shapes.batch, vocab_size)
    return Program(jax.jit(sample), _place_abstract((logits, state, np.ones(shapes.batch, bool)), mesh))


def speaker_encoder(config: OmniConfig, mesh: Mesh, shapes: Shapes) -> Program:
    """The clip of a voice, padded to the least length that programs are compiled for."""
    dit, params = _abstract_dit(config, mesh)
    clip = np.zeros((1, MIN_CLIP_FRAMES, dit.config.mel_dim), np.float32)
    return Program(encode_speakers, (params, *_place_abstract((clip, np.zeros(1, np.int32)), mesh)), (dit,))


def dit_list(config: OmniConfig, mesh: Mesh, shapes: Shapes) -> Program:
    """Mel of whole replies, in one list of blocks for each shard of the batch."""
    dit, params = _abstract_dit(config, mesh)
    c = dit.config
    codes = np.zeros(shapes.blocks * c.block_size // c.repeats, np.int32)
    num_lists = batch_shards(mesh)
    requests = [ListRequest(codes, 0, None, 0)] * num_lists
    speech, _ = fill_lists(c, requests, num_lists, lambda blocks: blocks)
    speakers = np.zeros((MIN_VOICES, 2, c.enc_dim), np.float32)
    cond = np.zeros((MIN_VOICES, c.enc_emb_dim), np.float32)
    return Program(solve_blocks, (params, *_place_abstract((speech, speakers, cond), mesh)), (dit, shapes.solver))


def dit_first(config: OmniConfig, mesh: Mesh, shapes: Shapes) -> Program:
    """``dit_block`` of rows that begin."""
    program = dit_block(config, mesh, shapes)
    return dataclasses.replace(program, static=(program.static[0], True))


def dit_block(config: OmniConfig, mesh: Mesh, shapes: Shapes) -> Program:
    """Blocks of mel for every row, all evaluations of the solver, with the past carried."""
    dit, params = _abstract_dit(config, mesh)
    part = CarriedDiT(dit, shapes.solver)
    c = config.token2wav_config.dit_config
    num_rows = shapes.batch
    num_frames = shapes.blocks * c.block_size
    codes = np.zeros((num_rows, num_frames // c.repeats), np.int32)  # [B, K]
    none = np.zeros(num_rows, np.int32)
    chunk = CodeChunk(
        codes=codes,
        valid=codes == 0,
        active=none == 0,
        block_index=none,
        seed=none.astype(np.uint32),
        draws=none == 0,
        noise=np.zeros((num_rows, num_frames, c.mel_dim), np.float32),
    )
    rows = np.zeros((num_rows, 2, c.enc_dim), np.float32)  # of the speaker encoder, with and without condition
    speaker = Speaker(rows, np.zeros((num_rows, c.enc_emb_dim), np.float32))
    state = jax.eval_shape(lambda: part.init_state(num_rows))
    return Program(solve_chunk, (params, *_place_abstract((state, chunk, speaker), mesh)), (part, False))


def vocoder_block(config: OmniConfig, mesh: Mesh, shapes: Shapes) -> Program:
    """The samples of blocks of mel for every row."""
    part, arguments = _vocoder_chunk(config, mesh, shapes)
    return Program(vocode_chunk, arguments, (part,))


def vocoder_first(config: OmniConfig, mesh: Mesh, shapes: Shapes) -> Program:
    """The samples of the first mel of every row; where it is too short for any, with a shorter look-ahead."""
    part, arguments = _vocoder_chunk(config, mesh, shapes)
    num_frames = shapes.blocks * config.token2wav_config.dit_config.block_size
    look_ahead = part.streaming.look_ahead
    if num_frames <= look_ahead:
        look_ahead = EARLY_LOOK_AHEAD
    return Program(vocode_first_chunk, arguments, (part, look_ahead))


def _vocoder_chunk(config: OmniConfig, mesh: Mesh, shapes: Shapes) -> tuple[StreamedBigVGAN, tuple[Any, ...]]:
    """The vocoder as a part that streams, and the arguments of a step of it."""
    bigvgan, weights = _abstract_vocoder(config, mesh)
    part = StreamedBigVGAN(bigvgan.config)
    c = config.token2wav_config.dit_config
    mel = np.zeros((shapes.batch, shapes.blocks * c.block_size, c.mel_dim), np.float32)
    state = jax.eval_shape(lambda: part.init_state(shapes.batch))
    rest = (state, Block(mel, mel[..., 0] == 0), np.zeros(shapes.batch, bool))
    return part, (weights, *_place_abstract(rest, mesh))


def vocoder_windows(num_new_frames: int, config: OmniConfig, mesh: Mesh, shapes: Shapes) -> Program:
    """The samples of windows of whole replies, one on each chip."""
    bigvgan, weights = _abstract_vocoder(config, mesh)
    frames = num_new_frames + sum(reach(bigvgan.config))
    mel = np.zeros((mesh.size, frames, config.token2wav_config.dit_config.mel_dim), np.float32)
    everywhere = NamedSharding(mesh, PartitionSpec())
    rest = []
    for array in (mel, np.zeros(mesh.size, np.int32)):
        rest.append(jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=everywhere))
    return Program(vocode_windows, (weights, *rest), (bigvgan.config,))


PROGRAMS: dict[str, Callable[[OmniConfig, Mesh, Shapes], Program]] = {
    "audio-encoder": audio_encoder,
    "vision-encoder": vision_encoder,
    "thinker-prefill": thinker_prefill,
    "thinker-decode": thinker_decode,
    "thinker-blocks": thinker_blocks,
    "talker-prefill": talker_prefill,
    "talker-decode": talker_decode,
    "sampler": sampler,
    "speaker-encoder": speaker_encoder,
    "dit-list": dit_list,
    "dit-first": dit_first,
    "dit-block": dit_block,
    "vocoder-block": vocoder_block,
    "vocoder-first": vocoder_first,
    **{f"vocoder-window-{frames}": functools.partial(vocoder_windows, frames) for frames in WINDOW_NEW_FRAMES},
}


def serving_params(config: OmniConfig, mesh: Mesh, shapes: Shapes) -> list[Any]:
    """Abstract parameters of all that a model that speaks keeps on its devices."""
    _, of_thinker = _abstract_thinker(config, mesh, shapes)
    _, of_talker, _ = _abstract_talker(config, mesh, shapes)
    return [of_thinker, of_talker, _abstract_dit(config, mesh)[1], _abstract_vocoder(config, mesh)[1]]


def _abstract_thinker(config: OmniConfig, mesh: Mesh, shapes: Shapes) -> tuple[thinker.Thinker, Any]:
    # as it is loaded for a TPU
    thinker_config = widen_config(config, mesh.shape["tensor"]).thinker_config
    dtypes: dict[str, Any] = dict(dtype=jnp.bfloat16, param_dtype=jnp.bfloat16, cache_dtype=shapes.cache_dtype)
    model = thinker.Thinker(thinker_config, **dtypes)
    params = _place_params(thinker.abstract_params(model), mesh)
    if shapes.quantization is not None:
        params = quantize_params("thinker", config, params, shapes.quantization)
    return model, params


def _chunk(shapes: Shapes) -> tuple[np.ndarray, Spans]:
    """Ids of a chunk of every slot's prompt, and the spans of their positions, as wide as generation has them."""
    ids = np.zeros((shapes.batch, shapes.tokens), np.int32)  # [B, C]
    return ids, Spans(ids, ids, ids, ids, ids, ids.astype(np.float32))


def _abstract_talker(config: OmniConfig, mesh: Mesh, shapes: Shapes) -> tuple[talker.Talker, Any, TalkerEngine]:
    dtypes: dict[str, Any] = dict(dtype=jnp.bfloat16, param_dtype=jnp.bfloat16, cache_dtype=shapes.cache_dtype)
    model = talker.Talker(config.talker_config, **dtypes)
    params = _place_params(talker.abstract_params(model), mesh)
    if shapes.quantization is not None:
        params = quantize_params("talker", config, params, shapes.quantization)
    # a state needs no embeddings of text
    return model, params, TalkerEngine(model, params, config, jnp.zeros_like)


def _abstract_dit(config: OmniConfig, mesh: Mesh) -> tuple[DiT, Any]:
    model = token2wav.Token2Wav(config.token2wav_config, precision="high")  # as it is served on a TPU
    return token2wav.parts(model)[0], _place_params(token2wav.abstract_params(model), mesh)["dit"]


def _abstract_vocoder(config: OmniConfig, mesh: Mesh) -> tuple[BigVGAN, Any]:
    model = token2wav.Token2Wav(config.token2wav_config, precision="high")  # as it is served on a TPU
    bigvgan = token2wav.parts(model)[1]
    boxed = token2wav.abstract_params(model)["bigvgan"]
    weights = jax.eval_shape(lambda params: make_vocoder_weights(bigvgan, params), nn.unbox(boxed))
    everywhere = NamedSharding(mesh, PartitionSpec())
    return bigvgan, jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=everywhere), weights)


def _thinker_engine(model: thinker.Thinker, params: Any) -> ThinkerEngine:
    return ThinkerEngine(model, params, collect_talker_inputs=True)


def _without_embedding(decoder: Any) -> Any:
    """What a step reads of a decoder's parameters: of its embeddings only a few rows."""
    return {name: tree for name, tree in decoder.items() if name != "embed"}


def _place_params(boxed: Any, mesh: Mesh) -> Any:
    def place(leaf: Any, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree.map(place, nn.unbox(boxed), param_shardings(boxed, mesh))


def _place_abstract(tree: Any, mesh: Mesh) -> Any:
    """Arrays as shapes, sharded as those of a running state: caches over batch and heads, the rest over batch."""

    def place(path: tuple[Any, ...], leaf: Any) -> jax.ShapeDtypeStruct:
        # a cache is [L, B, K, capacity, H]; of the rest, floats are sharded over slots and counters are not
        names: list[str | None] = [None] * leaf.ndim
        if leaf.ndim == 5 and any(getattr(key, "name", "") == "cache" for key in path):
            names = [None, "batch", "kv_heads", None, None]
        elif leaf.ndim >= 2 and leaf.dtype in (jnp.bfloat16, jnp.float32):
            names[0] = "batch"
        spec = []
        # an axis that the mesh does not divide lies in full on every chip, as ``sharding.constrain`` has it
        for name, size in zip(names, leaf.shape, strict=True):
            spec.append(RULES[name] if name and _divides(mesh, name, size) else None)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, PartitionSpec(*spec)))

    return jax.tree_util.tree_map_with_path(place, tree)


def _divides(mesh: Mesh, name: str, size: int) -> bool:
    return size % int(np.prod([mesh.shape[axis] for axis in RULES[name]])) == 0


def _with_floor(program: Program, read: Any, cache: KVCache) -> Program:
    """With what a step must move on a chip: the parameters that it reads, and the cache, once."""
    arrays = [on_chip(array) for array in jax.tree.leaves((cache.k, cache.v))]
    floor = sum(map(on_chip, jax.tree.leaves(read))) + sum(arrays)
    return dataclasses.replace(program, floor=floor, shard=max(arrays))


def on_chip(leaf: Any) -> float:
    """Bytes of an abstract array on one chip."""
    # two numbers of 4 bits lie in a byte
    itemsize = 0.5 if leaf.dtype == jnp.int4 else leaf.dtype.itemsize
    return float(np.prod(leaf.sharding.shard_shape(leaf.shape))) * itemsize

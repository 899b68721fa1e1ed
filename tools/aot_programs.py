"""The programs of generation with abstract arguments, laid over a mesh: what ``aot_compile.py`` has compiled."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from omni_jax.batch import Spans
from omni_jax.config import OmniConfig
from omni_jax.engine import talker_engine as speech
from omni_jax.engine import thinker_engine as text
from omni_jax.engine.sampling import SamplingParams, SamplingState
from omni_jax.engine.token2wav_streaming import Feed, solve_step
from omni_jax.layers.streaming import Block
from omni_jax.models import talker, thinker, token2wav
from omni_jax.models.bigvgan_streaming import StreamedBigVGAN
from omni_jax.models.decoder import KVCache
from omni_jax.models.dit_streaming import CarriedDiT, Speaker
from omni_jax.processing.prefill_plan import WIDE, Chunk
from omni_jax.sharding import RULES, param_shardings


@dataclass(frozen=True)
class Shapes:
    """Sizes of a program of generation.

    Attributes:
      batch: rows.
      cache: slots of each.
      blocks: of 24 mel frames in a step of Token2Wav.
    """

    batch: int = 32
    cache: int = 8192
    blocks: int = 2


@dataclass(frozen=True)
class Program:
    """Something to compile.

    Attributes:
      function: jitted, its state donated.
      arguments: abstract, with their shardings.
      floor: bytes that a chip must at least move, weights and cache read once; 0 where nobody has worked it out.
      shard: bytes of the largest array of the cache on a chip.
    """

    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    floor: float = 0.0
    shard: float = 0.0


def thinker_decode(config: OmniConfig, mesh: Mesh, shapes: Shapes) -> Program:
    """A word of every row."""
    model, params = _thinker(config, mesh)
    state = _text_state(model, mesh, shapes)
    over = _abstract(jax.ShapeDtypeStruct((shapes.batch,), jnp.bool_), mesh)
    steps = _abstract(jax.ShapeDtypeStruct((), jnp.int32), mesh)
    function = jax.jit(functools.partial(text.decode_text, model, 1), donate_argnums=1)
    read = {k: v for k, v in params["decoder"].items() if k != "embed"}
    return _with_cache(Program(function, (params, state, over, steps)), read, state.cache)


def thinker_prefill(config: OmniConfig, mesh: Mesh, shapes: Shapes) -> Program:
    """A chunk of every row's prompt."""
    model, params = _thinker(config, mesh)
    state, wide = _text_state(model, mesh, shapes), (shapes.batch, WIDE)
    ids = np.zeros(wide, np.int32)
    chunk = Chunk(ids, ids == 0, Spans(ids, ids, ids, ids, ids, ids.astype(np.float32)))
    x = jax.ShapeDtypeStruct((*wide, config.thinker_config.text_config.hidden_size), model.dtype)
    function = jax.jit(functools.partial(text.read_chunk, model), donate_argnums=1)
    given = _abstract((chunk, x, ids == 0), mesh)
    return _with_cache(Program(function, (params, state, *given)), params["decoder"]["layers"], state.cache)


def talker_decode(config: OmniConfig, mesh: Mesh, shapes: Shapes) -> Program:
    """A code of every row."""
    c = config.talker_config
    model = talker.Talker(c, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    params = _params(talker.abstract_params(model), mesh)
    hidden, cache, marks = jax.eval_shape(lambda: speech.empty_rows(model, shapes.batch, shapes.cache))
    suppressed = speech.suppressed_codes(config)
    sampling = _sampling(shapes.batch, c.vocab_size, suppressed)
    number = np.zeros(shapes.batch, np.int32)
    state = _abstract(speech.SpeechState(hidden, number, cache, sampling, number, marks), mesh)
    shares = _abstract(jax.ShapeDtypeStruct((shapes.batch, 1, c.embedding_size), model.dtype), mesh)
    function = jax.jit(functools.partial(speech.decode_codes, model), donate_argnums=1)
    given = (params, state, shares, _abstract(number, mesh))
    read = {"proj": params["proj"], **{k: v for k, v in params["decoder"].items() if k != "embed"}}
    return _with_cache(Program(function, given), read, state.cache)


def dit_block(config: OmniConfig, mesh: Mesh, shapes: Shapes) -> Program:
    """Blocks of mel for every row, all evaluations of the solver, with the past carried."""
    model = token2wav.Token2Wav(config.token2wav_config)
    params = _params(token2wav.abstract_params(model), mesh)["dit"]
    c, rows = config.token2wav_config.dit_config, shapes.batch
    part = CarriedDiT(token2wav.parts(model)[0])
    frames = shapes.blocks * c.block_size
    codes = np.zeros((rows, frames // c.repeats), np.int32)
    number, noise = np.zeros(rows, np.int32), np.zeros((rows, frames, c.mel_dim), np.float32)
    feed = Feed(codes, codes == 0, number == 0, number, number.astype(np.uint32), number == 0, noise)
    speaker = Speaker(np.zeros((rows, 2, c.enc_dim), np.float32), np.zeros((rows, c.enc_emb_dim), np.float32))
    state = jax.eval_shape(lambda: part.init_state(rows))
    function = jax.jit(functools.partial(solve_step, part), donate_argnums=1)
    return Program(function, (params, *_abstract((state, feed, speaker), mesh)))


def vocoder_block(config: OmniConfig, mesh: Mesh, shapes: Shapes) -> Program:
    """The samples of blocks of mel for every row."""
    model = token2wav.Token2Wav(config.token2wav_config)
    params = _params(token2wav.abstract_params(model), mesh)["bigvgan"]
    part = StreamedBigVGAN(token2wav.parts(model)[1])
    c, rows = config.token2wav_config.dit_config, shapes.batch
    mel = np.zeros((rows, shapes.blocks * c.block_size, c.mel_dim), np.float32)
    state = jax.eval_shape(lambda: part.init_state(rows))
    given = _abstract((state, Block(mel, mel[..., 0] == 0), np.zeros(rows, bool)), mesh)
    return Program(jax.jit(part.step, donate_argnums=1), (params, *given))


PROGRAMS: dict[str, Callable[[OmniConfig, Mesh, Shapes], Program]] = {
    "thinker-prefill": thinker_prefill,
    "thinker-decode": thinker_decode,
    "talker-decode": talker_decode,
    "dit-block": dit_block,
    "vocoder-block": vocoder_block,
}


def _thinker(config: OmniConfig, mesh: Mesh) -> tuple[thinker.Thinker, Any]:
    model = thinker.Thinker(config.thinker_config, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    return model, _params(thinker.abstract_params(model), mesh)


def _text_state(model: thinker.Thinker, mesh: Mesh, shapes: Shapes) -> text.TextState:
    rows = shapes.batch
    hidden, cache, heard = jax.eval_shape(lambda: text.empty_rows(model, True, rows, shapes.cache))
    number, stop = np.zeros(rows, np.int32), np.zeros((rows, 8), np.int32)
    sampling = _sampling(rows, model.config.text_config.vocab_size, None)
    return _abstract(text.TextState(hidden, number, cache, sampling, number, stop, heard), mesh)


def _sampling(rows: int, vocab: int, suppressed: np.ndarray | None) -> SamplingState:
    return SamplingState.create([SamplingParams()] * rows, [np.zeros(0, np.int32)] * rows, vocab, suppressed)


def _params(boxed: Any, mesh: Mesh) -> Any:
    def one(leaf: Any, place: NamedSharding) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)

    return jax.tree.map(one, nn.unbox(boxed), param_shardings(boxed, mesh))


def _abstract(tree: Any, mesh: Mesh) -> Any:
    """Arrays as shapes, laid where a running state has them: caches over batch and heads, rows over batch."""

    def one(path: tuple[Any, ...], leaf: Any) -> jax.ShapeDtypeStruct:
        names: list[str | None] = [None] * leaf.ndim
        if leaf.ndim == 5 and any(getattr(key, "name", "") == "cache" for key in path):
            names = [None, "batch", "kv_heads", None, None]
        elif leaf.ndim >= 2 and leaf.dtype in (jnp.bfloat16, jnp.float32):
            names[0] = "batch"
        sizes = zip(names, leaf.shape, strict=True)
        spec = [RULES[name] if name and _divides(mesh, name, size) else None for name, size in sizes]
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, PartitionSpec(*spec)))

    return jax.tree_util.tree_map_with_path(one, tree)


def _divides(mesh: Mesh, name: str, size: int) -> bool:
    return size % int(np.prod([mesh.shape[axis] for axis in RULES[name]])) == 0


def _with_cache(program: Program, read: Any, cache: KVCache) -> Program:
    """With what a step must move on a chip: these weights and the cache, once."""
    arrays = jax.tree.leaves((cache.k, cache.v))
    floor = sum(map(on_chip, jax.tree.leaves(read))) + sum(map(on_chip, arrays))
    return Program(program.function, program.arguments, floor, max(map(on_chip, arrays)))


def on_chip(leaf: Any) -> float:
    """Bytes of an abstract array on one chip."""
    return float(np.prod(leaf.sharding.shard_shape(leaf.shape))) * leaf.dtype.itemsize

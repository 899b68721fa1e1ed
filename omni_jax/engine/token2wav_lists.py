"""Lists of blocks: the codes of many whole replies, made to mel in one call.

Over a mesh each shard of the batch has a list of its own, with whole replies in it, so that no block looks at one on
another device. The lists stand one behind the other in one array, and places in them count from their own beginning.

Letters: N blocks of all lists, F frames of a block, V voices, K codes of a request.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Bool, Float, Int, UInt32

from omni_jax.batch import Array
from omni_jax.config import DiTConfig
from omni_jax.engine.decode_state import apply_method
from omni_jax.models.dit import DiT
from omni_jax.models.dit_blocks import Blocks, pack
from omni_jax.models.flow_matching import draw_noise, solve
from omni_jax.models.ode_solver import Solver
from omni_jax.sharding import map_over_batch, replicate

MIN_LIST = 4  # blocks
SHORT_LIST = 16  # blocks
MEDIUM_LIST = 32  # blocks

Noise = Float[np.ndarray, "frames mel"]


@struct.dataclass
class SpeechBlocks:
    """The blocks of all requests of a call."""

    blocks: Blocks
    codes: Int[Array, "N F"]
    voice: Int[Array, " N"]  # index into the voices of the call
    seed: UInt32[Array, " N"]  # of the request's noise
    draws: Bool[Array, " N"]  # False where ``noise`` is given
    noise: Float[Array, "N F mel"]


@dataclass(frozen=True)
class ListRequest:
    """A whole reply.

    Attributes:
      codes: without the Talker's own begin and end.
      voice: index into the voices of the call.
      noise: what the flow starts from, standard normal [K * repeats, mel_dim]; drawn where None.
      seed: of the draws.
    """

    codes: Int[np.ndarray, " K"]
    voice: int
    noise: Noise | None
    seed: int


def round_num_blocks(num_blocks: int, block_sizes: Sequence[int] = ()) -> int:
    """The length of a list: the first of ``block_sizes`` that suffices, else the next with few significant bits.

    Few lengths, for each is a program; and few more blocks than there are, for each costs as much as a real one. A list
    of less than four seconds of sound has any length from ``MIN_LIST``, for somebody may be waiting for it. One of less
    than eight has three significant bits, and a longer one two.
    """
    for size in block_sizes:
        if size >= num_blocks:
            return size
    if num_blocks <= SHORT_LIST:
        return max(MIN_LIST, num_blocks)
    num_bits = 3 if num_blocks <= MEDIUM_LIST else 2
    step = 1 << ((num_blocks - 1).bit_length() - num_bits)
    return -(-num_blocks // step) * step


def list_lengths(max_blocks: int, block_sizes: Sequence[int] = ()) -> list[int]:
    """All lengths that ``round_num_blocks`` gives up to ``max_blocks``."""
    lengths = [round_num_blocks(1, block_sizes)]
    while lengths[-1] < max_blocks:
        lengths.append(round_num_blocks(lengths[-1] + 1, block_sizes))
    return lengths


def assign_lists(num_blocks: Sequence[int], num_lists: int) -> list[list[int]]:
    """Which requests stand in each list: the longest first, each in the list that is shortest so far.

    Args:
      num_blocks: of each request.
      num_lists: as many as the mesh has shards of the batch.
    """
    lists: list[list[int]] = [[] for _ in range(num_lists)]
    lengths = [0] * num_lists
    # of equally long ones the first comes first, so that equal requests are laid out alike
    for request in sorted(range(len(num_blocks)), key=lambda i: -num_blocks[i]):
        shortest = lengths.index(min(lengths))
        lists[shortest].append(request)
        lengths[shortest] += num_blocks[request]
    return lists


def longest_list(num_blocks: Sequence[int], num_lists: int) -> int:
    """Blocks of the longest of the lists that ``assign_lists`` makes."""
    return max(sum(num_blocks[i] for i in members) for members in assign_lists(num_blocks, num_lists))


def fill_lists(
    config: DiTConfig, requests: Sequence[ListRequest], num_lists: int, round_up: Callable[[int], int]
) -> tuple[SpeechBlocks, list[slice]]:
    """Lays out the blocks of all requests.

    Args:
      config: of the DiT.
      requests: at least one.
      num_lists: of equal length.
      round_up: the length of a list from the blocks that the longest must hold.

    Returns:
      The blocks, and each request's place among them.
    """
    num_frames = [len(request.codes) * config.repeats for request in requests]
    num_blocks = [-(-frames // config.block_size) for frames in num_frames]
    lists = assign_lists(num_blocks, num_lists)
    length = round_up(longest_list(num_blocks, num_lists))
    packed = []
    places = [slice(0)] * len(requests)
    for number, members in enumerate(lists):
        blocks, parts = pack([num_frames[i] for i in members], config.block_size, length)
        packed.append(blocks)
        for i, part in zip(members, parts, strict=True):
            places[i] = slice(number * length + part.start, number * length + part.stop)
    speech = _without_requests(config, jax.tree.map(lambda *arrays: np.concatenate(arrays), *packed))
    for request, place, frames in zip(requests, places, num_frames, strict=True):
        # blocks lie one behind the other, so each reshape below is a view, and writing to it fills them
        speech.codes[place].reshape(-1)[:frames] = np.repeat(request.codes, config.repeats)
        speech.voice[place] = request.voice
        speech.seed[place] = request.seed
        if request.noise is not None:
            speech.draws[place] = False
            speech.noise[place].reshape(-1, config.mel_dim)[:frames] = request.noise
    return speech, places


def empty_lists(config: DiTConfig, num_lists: int, length: int) -> SpeechBlocks:
    """Lists of that length without a request."""
    blocks, _ = pack([], config.block_size, num_lists * length)
    return _without_requests(config, blocks)


def _without_requests(config: DiTConfig, blocks: Blocks) -> SpeechBlocks:
    num_blocks, block_size = blocks.valid.shape
    return SpeechBlocks(
        blocks=blocks,
        codes=np.zeros((num_blocks, block_size), np.int32),
        voice=np.zeros(num_blocks, np.int32),
        seed=np.zeros(num_blocks, np.uint32),
        draws=np.ones(num_blocks, bool),
        noise=np.zeros((num_blocks, block_size, config.mel_dim), np.float32),
    )


@functools.partial(jax.jit, static_argnums=(0, 1))
def solve_blocks(
    dit: DiT,
    solver: Solver,
    params: Any,
    speech: SpeechBlocks,
    speakers: Float[Array, "V 2 enc_dim"],
    cond: Float[Array, "V enc_emb_dim"],
) -> Float[jax.Array, "N F mel"]:
    """From noise to mel, each shard of the batch its own list. One without a request costs nothing.

    Args:
      dit, params: the DiT.
      solver: of the flow.
      speech: the blocks of all requests.
      speakers: of each voice.
      cond: likewise.
    """
    mel = map_over_batch(functools.partial(_solve_list, dit, solver), (params, speakers, cond), speech)
    return replicate(mel)


def _solve_list(
    dit: DiT, solver: Solver, shared: tuple[Any, Array, Array], speech: SpeechBlocks
) -> Float[jax.Array, "N F mel"]:
    def solve_requests() -> jax.Array:
        return _solve_requests(dit, solver, shared, speech)

    return jax.lax.cond(jnp.any(speech.blocks.valid), solve_requests, lambda: jnp.zeros(speech.noise.shape))


def _solve_requests(dit: DiT, solver: Solver, shared: tuple[Any, Array, Array], speech: SpeechBlocks) -> jax.Array:
    params, speakers, cond = shared
    # drawn even where noise is given, so that both are one program
    drawn = draw_noise(speech.seed, speech.blocks.index, speech.noise.shape[1:])  # [N, F, mel]
    noise = jnp.where(jnp.asarray(speech.draws)[:, None, None], drawn, speech.noise)  # [N, F, mel]
    voice = jnp.asarray(speech.voice)
    inputs = (speech.codes, jnp.asarray(speakers)[voice], jnp.asarray(cond)[voice], solver.guidance)
    conditions = apply_method(dit, "conditions", params, *inputs)
    mel, _ = solve(dit, params, noise, conditions, speech.blocks, solver=solver)
    return mel

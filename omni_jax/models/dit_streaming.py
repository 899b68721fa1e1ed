"""Codes to mel by blocks, as they come: the flow of ``models/flow_matching.py``, solved block after block.

The offline solve cannot be streamed: with each of its evaluations a frame depends on one more block ahead. The paper
(section 2.4) lets a block see two blocks back and one ahead, and no further. Here each block is solved once for good,
and once before that as the look-ahead of the block before it. Where it looks back, it looks at the keys and values that
the block before it had in the same evaluation, when that one was solved for good. So all that came before has its part
in a block, as in the offline solve, and a block costs two blocks.

The blocks of all rows are one list for the DiT (``models/dit.py``).

Letters: B rows, T codes, N blocks of a row, F frames of a block, M mel bins, E evaluations, S layers that look back.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Bool, Float, Int

from omni_jax.batch import Array
from omni_jax.config import DiTConfig
from omni_jax.layers.streaming import Block, Streaming, keep_rows
from omni_jax.models.dit import DiT, DiTCache
from omni_jax.models.dit_blocks import NO_BLOCK, Blocks, CachedBlocks
from omni_jax.models.flow_matching import solve
from omni_jax.models.ode_solver import Solver

CODE_SECONDS = 0.02


@struct.dataclass
class NoisyCodes:
    """The input units: codes, and the noise that the flow starts from in each one's frames."""

    codes: Int[Array, "B T"]
    noise: Float[Array, "B T repeats M"]


@struct.dataclass
class Speaker:
    """What the input has beside its units: the voice of each row."""

    rows: Float[Array, "B 2 enc_dim"]  # from DiT.speakers
    cond: Float[Array, "B enc_emb_dim"]


@struct.dataclass
class FrameBlocks:
    """Some blocks of each row, not solved yet."""

    codes: Int[Array, "B N F"]
    noise: Float[Array, "B N F M"]
    valid: Bool[Array, "B N F"]


@struct.dataclass
class CarriedState:
    """What a step leaves to the next."""

    index: Int[Array, " B"]  # of the next block in its row
    pending: FrameBlocks  # the block before it, which waits for its look-ahead; N is 1
    solved_valid: Bool[Array, "B F"]  # which frames are real of the block before that one, the last solved for good
    cache: DiTCache  # of that block: [B, E, S, halves, F, heads, H]


@dataclass(frozen=True)
class CarriedDiT:
    """The flow as a part that streams: from ``NoisyCodes`` and ``Speaker`` to mel [B, T * repeats, M]."""

    dit: DiT
    solver: Solver = Solver()  # noqa: RUF009, frozen

    @property
    def streaming(self) -> Streaming:
        c = self.dit.config
        codes = c.block_size // c.repeats
        return Streaming(CODE_SECONDS, block=codes, look_ahead=codes, look_back=None, outputs=c.repeats)

    def apply_sequence(self, params: Any, x: Block) -> Block:
        """All blocks at once: one step from the beginning, with a block of padding after the end."""
        c = self.dit.config
        length = x.valid.shape[1]
        block = self.streaming.block
        # up to whole blocks, and one more for the last of them to look ahead to
        padding = -length % block + block

        def pad_units(a: Array) -> jax.Array:
            return jnp.pad(a, ((0, 0), (0, padding), *[(0, 0)] * (jnp.ndim(a) - 2)))

        padded = Block(jax.tree.map(pad_units, x.values), pad_units(x.valid), x.row)
        output, _ = self.step(params, self.init_state(len(x.valid)), padded)
        # a step's output comes one block late
        kept = slice(c.block_size, c.block_size + length * c.repeats)
        return Block(output.values[:, kept], output.valid[:, kept])

    def init_state(self, batch: int) -> CarriedState:
        """The state of ``batch`` rows before their first block."""
        c = self.dit.config
        # a small configuration may have fewer layers than these indices name
        layers = len({i for i in c.look_backward_layers if i < c.num_hidden_layers})
        evaluations = (batch, self.solver.num_evaluations, layers, self.solver.num_halves)
        cache = (*evaluations, c.block_size, c.num_attention_heads, c.head_dim)
        frames = (batch, 1, c.block_size)
        return CarriedState(
            index=jnp.zeros(batch, jnp.int32),
            # no frame of the pending block is valid, so no output comes of it
            pending=FrameBlocks(
                codes=jnp.zeros(frames, jnp.int32),
                noise=jnp.zeros((*frames, c.mel_dim)),
                valid=jnp.zeros(frames, bool),
            ),
            solved_valid=jnp.zeros((batch, c.block_size), bool),
            cache=DiTCache(jnp.zeros(cache, self.dit.dtype), jnp.zeros(cache, self.dit.dtype)),
        )

    def step(
        self, params: Any, state: CarriedState, block: Block, active: Bool[Array, " B"] | None = None
    ) -> tuple[Block, CarriedState]:
        """Solves the pending block and all new ones but the last for good, each beside a copy of the block after it.

        All of them go through each evaluation together, so a block looks back at what the block before it is there.
        """
        new = _to_frame_blocks(self.dit.config, block)
        # [B, 1 + new, ...]: the pending block, and those that came now
        known = jax.tree.map(lambda a, b: jnp.concatenate([a, b], axis=1), state.pending, new)
        return self._solve_known(params, state, known, block.row, active, first_index=state.index - 1)

    def first_step(
        self, params: Any, state: CarriedState, block: Block, active: Bool[Array, " B"] | None = None
    ) -> tuple[Block, CarriedState]:
        """``step`` of rows that begin, without the pending block, which there is not: its output is one block shorter.

        ``block`` has two blocks of codes at least.
        """
        known = _to_frame_blocks(self.dit.config, block)
        return self._solve_known(params, state, known, block.row, active, first_index=state.index)

    def _solve_known(
        self,
        params: Any,
        state: CarriedState,
        known: FrameBlocks,
        speaker: Speaker,
        active: Bool[Array, " B"] | None,
        *,
        first_index: Int[Array, " B"],
    ) -> tuple[Block, CarriedState]:
        """Solves all blocks of ``known`` but the last; the first of them has the index ``first_index`` in its row."""
        count = known.valid.shape[1] - 1  # blocks to solve for good
        # [B, 2 * count, ...]: the blocks to solve for good, then the look-ahead of each
        shown = np.concatenate([np.arange(count), np.arange(1, count + 1)])
        frames = jax.tree.map(lambda a: a[:, shown], known)
        cached = CachedBlocks(state.solved_valid, _next_cached(len(first_index), count, active))
        blocks = _list_blocks(frames, first_index[:, None] + shown, cached)
        mel, cache = _solve_frames(self, params, frames, blocks, speaker, state.cache)
        assert cache is not None
        # the newest block is pending now
        # the cache of rows that are not active has been kept in place already, or a second one would be made here
        index, pending, solved_valid = keep_rows(
            active,
            (first_index + count + 1, jax.tree.map(lambda a: a[:, count:], known), known.valid[:, count - 1]),
            (state.index, state.pending, state.solved_valid),
        )
        output = _to_output(mel[:, :count], known.valid[:, :count], active)
        return output, CarriedState(index, pending, solved_valid, cache)


def _to_frame_blocks(config: DiTConfig, block: Block) -> FrameBlocks:
    """Codes repeated to frames and cut into blocks; zeros where they are not valid."""
    valid = jnp.asarray(block.valid)  # [B, T]
    shape = (len(valid), -1, config.block_size)
    # whatever stands where nothing is valid, it must not reach a product
    codes = jnp.where(valid, block.values.codes, 0)
    noise = jnp.where(valid[..., None, None], block.values.noise, 0)  # [B, T, repeats, M]
    codes = jnp.repeat(codes, config.repeats, axis=1).reshape(shape)  # [B, N, F]
    valid = jnp.repeat(valid, config.repeats, axis=1).reshape(shape)
    return FrameBlocks(codes, noise.reshape(*valid.shape, config.mel_dim), valid)


def _next_cached(batch: int, count: int, active: Bool[Array, " B"] | None) -> Int[Array, " B"]:
    """Which block of the list each row's cache is of after the call: the last that is solved for good."""
    # row by row: its blocks to solve for good, then the copies that they look ahead to
    last = 2 * count * np.arange(batch) + count - 1
    # a row that is not active keeps the block that it had, which stands behind the list
    return last if active is None else jnp.where(active, last, 2 * count * batch + np.arange(batch))


def _list_blocks(frames: FrameBlocks, index: Int[Array, "B N"], cached: CachedBlocks) -> Blocks:
    """Who stands before and after whom, in the list of all rows' blocks for good and their look-ahead copies."""
    batch, num_blocks = index.shape
    count = num_blocks // 2
    places = np.arange(batch * num_blocks).reshape(batch, 2, count)
    final = places[:, 0]  # [B, count]
    ahead = places[:, 1]
    # both look back at what was solved for good: the first block at the cache, the copies at the one they follow
    before_first = places.size + np.arange(batch)  # [B]
    before_final = np.concatenate([before_first[:, None], final[:, :-1]], axis=1)
    before = np.stack([before_final, final], axis=1)  # [B, 2, count]
    # a copy looks ahead to nothing: nobody asks for its own mel
    after = np.stack([ahead, np.full_like(ahead, NO_BLOCK)], axis=1)
    return Blocks(
        index=index.reshape(-1),
        valid=frames.valid.reshape(-1, frames.valid.shape[2]),
        before=before.reshape(-1),
        after=after.reshape(-1),
        cached=cached,
    )


def _solve_frames(
    part: CarriedDiT, params: Any, frames: FrameBlocks, blocks: Blocks, speaker: Speaker, cache: DiTCache
) -> tuple[Float[jax.Array, "B N F M"], DiTCache | None]:
    batch, count, size = frames.valid.shape
    codes = frames.codes.reshape(-1, size)  # [B * N, F]
    noise = frames.noise.reshape(batch * count, size, -1)  # [B * N, F, M]
    # a voice for each block of a row
    speakers = jnp.repeat(speaker.rows, count, axis=0)
    cond = jnp.repeat(speaker.cond, count, axis=0)
    inputs = (codes, speakers, cond, part.solver.guidance)
    conditions: Any = part.dit.apply({"params": params}, *inputs, method="conditions")
    mel, new_cache = solve(part.dit, params, noise, conditions, blocks, cache, part.solver)
    return mel.reshape(batch, count, size, -1), new_cache


def _to_output(mel: Float[Array, "B N F M"], valid: Bool[Array, "B N F"], active: Array | None) -> Block:
    if active is not None:
        valid = valid & jnp.asarray(active)[:, None, None]
    batch = len(mel)
    return Block(mel.reshape(batch, -1, mel.shape[-1]), valid.reshape(batch, -1))

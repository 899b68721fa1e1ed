"""Codes to mel by blocks, as they come: the flow of ``models/flow.py``, solved for one block and then for the next.

The whole flow cannot be solved by blocks: with each of its 36 evaluations a frame depends on one more block ahead. The
paper (section 2.4) lets a block see two blocks back and one ahead, and no further. There are two ways to do so:

* ``windowed``, the paper's: each block is solved in a window of its own, [b-2, b-1, b, b+1], from the window's part of
  the request's noise, and of the four only b is kept.
* ``carried``: each block is solved once for good, and once before that as the look-ahead of the block before it. Where
  it looks back, it looks at what the block before it was in the same evaluation, when that was solved for good. So all
  that came before has its part in a block, as in the whole flow, and a block costs two blocks instead of four.

In both, the blocks of all rows and of all windows are one list for the DiT (``models/dit.py``), and differ in who
stands before and after whom. Letters: B rows, T codes, N blocks, F frames a block, M mel bins, E evaluations, S layers
that look back.
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
from omni_jax.layers.streaming import Block, Streaming, StreamingPart, keep_rows
from omni_jax.models.dit import NO_BLOCK, Blocks, DiT, KeysValues, Past
from omni_jax.models.flow_matching import EVALUATIONS, solve

CODE_SECONDS = 0.02

_BACK, _AHEAD = 2, 1  # blocks of the paper's window, beside the block itself
_WINDOW = _BACK + 1 + _AHEAD


@struct.dataclass
class NoisyCodes:
    """The input units: codes, and what the flow starts from in each one's frames."""

    codes: Int[Array, "B T"]
    noise: Float[Array, "B T repeats M"]


@struct.dataclass
class Speaker:
    """What the input has beside its units: who speaks each row."""

    rows: Float[Array, "B 2 enc_dim"]  # from DiT.speakers
    cond: Float[Array, "B enc_emb_dim"]


@struct.dataclass
class Frames:
    """Some blocks of each row, not solved yet."""

    codes: Int[Array, "B N F"]
    noise: Float[Array, "B N F M"]
    valid: Bool[Array, "B N F"]


@struct.dataclass
class WindowedState:
    index: Int[Array, " B"]  # the how manyeth block comes next
    frames: Frames  # the three blocks before it


@struct.dataclass
class CarriedState:
    index: Int[Array, " B"]  # the how manyeth block comes next
    frames: Frames  # the block before it, which waits for its look-ahead
    solved: Bool[Array, "B F"]  # which frames of the block before that one are real
    memory: KeysValues  # of that block: [B, E, S, 2, F, heads, H]


@dataclass(frozen=True)
class WindowedDiT:
    """Each block in a window of its own."""

    dit: DiT

    @property
    def streaming(self) -> Streaming:
        return _streaming(self.dit.config, _BACK)

    def apply_sequence(self, params: Any, x: Block) -> Block:
        """Mel [B, T * repeats, M] of whole rows: all windows at once."""
        return _whole(self, self.dit.config, params, x)

    def init_state(self, batch: int) -> WindowedState:
        return WindowedState(jnp.zeros(batch, jnp.int32), _no_frames(self.dit.config, batch, _WINDOW - 1))

    def step(
        self, params: Any, state: WindowedState, block: Block, active: Bool[Array, " B"] | None = None
    ) -> tuple[Block, WindowedState]:
        """Solves the windows that end with the new blocks: four blocks for each of them."""
        every = _joined(state.frames, _frames(self.dit.config, block))
        batch, count = len(state.index), every.valid.shape[1] - (_WINDOW - 1)
        windows = jnp.arange(count)[:, None] + jnp.arange(_WINDOW)
        frames = jax.tree.map(lambda a: a[:, windows.reshape(-1)], every)
        places = np.arange(batch * count * _WINDOW).reshape(-1, _WINDOW)
        before, after = places - 1, places + 1
        before[:, 0] = after[:, -1] = NO_BLOCK
        index = state.index[:, None] - (_WINDOW - 1) + windows.reshape(1, -1)
        blocks = _listed(frames, index, before, after)
        mel, _ = _solved(self.dit, params, frames, blocks, block.row)
        mel = mel.reshape(batch, count, _WINDOW, *mel.shape[2:])[:, :, _BACK]
        new = WindowedState(state.index + count, jax.tree.map(lambda a: a[:, count:], every))
        return _made(mel, every.valid[:, _BACK : _BACK + count], active), keep_rows(active, new, state)


@dataclass(frozen=True)
class CarriedDiT:
    """Each block once for good, with what the block before it left, and once as the look-ahead of that one."""

    dit: DiT

    @property
    def streaming(self) -> Streaming:
        return _streaming(self.dit.config, None)

    def apply_sequence(self, params: Any, x: Block) -> Block:
        """Mel [B, T * repeats, M] of whole rows: all blocks at once."""
        return _whole(self, self.dit.config, params, x)

    def init_state(self, batch: int) -> CarriedState:
        c = self.dit.config
        layers = len({i for i in c.look_backward_layers if i < c.num_hidden_layers})
        shape = (batch, EVALUATIONS, layers, 2, c.block_size, c.num_attention_heads, c.head_dim)
        return CarriedState(
            jnp.zeros(batch, jnp.int32),
            _no_frames(c, batch, 1),
            jnp.zeros((batch, c.block_size), bool),
            KeysValues(jnp.zeros(shape, self.dit.dtype), jnp.zeros(shape, self.dit.dtype)),
        )

    def step(
        self, params: Any, state: CarriedState, block: Block, active: Bool[Array, " B"] | None = None
    ) -> tuple[Block, CarriedState]:
        """Solves the waiting block and all new ones but the last, each beside a copy of the block after it.

        All of them go through each evaluation together, so a block looks back at what the block before it is there.
        """
        every = _joined(state.frames, _frames(self.dit.config, block))
        batch, count = len(state.index), every.valid.shape[1] - 1
        shown = np.concatenate([np.arange(count), np.arange(1, count + 1)])  # for good, then as look-ahead
        frames = jax.tree.map(lambda a: a[:, shown], every)
        index = state.index[:, None] - 1 + shown
        places = np.arange(batch * 2 * count).reshape(batch, 2, count)
        good, ahead = places[:, 0], places[:, 1]
        carried = places.size + np.arange(batch)
        before = np.stack([np.concatenate([carried[:, None], good[:, :-1]], axis=1), good], axis=1)
        after = np.stack([ahead, np.full_like(ahead, NO_BLOCK)], axis=1)
        keep = good[:, -1] if active is None else jnp.where(active, good[:, -1], carried)
        blocks = _listed(frames, index, before, after, Past(state.solved, keep))
        mel, memory = _solved(self.dit, params, frames, blocks, block.row, state.memory)
        new = state.index + count, jax.tree.map(lambda a: a[:, count:], every), every.valid[:, count - 1]
        # of the memory the rows that stand still have been kept already, or a second one would be made here
        index, waiting, solved = keep_rows(active, new, (state.index, state.frames, state.solved))
        assert memory is not None
        return _made(mel[:, :count], every.valid[:, :count], active), CarriedState(index, waiting, solved, memory)


def _streaming(config: DiTConfig, back: int | None) -> Streaming:
    codes = config.block_size // config.repeats
    look_back = None if back is None else codes * back
    return Streaming(CODE_SECONDS, codes, codes * _AHEAD, look_back, outputs=config.repeats)


def _whole(part: StreamingPart, c: DiTConfig, params: Any, x: Block) -> Block:
    """One step from the beginning, over all blocks and one after the end."""
    length, size = x.valid.shape[1], part.streaming.block
    spare = -length % size + size

    def pad(a: Array) -> jax.Array:
        return jnp.pad(a, ((0, 0), (0, spare), *[(0, 0)] * (jnp.ndim(a) - 2)))

    padded = Block(jax.tree.map(pad, x.values), pad(x.valid), x.row)
    made, _ = part.step(params, part.init_state(len(x.valid)), padded)
    kept = slice(c.block_size, c.block_size + length * c.repeats)
    return Block(made.values[:, kept], made.valid[:, kept])


def _frames(config: DiTConfig, block: Block) -> Frames:
    """The blocks of 24 frames that the codes are."""
    valid = jnp.asarray(block.valid)
    codes = jnp.where(valid, block.values.codes, 0)
    noise = jnp.where(valid[..., None, None], block.values.noise, 0)
    shape = (len(valid), -1, config.block_size)
    repeated = (jnp.repeat(a, config.repeats, axis=1).reshape(shape) for a in (codes, valid))
    codes, valid = repeated
    return Frames(codes, noise.reshape(*valid.shape, config.mel_dim), valid)


def _no_frames(config: DiTConfig, batch: int, count: int) -> Frames:
    shape = (batch, count, config.block_size)
    return Frames(jnp.zeros(shape, jnp.int32), jnp.zeros((*shape, config.mel_dim)), jnp.zeros(shape, bool))


def _joined(first: Frames, then: Frames) -> Frames:
    return jax.tree.map(lambda a, b: jnp.concatenate([a, b], axis=1), first, then)


def _listed(frames: Frames, index: Array, before: np.ndarray, after: np.ndarray, past: Past | None = None) -> Blocks:
    """The blocks of all rows as one list."""
    valid = frames.valid.reshape(-1, frames.valid.shape[2])
    return Blocks(index.reshape(-1), valid, before.reshape(-1), after.reshape(-1), past)


def _solved(
    dit: DiT, params: Any, frames: Frames, blocks: Blocks, speaker: Speaker, memory: KeysValues | None = None
) -> tuple[Float[jax.Array, "B N F M"], KeysValues | None]:
    batch, count, size = frames.valid.shape
    codes, noise = frames.codes.reshape(-1, size), frames.noise.reshape(batch * count, size, -1)
    rows, cond = (jnp.repeat(a, count, axis=0) for a in (speaker.rows, speaker.cond))
    conditions: Any = dit.apply({"params": params}, codes, rows, cond, method="conditions")
    mel, memory = solve(dit, params, noise, conditions, blocks, memory)
    return mel.reshape(batch, count, size, -1), memory


def _made(mel: Float[Array, "B N F M"], valid: Bool[Array, "B N F"], active: Array | None) -> Block:
    valid = valid if active is None else valid & jnp.asarray(active)[:, None, None]
    return Block(mel.reshape(len(mel), -1, mel.shape[-1]), valid.reshape(len(mel), -1))

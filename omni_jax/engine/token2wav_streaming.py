"""Token2Wav's loop for streams: codes come a few at a time, and samples go out as soon as they can be.

A stream waits for the codes of a chunk, gives them to the DiT (``models/dit_stream.py``), and the mel that it makes to
the vocoder (``models/bigvgan_stream.py``). Both look ahead, so the samples that come out lie behind the codes that went
in: of n blocks of codes the DiT has made n - 1 of mel, and the vocoder has said all of their frames but its look-ahead.

Every array has a fixed shape: a stream runs one program for each size of chunk in either network, and nothing else.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding
from jaxtyping import Bool, Float, Int, UInt32

from omni_jax.batch import Array
from omni_jax.engine.thinker_engine import on_mesh
from omni_jax.engine.token2wav_inputs import check_codes
from omni_jax.errors import InputError
from omni_jax.layers.streaming import Block
from omni_jax.models.bigvgan import BigVGAN
from omni_jax.models.bigvgan_streaming import StreamedBigVGAN
from omni_jax.models.dit import DiT
from omni_jax.models.dit_streaming import CarriedDiT, NoisyCodes, Speaker
from omni_jax.models.flow_matching import draw_noise

Mode = Literal["carried"]


@struct.dataclass
class Feed:
    """What a step of the DiT takes from the host, for B rows of T codes, which are F frames."""

    codes: Int[Array, "B T"]
    valid: Bool[Array, "B T"]
    active: Bool[Array, " B"]
    index: Int[Array, " B"]  # the how manyeth block of its row the first one is
    seed: UInt32[Array, " B"]
    draws: Bool[Array, " B"]  # False where ``noise`` is given
    noise: Float[Array, "B F mel"]


class StreamPrograms:
    """The jitted functions of both networks and their parameters, shared by all streams. It holds nothing of any."""

    def __init__(self, dit: DiT, bigvgan: BigVGAN, params: Any, mesh: Mesh | None):
        self.config, self.params, self.mesh = dit.config, params, mesh
        self.vocoder = StreamedBigVGAN(bigvgan)
        self.repeats, self.samples = dit.config.repeats, self.vocoder.streaming.outputs
        # arrays that come from the host and those that come from a step have to lie in the same place: where they do
        # not, a program is compiled for each
        self.place = _place(params, mesh)
        parts: dict[Mode, Any] = {"carried": CarriedDiT(dit)}
        started = functools.partial(jax.jit, static_argnums=0, out_shardings=self.place)
        stepped = functools.partial(jax.jit, donate_argnums=1, out_shardings=self.place)
        self._begin = {mode: started(part.init_state) for mode, part in parts.items()}
        self._begin_vocoder = started(self.vocoder.init_state)
        self._solve = {mode: stepped(functools.partial(solve_step, part)) for mode, part in parts.items()}
        self._vocode = stepped(self.vocoder.step)

    def begin(self, mode: Mode, rows: int) -> tuple[Any, Any]:
        """The states of both networks."""
        with on_mesh(self.mesh):
            return self._begin[mode](rows), self._begin_vocoder(rows)

    def solve(self, mode: Mode, state: Any, feed: Feed, speaker: Speaker) -> tuple[Block, Any]:
        """The mel of as many blocks as are fed; the state is used up."""
        with on_mesh(self.mesh):
            return self._solve[mode](self.params["dit"], state, feed, speaker)

    def vocode(self, state: Any, mel: Block, active: Bool[np.ndarray, " B"]) -> tuple[Block, Any]:
        """The samples of as many frames as are given; the state is used up."""
        with on_mesh(self.mesh):
            return self._vocode(self.params["bigvgan"], state, mel, active)

    def nothing(self, rows: int, frames: int) -> Block:
        """Mel after the end."""
        mel = np.zeros((rows, frames, self.config.mel_dim), np.float32)
        return jax.device_put(Block(mel, np.zeros((rows, frames), bool)), self.place)


@dataclass
class _Row:
    """Where one stream of codes stands."""

    seed: int
    noise: np.ndarray | None  # [frames, mel], if given
    waiting: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int32))  # codes that are not fed yet
    total: int = 0  # codes so far
    blocks: int = 0  # fed
    frames: int = 0  # whose samples are out
    ended: bool = False


class WaveformStream:
    """A batch of streams. Dropping it frees all that it holds. ``Token2WavEngine.stream`` makes one.

    Attributes:
      chunks: blocks of codes that are waited for, at first and later.
    """

    def __init__(
        self,
        programs: StreamPrograms,
        speaker: Speaker,
        seeds: Sequence[int],
        noise: Sequence[np.ndarray | None],
        *,
        mode: Mode,
        chunks: tuple[int, int],
    ):
        """``speaker`` has a row for each of the batch, at least as many as there are streams."""
        self._programs, self._speaker = programs, speaker
        self._mode: Mode = mode
        self._rows = [_Row(seed, given) for seed, given in zip(seeds, noise, strict=True)]
        self.chunks = chunks
        self._batch = len(speaker.cond)
        self._dit, self._vocoder = programs.begin(mode, self._batch)

    def push(
        self, codes: Sequence[Int[np.ndarray, " K"]], ended: Sequence[bool]
    ) -> list[Float[np.ndarray, " samples"]]:
        """Takes the next codes of each row, and gives the samples that are due: float32 from -1 to 1.

        Over a whole row they are as many as ``Token2WavEngine.synthesize`` makes of its codes.

        Args:
          codes: of each row, any number, also none.
          ended: whether a row has no more codes; then all of its samples are given. A row stays ended.

        Raises:
          InputError: for codes that cannot be used; the stream is then as it was before.
        """
        self._take(codes, ended)
        pieces: list[list[np.ndarray]] = [[np.zeros(0, np.float32)] for _ in self._rows]
        while due := self._due():
            self._step(due, pieces)
        while late := self._late():
            self._flush(late, pieces)
        return [np.concatenate(row) for row in pieces]

    def _take(self, codes: Sequence[np.ndarray], ended: Sequence[bool]) -> None:
        if not len(codes) == len(ended) == len(self._rows):
            got = f"{len(codes)} rows of codes and {len(ended)} of ends"
            raise InputError(f"got {got}; this stream has {len(self._rows)} rows, give each")
        new = [np.asarray(row) for row in codes]
        for i, (row, more) in enumerate(zip(self._rows, new, strict=True)):
            where = f"stream {i}"
            check_codes(self._programs.config, where, more, row.total)
            if row.ended and more.size:
                raise InputError(f"{where} has ended and got {more.size} more codes; begin a new one")
            frames = (row.total + more.size) * self._programs.repeats
            if row.noise is not None and len(row.noise) < frames:
                raise InputError(f"{where}: noise was given for {len(row.noise)} frames; the codes have {frames}")
        for row, more, end in zip(self._rows, new, ended, strict=True):
            row.waiting = np.concatenate([row.waiting, more.astype(np.int32)])
            row.total += more.size
            row.ended |= bool(end)

    def _due(self) -> dict[int, int]:
        """Rows that have a chunk to be fed, all of one size: row to blocks."""
        size = self._programs.config.block_size // self._programs.repeats
        wanted: dict[int, int] = {}
        for i, row in enumerate(self._rows):
            chunk = self.chunks[1 if row.blocks else 0]
            if row.ended and row.total:
                left = -(-row.total // size) + 1 - row.blocks  # the last block waits for one to look ahead to
                if left > 0:
                    wanted[i] = self._fitting(left)
            elif len(row.waiting) >= chunk * size:
                wanted[i] = chunk
        return {i: n for i, n in wanted.items() if n == next(iter(wanted.values()))}

    def _fitting(self, blocks: int) -> int:
        """Of the two sizes the smaller one if it is enough."""
        return min(self.chunks) if blocks <= min(self.chunks) else max(self.chunks)

    def _late(self) -> dict[int, int]:
        """Rows that are all fed and not all said, with one number of blocks of frames for all of them."""
        c = self._programs.config
        left = {i: row.total * c.repeats - row.frames for i, row in enumerate(self._rows) if row.ended}
        wanted = {i: self._fitting(-(-n // c.block_size)) for i, n in left.items() if n}
        return dict.fromkeys(wanted, max(wanted.values(), default=0))

    def _step(self, due: dict[int, int], pieces: list[list[np.ndarray]]) -> None:
        """Feeds a chunk of each row, or as much as an ended one has left."""
        active = self._active(due)
        mel, self._dit = self._programs.solve(self._mode, self._dit, self._feed(due, active), self._speaker)
        self._say(mel, active, pieces)

    def _flush(self, late: dict[int, int], pieces: list[list[np.ndarray]]) -> None:
        frames = next(iter(late.values())) * self._programs.config.block_size
        self._say(self._programs.nothing(self._batch, frames), self._active(late), pieces)

    def _say(self, mel: Block, active: np.ndarray, pieces: list[list[np.ndarray]]) -> None:
        made, self._vocoder = self._programs.vocode(self._vocoder, mel, active)
        samples, valid = np.asarray(made.values), np.asarray(made.valid)
        for i, row in enumerate(self._rows):
            if active[i]:
                pieces[i].append(samples[i, valid[i]])
                row.frames += len(pieces[i][-1]) // self._programs.samples

    def _active(self, rows: dict[int, int]) -> np.ndarray:
        active = np.zeros(self._batch, bool)
        active[list(rows)] = True
        return active

    def _feed(self, due: dict[int, int], active: np.ndarray) -> Feed:
        c, blocks = self._programs.config, next(iter(due.values()))
        codes = blocks * c.block_size // c.repeats
        feed = Feed(
            codes=np.zeros((self._batch, codes), np.int32),
            valid=np.zeros((self._batch, codes), bool),
            active=active,
            index=np.zeros(self._batch, np.int32),
            seed=np.zeros(self._batch, np.uint32),
            draws=np.ones(self._batch, bool),
            noise=np.zeros((self._batch, codes * c.repeats, c.mel_dim), np.float32),
        )
        for i in due:
            row = self._rows[i]
            new, row.waiting = row.waiting[:codes], row.waiting[codes:]
            feed.codes[i, : len(new)], feed.valid[i, : len(new)] = new, True
            feed.index[i], feed.seed[i] = row.blocks, row.seed
            if row.noise is not None:
                given = row.noise[row.blocks * c.block_size :][: codes * c.repeats]
                feed.draws[i], feed.noise[i, : len(given)] = False, given
            row.blocks += blocks
        return feed


def solve_step(part: CarriedDiT, params: Any, state: Any, feed: Feed, speaker: Speaker) -> tuple[Block, Any]:
    """A step of the DiT from what the host gives: the mel of as many blocks as are fed, and the state after them."""
    c, (rows, codes) = part.dit.config, feed.codes.shape
    blocks = codes * c.repeats // c.block_size
    index = feed.index[:, None] + jnp.arange(blocks)
    shape = (c.block_size, c.mel_dim)
    drawn = draw_noise(jnp.repeat(feed.seed, blocks), index.reshape(-1), shape).reshape(feed.noise.shape)
    noise = jnp.where(feed.draws[:, None, None], drawn, feed.noise).reshape(rows, codes, c.repeats, c.mel_dim)
    return part.step(params, state, Block(NoisyCodes(feed.codes, noise), feed.valid, speaker), feed.active)


def _place(params: Any, mesh: Mesh | None) -> jax.sharding.Sharding:
    """Where the state lies: on every device of the mesh, or where the parameters are."""
    if mesh is not None:
        return NamedSharding(mesh, PartitionSpec())
    leaf = jax.tree.leaves(params)[0]
    return SingleDeviceSharding(next(iter(leaf.devices())) if isinstance(leaf, jax.Array) else jax.devices()[0])

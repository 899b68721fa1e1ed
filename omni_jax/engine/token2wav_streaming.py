"""Token2Wav's engine for streams: codes come a few at a time, and samples go out as soon as they can be made.

A stream waits for the codes of a chunk, gives them to the DiT (``models/dit_streaming.py``), and the mel that it makes
to the vocoder (``models/bigvgan_streaming.py``). Both look ahead, so the samples that come out lie behind the codes
that went in: of n blocks of codes the DiT has made n - 1 of mel, and the vocoder has made the samples of all of their
frames but its look-ahead.

Every array has a fixed shape: in either network a stream runs one program for its first chunk and one for later ones.

Letters: B rows (streams), T codes of a chunk, F frames of them.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.sharding import Mesh, Sharding
from jaxtyping import Bool, Float, Int, UInt32

from omni_jax.batch import Array
from omni_jax.config import BigVGANConfig, DiTConfig
from omni_jax.engine.decode_state import on_mesh
from omni_jax.engine.token2wav_inputs import check_codes
from omni_jax.errors import InputError
from omni_jax.layers.streaming import Block, StreamingPart
from omni_jax.models.bigvgan import VocoderWeights, synthesize
from omni_jax.models.bigvgan_streaming import StreamedBigVGAN
from omni_jax.models.dit_streaming import CarriedDiT, NoisyCodes, Speaker
from omni_jax.models.flow_matching import draw_noise
from omni_jax.sharding import batch_sharding, host_sharding, map_over_batch, replicate


@struct.dataclass
class CodeChunk:
    """What a step of the DiT takes from the host."""

    codes: Int[Array, "B T"]
    valid: Bool[Array, "B T"]
    active: Bool[Array, " B"]
    block_index: Int[Array, " B"]  # of the chunk's first block, in its row
    seed: UInt32[Array, " B"]
    draws: Bool[Array, " B"]  # False where ``noise`` is given
    noise: Float[Array, "B F mel"]


class StreamEngine:
    """Both networks as parts that stream, and their parameters, shared by all streams.

    Attributes:
      config: of the DiT.
      vocoder: as a part that streams; it declares its look-ahead.
      samples_per_frame: of the vocoder.
    """

    def __init__(
        self,
        dit: CarriedDiT,
        dit_params: Any,
        vocoder: BigVGANConfig,
        vocoder_weights: VocoderWeights,
        mesh: Mesh | None,
    ):
        self.config = dit.dit.config
        self._dit = dit
        self.vocoder = StreamedBigVGAN(vocoder)
        self._dit_params = dit_params
        self._vocoder_weights = vocoder_weights
        self._mesh = mesh
        self.samples_per_frame = self.vocoder.streaming.outputs

    def init_state(self, num_rows: int) -> tuple[Any, Any]:
        """The states of both networks before the first chunk."""
        with on_mesh(self._mesh):
            states = _init_state(self._dit, num_rows), _init_state(self.vocoder, num_rows)
        # arrays of the host and arrays of a step must lie in the same place: else a program is compiled for each
        return jax.device_put(states, self._place_rows(num_rows))

    def solve(self, state: Any, chunk: CodeChunk, speaker: Speaker, *, is_first: bool) -> tuple[Block, Any]:
        """The mel of as many blocks as the chunk has, one less where it is the first; the state is used up."""
        with on_mesh(self._mesh):
            return solve_chunk(self._dit, is_first, self._dit_params, state, chunk, speaker)

    def vocode(self, state: Any, mel: Block, active: Bool[np.ndarray, " B"]) -> tuple[Block, Any]:
        """The samples of as many frames as the mel has; the state is used up."""
        with on_mesh(self._mesh):
            return vocode_chunk(self.vocoder, self._vocoder_weights, state, mel, active)

    def vocode_first(
        self, state: Any, mel: Block, active: Bool[np.ndarray, " B"], look_ahead: int
    ) -> tuple[Block, Any]:
        """``vocode`` of rows that begin, without the frames before them: all samples but the last ``look_ahead``'s."""
        with on_mesh(self._mesh):
            return vocode_first_chunk(self.vocoder, look_ahead, self._vocoder_weights, state, mel, active)

    def make_padding(self, num_rows: int, num_frames: int) -> Block:
        """Mel after the end of a row."""
        mel = np.zeros((num_rows, num_frames, self.config.mel_dim), np.float32)
        return jax.device_put(Block(mel, np.zeros((num_rows, num_frames), bool)), self._place_rows(num_rows))

    def _place_rows(self, num_rows: int) -> Sharding:
        if self._mesh is None:
            return host_sharding(self._dit_params, None)
        return batch_sharding(self._mesh, num_rows)


@dataclass
class _RowRecord:
    """Where one stream stands.

    Attributes:
      seed: of the noise.
      noise: [frames, mel], if it is given.
      waiting: codes that the DiT has not been given.
      num_codes: so far.
      num_blocks: that the DiT has been given.
      num_frames: whose samples are out.
      num_early: of them, those that the vocoder is going to give again.
      is_last: whether no more codes follow.
    """

    seed: int
    noise: np.ndarray | None
    waiting: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int32))
    num_codes: int = 0
    num_blocks: int = 0
    num_frames: int = 0
    num_early: int = 0
    is_last: bool = False


class Token2WavStream:
    """A batch of streams. Dropping it frees all that it holds. ``Token2WavEngine.stream`` makes one.

    Attributes:
      chunk_blocks: blocks of codes that are waited for, at first and later.
    """

    def __init__(
        self,
        engine: StreamEngine,
        speaker: Speaker,
        seeds: Sequence[int],
        noise: Sequence[np.ndarray | None],
        *,
        chunk_blocks: tuple[int, int],
        first_look_ahead: int | None = None,
    ):
        """``speaker`` has a row for each of the batch, at least as many as there are streams.

        ``first_look_ahead`` is in mel frames; see ``Token2WavEngine.stream``.
        """
        self.chunk_blocks = chunk_blocks
        self._first_look_ahead = first_look_ahead
        self._engine = engine
        self._speaker = speaker
        # no record for a row that only fills up the batch: nothing is ever due there
        self._rows = [_RowRecord(seed, own) for seed, own in zip(seeds, noise, strict=True)]
        self._num_rows = len(speaker.cond)
        self._dit_state, self._vocoder_state = engine.init_state(self._num_rows)

    def push(
        self, codes: Sequence[Int[np.ndarray, " K"]], is_last: Sequence[bool]
    ) -> list[Float[np.ndarray, " samples"]]:
        """Takes the next codes of each row, and gives the samples that are due: float32 from -1 to 1.

        Over a whole row they are as many as ``Token2WavEngine.synthesize`` makes of its codes.

        Args:
          codes: of each row, any number, also none.
          is_last: whether a row has no more codes; then all of its samples are given.

        Raises:
          InputError: for codes that cannot be used; the stream is then as it was before.
        """
        self._take_codes(codes, is_last)
        # an empty piece at first, for rows that nothing is due of
        pieces: list[list[np.ndarray]] = [[np.zeros(0, np.float32)] for _ in self._rows]
        # the DiT first, then what the vocoder still holds back of rows that have ended
        while due := self._due_rows():
            self._step_rows(due, pieces)
        while late := self._late_rows():
            self._flush_rows(late, pieces)
        return [np.concatenate(row) for row in pieces]

    def _take_codes(self, codes: Sequence[np.ndarray], is_last: Sequence[bool]) -> None:
        if not len(codes) == len(is_last) == len(self._rows):
            got = f"{len(codes)} rows of codes and {len(is_last)} of ends"
            raise InputError(f"got {got}; this stream has {len(self._rows)} rows, give each")
        c = self._engine.config
        # all rows are checked before any is changed, so that a push that raises leaves the stream as it was
        new = [np.asarray(row) for row in codes]
        for i, (row, more) in enumerate(zip(self._rows, new, strict=True)):
            where = f"stream {i}"
            check_codes(c, where, more, row.num_codes)
            if row.is_last and more.size:
                raise InputError(f"{where} has ended and got {more.size} more codes; begin a new one")
            num_frames = (row.num_codes + more.size) * c.repeats
            if row.noise is not None and len(row.noise) < num_frames:
                raise InputError(f"{where}: noise was given for {len(row.noise)} frames; the codes have {num_frames}")
        for row, more, last in zip(self._rows, new, is_last, strict=True):
            row.waiting = np.concatenate([row.waiting, more.astype(np.int32)])
            row.num_codes += more.size
            row.is_last |= bool(last)

    def _due_rows(self) -> dict[int, int]:
        """Rows whose next chunk can be computed, all of one program: row -> blocks."""
        c = self._engine.config
        block_codes = c.block_size // c.repeats
        due: dict[int, int] = {}
        for i, row in enumerate(self._rows):
            # a row's first chunk has a size and a program of its own
            chunk = self.chunk_blocks[1 if row.num_blocks else 0]
            if row.is_last and row.num_codes:
                # the last block waits for one more to look ahead to
                if -(-row.num_codes // block_codes) + 1 > row.num_blocks:
                    due[i] = chunk
            elif len(row.waiting) >= chunk * block_codes:
                due[i] = chunk
        if not due:
            return {}
        # rows of the other program are due at the next step
        is_first = not self._rows[next(iter(due))].num_blocks
        return {i: blocks for i, blocks in due.items() if (not self._rows[i].num_blocks) == is_first}

    def _late_rows(self) -> list[int]:
        """Rows whose codes are all computed and whose samples are not all out."""
        c = self._engine.config
        return [i for i, row in enumerate(self._rows) if row.is_last and row.num_codes * c.repeats > row.num_frames]

    def _step_rows(self, due: dict[int, int], pieces: list[list[np.ndarray]]) -> None:
        """Computes a chunk of each row, or as much as one at its end has."""
        active = self._active_rows(due)
        is_first = not self._rows[next(iter(due))].num_blocks
        chunk = self._make_chunk(due, active)
        mel, self._dit_state = self._engine.solve(self._dit_state, chunk, self._speaker, is_first=is_first)
        look_ahead = self._first_look_ahead
        if look_ahead is None:
            look_ahead = self._engine.vocoder.streaming.look_ahead
        gives_samples = mel.valid.shape[1] > look_ahead
        # where a row has all of its codes, the samples of all of its frames are due at once
        has_more = not any(self._rows[i].is_last for i in due)
        if is_first and has_more and gives_samples:
            self._vocode_first(mel, active, pieces, look_ahead)
        else:
            self._vocode(mel, active, pieces)

    def _flush_rows(self, late: list[int], pieces: list[list[np.ndarray]]) -> None:
        # as many as of a later chunk, so that they need no program of their own
        num_frames = self.chunk_blocks[1] * self._engine.config.block_size
        # padding pushes out the samples that wait for their look-ahead
        self._vocode(self._engine.make_padding(self._num_rows, num_frames), self._active_rows(late), pieces)

    def _vocode(self, mel: Block, active: np.ndarray, pieces: list[list[np.ndarray]]) -> None:
        block, self._vocoder_state = self._engine.vocode(self._vocoder_state, mel, active)
        # one transfer for both
        samples, valid = jax.device_get((block.values, block.valid))
        per_frame = self._engine.samples_per_frame
        for i, row in enumerate(self._rows):
            if active[i]:
                piece = samples[i, valid[i]]
                # the first packet may have given the first of them
                repeated = min(row.num_early, len(piece) // per_frame)
                row.num_early -= repeated
                piece = piece[repeated * per_frame :]
                pieces[i].append(piece)
                row.num_frames += len(piece) // per_frame

    def _vocode_first(self, mel: Block, active: np.ndarray, pieces: list[list[np.ndarray]], look_ahead: int) -> None:
        block, self._vocoder_state = self._engine.vocode_first(self._vocoder_state, mel, active, look_ahead)
        samples = jax.device_get(block.values)
        num_frames = samples.shape[1] // self._engine.samples_per_frame
        # a usual step would have given the frames that have their whole look-ahead
        num_exact = max(num_frames + look_ahead - self._engine.vocoder.streaming.look_ahead, 0)
        for i, row in enumerate(self._rows):
            if active[i]:
                pieces[i].append(samples[i])
                row.num_frames = num_frames
                row.num_early = num_frames - num_exact

    def _active_rows(self, rows: Iterable[int]) -> Bool[np.ndarray, " B"]:
        active = np.zeros(self._num_rows, bool)
        active[list(rows)] = True
        return active

    def _make_chunk(self, due: dict[int, int], active: Bool[np.ndarray, " B"]) -> CodeChunk:
        c = self._engine.config
        num_blocks = next(iter(due.values()))
        num_codes = num_blocks * c.block_size // c.repeats
        num_frames = num_codes * c.repeats
        chunk = CodeChunk(
            codes=np.zeros((self._num_rows, num_codes), np.int32),
            valid=np.zeros((self._num_rows, num_codes), bool),
            active=active,
            block_index=np.zeros(self._num_rows, np.int32),
            seed=np.zeros(self._num_rows, np.uint32),
            draws=np.ones(self._num_rows, bool),
            noise=np.zeros((self._num_rows, num_frames, c.mel_dim), np.float32),
        )
        for i in due:
            row = self._rows[i]
            # fewer than the chunk has room for at the end of a row; the rest stays not valid
            new = row.waiting[:num_codes]
            row.waiting = row.waiting[num_codes:]
            chunk.codes[i, : len(new)] = new
            chunk.valid[i, : len(new)] = True
            chunk.block_index[i] = row.num_blocks
            chunk.seed[i] = row.seed
            if row.noise is not None:
                # by the place in the row, so that noise does not depend on how the codes were cut
                own = row.noise[row.num_blocks * c.block_size :][:num_frames]
                chunk.draws[i] = False
                chunk.noise[i, : len(own)] = own
            row.num_blocks += num_blocks
        return chunk


@functools.partial(jax.jit, static_argnums=(0, 1))
def _init_state(part: StreamingPart, num_rows: int) -> Any:
    return replicate(part.init_state(num_rows))


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=3)
def solve_chunk(
    part: CarriedDiT, is_first: bool, params: Any, state: Any, chunk: CodeChunk, speaker: Speaker
) -> tuple[Block, Any]:
    """A step of the DiT: the mel of as many blocks as the chunk has, and the state after them.

    Args:
      part: the DiT as a part that streams.
      is_first: whether the active rows begin with this chunk. Then no block has waited for it, and the mel has one
        block less.
      params: of the DiT.
      state: after the chunk before.
      chunk: the codes.
      speaker: who speaks each row.
    """

    def solve_rows(shared: Any, rows: tuple[Any, CodeChunk, Speaker]) -> tuple[Block, Any]:
        state, chunk, speaker = rows
        block = Block(_draw_codes(part.dit.config, chunk), chunk.valid, speaker)
        step = part.first_step if is_first else part.step
        return step(shared, state, block, chunk.active)

    with jax.named_scope("solve_chunk"):
        return map_over_batch(solve_rows, params, (state, chunk, speaker))


def _draw_codes(config: DiTConfig, chunk: CodeChunk) -> NoisyCodes:
    """The codes of a chunk, each with its noise."""
    c = config
    num_rows, num_codes = chunk.codes.shape
    num_blocks = num_codes * c.repeats // c.block_size
    # drawn by seed and index of each block, as ``solve_blocks`` draws for the whole reply
    index = chunk.block_index[:, None] + jnp.arange(num_blocks)  # [B, blocks]
    seed = jnp.repeat(chunk.seed, num_blocks)  # [B * blocks]
    drawn = draw_noise(seed, index.reshape(-1), (c.block_size, c.mel_dim))  # [B * blocks, block_size, mel]
    drawn = drawn.reshape(chunk.noise.shape)  # [B, F, mel]
    noise = jnp.where(chunk.draws[:, None, None], drawn, chunk.noise)  # [B, F, mel]
    return NoisyCodes(chunk.codes, noise.reshape(num_rows, num_codes, c.repeats, c.mel_dim))


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def vocode_chunk(
    part: StreamedBigVGAN, params: VocoderWeights, state: Any, mel: Block, active: Bool[Array, " B"]
) -> tuple[Block, Any]:
    """A step of the vocoder: the samples of as many frames as the mel has, and the state after them."""

    def vocode_rows(shared: VocoderWeights, rows: tuple[Any, Block, Array]) -> tuple[Block, Any]:
        return part.step(shared, *rows)

    with jax.named_scope("vocode_chunk"):
        samples, state = map_over_batch(vocode_rows, params, (state, mel, active))
        return replicate(samples), state  # which every host reads


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=3)
def vocode_first_chunk(
    part: StreamedBigVGAN, look_ahead: int, params: VocoderWeights, state: Any, mel: Block, active: Bool[Array, " B"]
) -> tuple[Block, Any]:
    """The samples of rows' first frames, all but the last ``look_ahead``, and the state after all of them.

    They are made as if the rows ended here. With all of the vocoder's look-ahead they are exact; with less the last of
    them lack some of what they depend on.
    """

    def vocode_rows(shared: VocoderWeights, rows: tuple[Any, Block, Array]) -> tuple[Block, Any]:
        state, mel, active = rows
        valid = jnp.asarray(mel.valid)  # [B, F]
        values = jnp.where(valid[..., None], mel.values, 0)  # [B, F, M]
        samples = synthesize(part.config, shared, values, jnp.sum(valid, axis=1))  # [B, samples]
        num_samples = (valid.shape[1] - look_ahead) * part.streaming.outputs
        early = jnp.repeat(valid & jnp.asarray(active)[:, None], part.streaming.outputs, axis=1)[:, :num_samples]
        return Block(samples[:, :num_samples], early), part.absorb(state, mel, active)

    with jax.named_scope("vocode_first_chunk"):
        samples, state = map_over_batch(vocode_rows, params, (state, mel, active))
        return replicate(samples), state  # which every host reads

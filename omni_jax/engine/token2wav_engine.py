"""Token2Wav's engine: codes of many requests in, their samples out.

Letters: N blocks of F frames, K codes of a request.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Float, Int

from omni_jax.batch import Array, bucket
from omni_jax.checkpoint.voices import Voice
from omni_jax.config import BigVGANConfig, DiTConfig
from omni_jax.engine.decode_state import apply_method, on_mesh
from omni_jax.engine.pace import Pace
from omni_jax.engine.token2wav_inputs import (
    check_codes,
    check_first_look_ahead,
    check_noise,
    check_seed,
    check_voice,
    count_chunk_blocks,
)
from omni_jax.engine.token2wav_lists import (
    ListRequest,
    Noise,
    SpeechBlocks,
    empty_lists,
    fill_lists,
    round_num_blocks,
    solve_blocks,
)
from omni_jax.engine.token2wav_streaming import StreamEngine, Token2WavStream
from omni_jax.errors import InputError
from omni_jax.models.bigvgan import BigVGAN, VocoderWeights, synthesize
from omni_jax.models.bigvgan_streaming import Sides, reach
from omni_jax.models.dit import DiT
from omni_jax.models.dit_streaming import CarriedDiT, Speaker
from omni_jax.models.ode_solver import Solver
from omni_jax.models.speaker_encoder import shortest_clip
from omni_jax.models.token2wav import Token2Wav, parts
from omni_jax.sharding import batch_shards, replicate

# of the vocoder's windows, beside what their samples depend on to either side. Longer ones compute less twice, but
# compilers for TPUs take longer for them; the shorter ones are for short replies, and for what is left of longer ones
WINDOW_NEW_FRAMES = (64, 132, 192)
MIN_CLIP_FRAMES = 512  # that a voice's clip is padded to, and then to a bucket of as many: few programs for all clips
MIN_VOICES = 64  # that a call has room for at least, so that their number makes no programs of its own


class Token2WavEngine:
    """Token2Wav and its parameters. It holds nothing of any request.

    Attributes:
      config: of Token2Wav.
      mesh: over which the parameters are sharded; None for one device.
      dit: the network.
      solver: of its flow.
      dit_params: of the DiT.
      vocoder_weights: of the vocoder.
      window_frames: mel frames that the vocoder gets at once, for whole replies: a program each, in rising order.
      num_lists: that the blocks of a call are dealt to, one for each shard of the batch.
      streams: both networks as parts that stream.
      pace: how long pieces of streams and lists have taken.
    """

    def __init__(
        self,
        model: Token2Wav,
        params: Any,
        mesh: Mesh | None = None,
        solver: Solver = Solver(),  # noqa: B008, frozen
    ):
        """``params`` has those of both networks; the vocoder's are copied to the layout that its programs read."""
        self.config = model.config
        self.solver = solver
        self.dit_params = params["dit"]
        self.mesh = mesh
        self.num_lists = 1 if mesh is None else batch_shards(mesh)
        self.dit, bigvgan = parts(model)
        with on_mesh(mesh):
            self.vocoder_weights = make_vocoder_weights(bigvgan, params["bigvgan"])
        self._vocoder_reach = reach(model.config.bigvgan_config)
        overlap = sum(self._vocoder_reach)
        self.window_frames = [count + overlap for count in WINDOW_NEW_FRAMES]  # 132, 200 and 260 at the published size
        self.streams = StreamEngine(
            CarriedDiT(self.dit, solver), self.dit_params, bigvgan.config, self.vocoder_weights, mesh
        )
        self.pace = Pace()
        # of the voices that have spoken, as long as somebody has them: those of clips come and go
        self._speakers: weakref.WeakKeyDictionary[Voice, np.ndarray] = weakref.WeakKeyDictionary()

    @property
    def codes_per_block(self) -> int:
        return self.config.dit_config.block_size // self.config.dit_config.repeats

    def synthesize(
        self,
        codes: Sequence[Int[np.ndarray, " K"]],
        voices: Sequence[Voice],
        noise: Sequence[Noise | None],
        seeds: Sequence[int],
        block_sizes: Sequence[int] = (),
    ) -> list[Float[np.ndarray, " samples"]]:
        """Speaks each request's codes.

        A request's samples do not depend on the others in the call.

        Args:
          codes: ids of each request, without the Talker's own begin and end.
          voices: who speaks each.
          noise: what the flow starts from, standard normal [codes * repeats, mel_dim]; drawn where None.
          seeds: of the draws.
          block_sizes: numbers of blocks, in rising order, that lists are rounded up to; a larger number is rounded as
            without them (``round_num_blocks``). Over a mesh it is the number of each shard of the batch.

        Returns:
          float32 from -1 to 1 at ``SAMPLE_RATE``, 480 samples a code (published sizes).

        Raises:
          InputError: for codes, a voice, noise or a seed that cannot be used.
        """
        return self.vocode(self.make_mels(codes, voices, noise, seeds, block_sizes))

    def make_mels(
        self,
        codes: Sequence[Int[np.ndarray, " K"]],
        voices: Sequence[Voice],
        noise: Sequence[Noise | None],
        seeds: Sequence[int],
        block_sizes: Sequence[int] = (),
    ) -> list[Float[np.ndarray, "frames mel"]]:
        """The first half of ``synthesize``: log-mel spectrograms, ``repeats`` frames a code."""
        c = self.config.dit_config
        # every request is checked before any is computed
        for i, request in enumerate(zip(codes, voices, noise, seeds, strict=True)):
            _check_request(c, f"request {i}", *request)
        if not codes:
            return []
        used, which = _number_voices(voices)
        # copies of the first voice fill up the bucket; no request points at them
        used += used[:1] * (bucket(len(used), MIN_VOICES) - len(used))
        requests = []
        for request in zip(codes, which, noise, seeds, strict=True):
            requests.append(ListRequest(*request))
        speech, places = fill_lists(
            c, requests, self.num_lists, functools.partial(round_num_blocks, block_sizes=block_sizes)
        )
        speakers = np.stack([self._encode_speaker(voice) for voice in used])
        cond = np.concatenate([voice.cond for voice in used])
        mel = self._solve(speech, speakers, cond)
        mels = []
        for place, request in zip(places, requests, strict=True):
            # without the padding of the request's last block
            mels.append(mel[place].reshape(-1, c.mel_dim)[: len(request.codes) * c.repeats])
        return mels

    def _solve(
        self, speech: SpeechBlocks, speakers: Float[np.ndarray, "V 2 enc_dim"], cond: Float[np.ndarray, "V enc_emb_dim"]
    ) -> Float[np.ndarray, "N F mel"]:
        with on_mesh(self.mesh):
            return np.asarray(solve_blocks(self.dit, self.solver, self.dit_params, speech, speakers, cond))

    def vocode(self, mels: Sequence[Float[np.ndarray, "frames mel"]]) -> list[Float[np.ndarray, " samples"]]:
        """The second half of ``synthesize``, window by window: few programs, however long a spectrogram is."""
        windows: list[_Window] = []
        for i, mel in enumerate(mels):
            windows += _cut_windows(i, len(mel), self.window_frames, self._vocoder_reach)
        calls = []
        for size in self.window_frames:
            of_size = [window for window in windows if window.size == size]
            for first in range(0, len(of_size), self._windows_per_call):
                group = of_size[first : first + self._windows_per_call]
                calls.append((group, self._vocode_windows(mels, group, size)))
        pieces: dict[_Window, np.ndarray] = {}
        # the device has all calls before the host waits for the first
        for group, samples in calls:
            frames = np.asarray(samples).reshape(self._windows_per_call, group[0].size, -1)
            for row, window in zip(frames, group, strict=False):
                pieces[window] = row[window.first : window.last].reshape(-1)
        audio: list[list[np.ndarray]] = [[np.zeros(0, np.float32)] for _ in mels]
        for window in windows:
            audio[window.mel].append(pieces[window])
        return [np.concatenate(of_mel) for of_mel in audio]

    @property
    def _windows_per_call(self) -> int:
        return 1 if self.mesh is None else self.mesh.size

    def _vocode_windows(self, mels: Sequence[np.ndarray], windows: Sequence[_Window], size: int) -> jax.Array:
        """Dispatches a call for windows of one size, at most as many as a call takes."""
        rows = np.zeros((self._windows_per_call, size, self.config.dit_config.mel_dim), np.float32)
        length = np.zeros(self._windows_per_call, np.int32)
        for row, window in enumerate(windows):
            frames = mels[window.mel][window.start : window.start + size]
            rows[row, : len(frames)] = frames
            length[row] = len(frames)
        with on_mesh(self.mesh):
            return vocode_windows(self.config.bigvgan_config, self.vocoder_weights, rows, length)

    def count_blocks(self, num_codes: int) -> int:
        """Blocks that so many codes of one request take in a list."""
        c = self.config.dit_config
        return -(-num_codes * c.repeats // c.block_size)

    def stream(
        self,
        voices: Sequence[Voice],
        seeds: Sequence[int],
        noise: Sequence[Noise | None] | None = None,
        *,
        first_chunk_codes: int = 36,
        chunk_codes: int = 24,
        first_look_ahead: int | None = None,
    ) -> Token2WavStream:
        """A batch of streams, one for each voice, that speak codes as they come (docs/streaming.md).

        Args:
          voices: who speaks each.
          seeds: of the noise, which is that of ``synthesize``.
          noise: what the flow starts from, for at least as many frames as there will be; drawn where None.
          first_chunk_codes: codes that are waited for at first. The first packet lacks the two networks' look-ahead, so
            that fewer than the default's make it empty (published sizes).
          chunk_codes: codes that are waited for later. Both are a multiple of a block's.
          first_look_ahead: mel frames that the vocoder looks ahead to in the first packet; all that it depends on (34)
            if None. With fewer the first packet holds more sound, of which what is nearest to its end is not exact.

        Raises:
          InputError: for a voice, a seed, noise or a chunk that cannot be used.
        """
        c = self.config.dit_config
        if noise is None:
            noise = [None] * len(voices)
        # every stream is checked before anything is computed
        for i, (voice, seed, stream_noise) in enumerate(zip(voices, seeds, noise, strict=True)):
            check_seed(f"stream {i}", seed)
            check_voice(c, voice)
            if stream_noise is not None and (np.ndim(stream_noise) != 2 or stream_noise.shape[1] != c.mel_dim):
                shape = list(np.shape(stream_noise))
                raise InputError(f"stream {i}: noise has shape {shape}, not [frames, {c.mel_dim}]")
        # the last block of a chunk waits for the next one, so that of one block nothing would come
        first_blocks = count_chunk_blocks(c, "first_chunk_codes", first_chunk_codes, least=2)
        later_blocks = count_chunk_blocks(c, "chunk_codes", chunk_codes)
        check_first_look_ahead(first_look_ahead, (first_blocks - 1) * c.block_size, self._vocoder_reach.ahead)
        num_rows = bucket(len(voices))
        # rows that only fill up the bucket have no voice: they are never active
        speaker = Speaker(
            np.zeros((num_rows, 2, c.enc_dim), np.float32), np.zeros((num_rows, c.enc_emb_dim), np.float32)
        )
        for i, voice in enumerate(voices):
            speaker.rows[i] = self._encode_speaker(voice)
            speaker.cond[i] = voice.cond[0]
        return Token2WavStream(
            self.streams,
            speaker,
            seeds,
            noise,
            chunk_blocks=(first_blocks, later_blocks),
            first_look_ahead=first_look_ahead,
        )

    def encode_voices(self, voices: Sequence[Voice]) -> None:
        """Runs the speaker encoder for voices that will speak; one program for each bucket of their clips."""
        for voice in voices:
            self._encode_speaker(voice)

    def warm_up_clips(self, num_frames: int) -> None:
        """Compiles the speaker encoder for clips of so many frames and of fewer."""
        c = self.config.dit_config
        length = shortest_clip(c)
        while length <= bucket(num_frames, MIN_CLIP_FRAMES):
            clip = np.zeros((1, length, c.mel_dim), np.float32)
            self._encode_speaker(Voice("none", 0, np.zeros((1, c.enc_emb_dim), np.float32), clip))
            # the shortest clip of the next bucket
            length = bucket(length, MIN_CLIP_FRAMES) + 1

    def warm_up_streams(
        self, voice: Voice, first_chunk_codes: int, chunk_codes: int, first_look_ahead: int | None
    ) -> None:
        """Compiles what a stream needs, by speaking some codes.

        Each network has a program for the first chunk and one for later ones. The vocoder has a third where the mel of
        the two is not equally long, for a reply that ends with its first chunk. Others make a state.

        Args:
          voice: any.
          first_chunk_codes, chunk_codes, first_look_ahead: as in ``stream``.
        """
        stream = self.stream(
            [voice],
            [0],
            first_chunk_codes=first_chunk_codes,
            chunk_codes=chunk_codes,
            first_look_ahead=first_look_ahead,
        )
        # the first chunk, a later one, and then the end, which brings out what both networks hold back
        for num_blocks in (*stream.chunk_blocks, 0):
            codes = np.zeros(num_blocks * self.codes_per_block, np.int32)
            stream.push([codes], [num_blocks == 0])
        # a reply that ends with its first chunk, whose mel the vocoder then gets as it gets that of later ones
        first_frames = (stream.chunk_blocks[0] - 1) * self.config.dit_config.block_size
        _, vocoder_state = self.streams.init_state(1)
        self.streams.vocode(vocoder_state, self.streams.make_padding(1, first_frames), np.zeros(1, bool))

    def warm_up_list(self, num_blocks: int) -> None:
        """Compiles ``synthesize`` for lists of so many blocks. They have none, so that nothing is solved."""
        c = self.config.dit_config
        speakers = np.zeros((MIN_VOICES, 2, c.enc_dim), np.float32)
        cond = np.zeros((MIN_VOICES, c.enc_emb_dim), np.float32)
        self._solve(empty_lists(c, self.num_lists, num_blocks), speakers, cond)

    def warm_up_vocoder(self) -> None:
        """Compiles ``vocode``: a window of each size goes through the vocoder."""
        for size in self.window_frames:
            self.vocode([np.zeros((size, self.config.dit_config.mel_dim), np.float32)])

    def _encode_speaker(self, voice: Voice) -> Float[np.ndarray, "2 enc_dim"]:
        """What the speaker encoder makes of a voice, once for all of its requests."""
        rows = self._speakers.get(voice)
        if rows is None:
            # clips have lengths of their own, and each length of the array is a program
            num_frames = voice.ref_mel.shape[1]
            padded = np.zeros((1, bucket(num_frames, MIN_CLIP_FRAMES), voice.ref_mel.shape[2]), np.float32)
            padded[:, :num_frames] = voice.ref_mel
            with on_mesh(self.mesh):
                rows = np.asarray(encode_speakers(self.dit, self.dit_params, padded, np.array([num_frames])))
            self._speakers[voice] = rows
        return rows


class _Window(NamedTuple):
    """Frames of a spectrogram that the vocoder gets together.

    Attributes:
      mel: which spectrogram.
      size: frames that it has room for.
      start: its first frame.
      first, last: of its frames, those whose samples are kept: the others lack what they depend on.
    """

    mel: int
    size: int
    start: int
    first: int
    last: int


def _cut_windows(mel: int, num_frames: int, sizes: Sequence[int], sides: Sides) -> list[_Window]:
    """Windows that overlap by what a sample depends on, so that together they give the samples of the whole.

    Args:
      mel: which spectrogram.
      num_frames: of it.
      sizes: that a window may have, in rising order.
      sides: what a frame's samples depend on.
    """
    windows = []
    kept = 0  # frames whose samples are there
    while kept < num_frames:
        start = max(kept - sides.behind, 0)
        size = _choose_size(num_frames - start, sizes)
        end = min(start + size, num_frames)
        # the last window has the true end, which needs nothing behind it
        last = end if end == num_frames else end - sides.ahead
        windows.append(_Window(mel, size, start, kept - start, last - start))
        kept = last
    return windows


def _choose_size(num_frames: int, sizes: Sequence[int]) -> int:
    """The smallest of ``sizes`` that holds so many frames, else the largest."""
    for size in sizes:
        if size >= num_frames:
            return size
    return sizes[-1]


def _number_voices(voices: Sequence[Voice]) -> tuple[list[Voice], list[int]]:
    """The voices of a call, each of them once, and for each request which of them speaks it."""
    distinct: list[Voice] = []
    numbers: dict[int, int] = {}
    which = []
    for voice in voices:
        # by identity: two voices may have one name
        number = numbers.setdefault(id(voice), len(distinct))
        if number == len(distinct):
            distinct.append(voice)
        which.append(number)
    return distinct, which


def _check_request(
    config: DiTConfig, where: str, codes: np.ndarray, voice: Voice, noise: Noise | None, seed: int
) -> None:
    codes = np.asarray(codes)
    if not codes.size:
        raise InputError(f"{where}: codes must have at least one integer, got none")
    check_codes(config, where, codes)
    check_noise(config, where, noise, codes.size)
    check_seed(where, seed)
    check_voice(config, voice)


@functools.partial(jax.jit, static_argnums=0)
def encode_speakers(
    dit: DiT, params: Any, ref_mel: Float[Array, "1 T mel"], length: Int[Array, " 1"]
) -> Float[jax.Array, "2 enc_dim"]:
    """What the speaker encoder makes of a voice's clip, for the conditional and the unconditional branch."""
    return replicate(apply_method(dit, "speakers", params, ref_mel, length))


@functools.partial(jax.jit, static_argnums=0)
def make_vocoder_weights(bigvgan: BigVGAN, params: Any) -> VocoderWeights:
    """The vocoder's parameters in the layout that its programs read, in full on every device."""
    return replicate(apply_method(bigvgan, "weights", params))


@functools.partial(jax.jit, static_argnums=0)
def vocode_windows(
    config: BigVGANConfig, weights: VocoderWeights, mel: Float[Array, "R W mel"], length: Int[Array, " R"]
) -> Float[jax.Array, "R samples"]:
    """The samples of windows of spectrograms, a window on each device of the mesh.

    Args:
      config, weights: of the vocoder.
      mel: a row for each window.
      length: frames of each that are real.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return synthesize(config, weights, mel, length)
    rows = PartitionSpec(mesh.axis_names)
    # each device has all weights and rows of its own: nothing is moved before the end
    mapped = jax.shard_map(
        functools.partial(synthesize, config),
        mesh=mesh,
        in_specs=(PartitionSpec(), rows, rows),
        out_specs=rows,
        check_vma=False,
    )
    return replicate(mapped(weights, mel, length))

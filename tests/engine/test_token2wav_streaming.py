"""Streams of codes: the samples of a plain solve, all of them, whatever the pieces; what compiles, and the errors."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from omni_jax.checkpoint import store
from omni_jax.checkpoint.convert import to_jax
from omni_jax.checkpoint.voices import Voice
from omni_jax.config import OmniConfig, Token2WavConfig
from omni_jax.engine.token2wav_engine import Token2WavEngine, encode_speakers
from omni_jax.engine.token2wav_streaming import Token2WavStream
from omni_jax.errors import InputError
from omni_jax.models.dit import DiT
from omni_jax.models.ode_solver import Solver
from omni_jax.models.token2wav import Token2Wav
from tests.plain_flow import plainly_carried
from tools.make_checkpoint import write_checkpoint

# the flow adds up 36 evaluations, whose sums are cut into pieces by the shape of the list
TOLERANCE = 1e-4

TINY = OmniConfig.tiny()
DIT = TINY.token2wav_config.dit_config
LENGTHS = (1, 12, 35, 40, 0)
CHECKED = 3  # four blocks, the last not full: beyond the first chunk


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("quick")
    write_checkpoint(folder / "published", TINY, dtype="float32")
    to_jax(folder / "published", folder / "model", components=["token2wav"])
    return folder / "model"


@pytest.fixture(scope="module")
def engine(folder: Path) -> Token2WavEngine:
    return loaded(TINY.token2wav_config, folder)


@pytest.fixture(scope="module")
def distilled(folder: Path) -> Token2WavEngine:
    """As if guidance, and a rule of four evaluations, were in the same parameters."""
    return loaded(TINY.token2wav_config, folder, Solver("euler", 4, guidance=False))


def loaded(config: Token2WavConfig, folder: Path, solver: Solver = Solver()) -> Token2WavEngine:  # noqa: B008, frozen
    params = store.load(folder, ["token2wav"])["token2wav"]
    return Token2WavEngine(Token2Wav(config), jax.device_put(params, jax.devices()[0]), solver=solver)


def voice(seed: int, frames: int = 20) -> Voice:
    rng = np.random.default_rng(seed)
    cond, clip = (rng.standard_normal((1, *s), np.float32) for s in ((DIT.enc_emb_dim,), (frames, DIT.mel_dim)))
    return Voice(f"voice {seed}", 0, cond, clip)


def codes(length: int) -> np.ndarray:
    return np.random.default_rng(length).integers(0, DIT.num_embeds + 1, length)


def noise(length: int) -> np.ndarray:
    return np.random.default_rng(length).standard_normal((2 * length, DIT.mel_dim), np.float32)


def pushed(stream: Token2WavStream, rows: list[np.ndarray], seed: int) -> list[np.ndarray]:
    """The samples of rows that come in random pieces, each row at its own pace."""
    rng, at, ended = np.random.default_rng(seed), [0] * len(rows), [False] * len(rows)
    out: list[list[np.ndarray]] = [[] for _ in rows]
    while not all(ended):
        ends = [min(i + int(rng.integers(0, 60)), len(row)) for i, row in zip(at, rows, strict=True)]
        new = [row[i:end] for i, end, row in zip(at, ends, rows, strict=True)]
        ended = [end == len(row) for end, row in zip(ends, rows, strict=True)]
        for pieces, piece in zip(out, stream.push(new, ended), strict=True):
            assert piece.dtype == np.float32 and (np.abs(piece) <= 1).all()
            pieces.append(piece)
        at = ends
    return [np.concatenate(pieces) for pieces in out]


def test_streams_give_what_a_plain_solve_gives(engine: Token2WavEngine) -> None:
    """Rows of several lengths in one batch, two voices, pieces that end anywhere: every sample, and no other."""
    rows, given = [codes(n) for n in LENGTHS], [noise(n) for n in LENGTHS]
    voices = [voice(i % 2, 20 + i % 2) for i in range(len(rows))]
    stream = engine.stream(voices, [0] * len(rows), given)
    made = pushed(stream, rows, seed=1)
    assert [len(samples) for samples in made] == [480 * n for n in LENGTHS]
    params, dit = engine.dit_params, DiT(DIT)
    # every operation of the plain solve runs by itself, which takes long: one row is enough
    checked_voice = voices[CHECKED]
    length = np.array([checked_voice.ref_mel.shape[1]])
    speaker = (np.asarray(encode_speakers(dit, params, checked_voice.ref_mel, length)), checked_voice.cond[0])
    mel = plainly_carried(dit, params, np.repeat(rows[CHECKED], 2), given[CHECKED], speaker)
    (wanted,) = engine.vocode([mel])
    np.testing.assert_allclose(made[CHECKED], wanted, rtol=0, atol=TOLERANCE)
    assert np.abs(wanted).max() > 0.01


@pytest.mark.parametrize("which", ["engine", "distilled"])
def test_the_noise_is_that_of_the_offline_request(which: str, request: pytest.FixtureRequest) -> None:
    """Of a request of two blocks the flow is the same as well."""
    engine = request.getfixturevalue(which)
    rows, voices = [codes(24), codes(20)], [voice(0), voice(1)]
    wanted = engine.synthesize(rows, voices, [None] * 2, [7, 8])
    made = pushed(engine.stream(voices, [7, 8]), rows, seed=2)
    for ours, theirs in zip(made, wanted, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=TOLERANCE)


def test_when_sound_comes(tiny_model: Path) -> None:
    """The DiT is a block of 24 frames behind the codes, the vocoder of these sizes 7 frames behind the mel."""
    engine, row = loaded(TINY.token2wav_config, tiny_model), codes(100)
    stream = engine.stream([voice(0)], [0])
    made = [len(stream.push([row[i : i + 1]], [False])[0]) for i in range(100)]
    packets = [(i + 1, n // 240) for i, n in enumerate(made) if n]
    assert packets == [(36, 3 * 24 - 24 - 7), (60, 48), (84, 48)]
    (rest,) = stream.push([row[:0]], [True])
    assert sum(made) + len(rest) == 480 * 100
    assert len(stream.push([row[:0]], [True])[0]) == 0


def test_the_first_packet_needs_no_window(engine: Token2WavEngine) -> None:
    """The first frames alone, before which there is nothing, give to the bit what a window of the usual step gives."""
    row = codes(36)
    (first,) = engine.stream([voice(0)], [0]).push([row], [False])
    streams = engine.streams
    stream = engine.stream([voice(0)], [0])
    stream._take_codes([row], [False])
    active = np.ones(1, bool)
    chunk = stream._make_chunk({0: 3}, active)
    mel, _ = streams.solve(stream._dit_state, chunk, stream._speaker, is_first=True)
    block, _ = streams.vocode(stream._vocoder_state, mel, active)
    usual = np.asarray(block.values)[np.asarray(block.valid)]
    assert len(first) == 240 * (48 - streams.vocoder.streaming.look_ahead)
    np.testing.assert_array_equal(first, usual)


def test_a_first_packet_that_looks_ahead_less(engine: Token2WavEngine) -> None:
    """It comes after two blocks; all but its end is exact, and so is all behind it."""
    rows, given = [codes(n) for n in (40, 24)], [noise(n) for n in (40, 24)]
    voices = [voice(0), voice(1)]
    exact = pushed(engine.stream(voices, [0] * 2, given), rows, seed=1)
    stream = engine.stream(voices, [0] * 2, given, first_chunk_codes=24, first_look_ahead=3)
    needed = engine.streams.vocoder.streaming.look_ahead
    assert needed == 7
    made = [stream.push([row[:24] for row in rows], [False] * 2)]
    assert [len(piece) for piece in made[0]] == [240 * (24 - 3)] * 2
    made += [stream.push([row[24:] for row in rows], [True] * 2)]
    for row, (first, rest) in enumerate(zip(*made, strict=True)):
        together = np.concatenate([first, rest])
        assert together.shape == exact[row].shape
        error = np.abs(together - exact[row]).reshape(-1, 240).max(axis=1)  # of each frame
        is_early = np.zeros(len(error), bool)
        is_early[24 - needed : 24 - 3] = True
        assert error[~is_early].max() < TOLERANCE
        # the row of 24 codes has a block behind its first one too, so none is exact there
        assert error[is_early].max() > TOLERANCE
    # a row whose codes are all there has nothing to gain from it
    short = engine.stream(voices[:1], [0], given[:1], first_chunk_codes=24, first_look_ahead=3)
    (samples,) = short.push(rows[:1], [True])
    np.testing.assert_allclose(samples, exact[0], rtol=0, atol=TOLERANCE)
    with pytest.raises(InputError, match="first_look_ahead is 8; it must be from 0 to 7"):
        engine.stream(voices[:1], [0], first_look_ahead=8)


@pytest.fixture
def compiled() -> Iterator[list[str]]:
    """The names of what is compiled while a test runs."""
    names: list[str] = []

    def note(event: str, duration: float, **about: Any) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            names.append(str(about.get("fun_name")))

    jax.monitoring.register_event_duration_secs_listener(note)
    yield names
    jax.monitoring.unregister_event_duration_listener(note)


@pytest.mark.parametrize(
    "sizes",
    [
        dict(first_chunk_codes=36, chunk_codes=24, first_look_ahead=None),
        # the mel of the first chunk is shorter than that of later ones
        dict(first_chunk_codes=24, chunk_codes=24, first_look_ahead=3),
    ],
)
def test_nothing_compiles_after_warming_up(
    engine: Token2WavEngine, compiled: list[str], sizes: dict[str, int | None]
) -> None:
    engine.encode_voices([voice(0), voice(1, 25)])
    engine.warm_up_streams(voice(0), **sizes)
    compiled.clear()
    # the first of them ends within its first chunk
    for seed, (a, b) in enumerate([(5, 0), (36, 37), (40, 70)]):
        pushed(engine.stream([voice(3, 25)], [seed], **sizes), [codes(a)], seed)
        pushed(engine.stream([voice(2)], [seed], [noise(b)], **sizes), [codes(b)], seed)
    assert compiled == []


def test_the_counter_of_compilations_counts(compiled: list[str]) -> None:
    jax.jit(lambda x: x + 12345)(np.float32(1))
    assert compiled


def test_dropping_a_stream_frees_it(engine: Token2WavEngine) -> None:
    def held() -> int:
        gc.collect()
        return sum(a.nbytes for a in jax.live_arrays())

    engine.warm_up_streams(voice(0), 36, 24, None)
    before = held()
    stream = engine.stream([voice(0)], [0])
    stream.push([codes(40)], [False])
    assert held() > before
    del stream
    assert held() == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(first_chunk_codes=20), r"first_chunk_codes is 20; .* multiple of 12"),
        (dict(first_chunk_codes=12), r"first_chunk_codes is 12; .* at least 24"),
        (dict(chunk_codes=0), r"chunk_codes is 0; .* multiple of 12"),
        (dict(seeds=[2**32]), r"stream 0: seed is 4294967296"),
        (dict(voices=[voice(0, frames=4)]), r"ref_mel has shape \[1, 4, 80\].* at least 5"),
        (dict(noise=[np.zeros((4, 3))]), r"stream 0: noise has shape \[4, 3\], not \[frames, 80\]"),
    ],
)
def test_errors_at_the_beginning(engine: Token2WavEngine, changes: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {"voices": [voice(0)], "seeds": [0], **changes}
    with pytest.raises(InputError, match=message):
        engine.stream(given.pop("voices"), given.pop("seeds"), **given)


@pytest.mark.parametrize(
    ("rows", "ended", "message"),
    [
        ([[1]], [False], r"1 rows of codes and 1 of ends; this stream has 2"),
        ([[], [66]], [False] * 2, r"stream 1: code 66 is out of range; .* 0 to 65"),
        ([[], [0.5]], [False] * 2, r"stream 1: codes must be a list of integers"),
        ([[1], []], [False] * 2, r"stream 0 has ended and got 1 more codes"),
        ([[], [1] * 16385], [False] * 2, r"stream 1: 16385 codes; .* at most 16384"),
        ([[], [1] * 3], [False] * 2, r"stream 1: noise was given for 4 frames; the codes have 6"),
    ],
)
def test_errors_on_the_way(engine: Token2WavEngine, rows: list[list[Any]], ended: list[bool], message: str) -> None:
    """A push that fails changes nothing: what could be said before can be said after."""
    stream = engine.stream([voice(0), voice(1)], [0, 0], [None, noise(2)])
    stream.push([np.array([], int)] * 2, [True, False])
    with pytest.raises(InputError, match=message):
        stream.push([np.array(row) for row in rows], ended)
    made = stream.push([np.array([], int), np.array([1, 2])], [True, True])
    assert [len(samples) for samples in made] == [0, 960]

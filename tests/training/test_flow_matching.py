"""The flow of Token2Wav is trained: its loss, what it draws, its rows and batches, and whole runs."""

from __future__ import annotations

import dataclasses
import functools
import json
import re
import shutil
import wave
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from omni_jax.checkpoint import store
from omni_jax.checkpoint.train_checkpoints import step_folder
from omni_jax.config import OmniConfig
from omni_jax.data.examples import Reject
from omni_jax.data.sources import Row
from omni_jax.data.speech_examples import PrepareSpeech, SpeechExample
from omni_jax.data.speech_packing import SpeechBatch, SpeechBudget, SpeechPacking
from omni_jax.errors import ConfigError
from omni_jax.models.dit import NULL_CODE, DiT
from omni_jax.models.dit_blocks import pack
from omni_jax.models.speaker_encoder import shortest_clip
from omni_jax.models.token2wav import Token2Wav
from omni_jax.processing.fetch import NO_ACCESS
from omni_jax.processing.voice_clip import read_clip
from omni_jax.training.loop import train
from omni_jax.training.metrics_log import EVALUATIONS_FILE, METRICS_FILE, read_metrics
from omni_jax.training.objectives import make_objective
from omni_jax.training.objectives.flow_matching import Draws, FlowMatching, frame_weights
from omni_jax.training.objectives.packed_speech import valid_frames
from omni_jax.training.optimizer import flatten_params
from omni_jax.training.options import FlowMatchingOptions
from omni_jax.training.recipe import Recipe
from tests.processes import finish, start

MODEL = OmniConfig.tiny()
CONFIG = MODEL.token2wav_config.dit_config
RATE = 16_000
READER = PrepareSpeech(CONFIG, 90, shortest_clip(CONFIG), 60, NO_ACCESS)
BUDGET = SpeechBudget(rows=2, blocks=6, utterances=4, clip_frames=16)
TOLERANCE = 1e-5  # of a loss: float32 sums in another order


def make_example(num_codes: int, clip_frames: int = 0) -> SpeechExample:
    rng = np.random.default_rng(num_codes)
    return SpeechExample(
        codes=rng.integers(0, CONFIG.num_embeds, num_codes).astype(np.int32),
        mel=rng.standard_normal((CONFIG.repeats * num_codes, CONFIG.mel_dim)).astype(np.float32),
        speaker=rng.standard_normal(CONFIG.enc_emb_dim).astype(np.float32),
        clip=rng.standard_normal((clip_frames, CONFIG.mel_dim)).astype(np.float32),
        name=str(num_codes),
    )


def make_packing(prepare: Any = None) -> SpeechPacking:
    return SpeechPacking(prepare, BUDGET, CONFIG)


def make_batch(examples: list[SpeechExample]) -> SpeechBatch:
    packing = make_packing()
    part = packing.new_part()
    assert all(part.place(example) for example in examples)
    return packing.assemble([part], first=0, streams=1)


@pytest.fixture(scope="module")
def params(tiny_model: Path) -> dict[str, Any]:
    return store.load(tiny_model, ["token2wav"])


@functools.partial(jax.jit, static_argnums=(0, 3))
def run_method(dit: DiT, params: Any, arguments: tuple[Any, ...], method: str) -> Any:
    return dit.apply({"params": params}, *arguments, method=method)


def loss_alone(dit: DiT, params: Any, batch: SpeechBatch, draws: Draws, row: int, number: int) -> float:
    """The squared errors of one utterance by itself, by what inference evaluates, weighted and added up."""
    length, begin = int(batch.length[row, number]), int(batch.begin[row, number])
    frames = slice(begin * CONFIG.block_size, begin * CONFIG.block_size + length)
    mel = np.asarray(batch.mel[row]).reshape(-1, CONFIG.mel_dim)[frames]
    noise = np.asarray(draws.noise[row]).reshape(-1, CONFIG.mel_dim)[frames]
    codes = np.asarray(batch.codes[row]).reshape(-1)[frames]
    time = np.float32(draws.time[row, number])
    clip_begin = int(draws.clips.begin[row, number])
    clip_length = int(draws.clips.length[row, number])
    clip = mel[clip_begin : clip_begin + clip_length]
    if not clip_length:
        clip = batch.clip[row, number, : batch.clip_length[row, number]]

    def apply(*arguments: Any, method: str) -> Any:
        return run_method(dit, params, arguments, method)

    voice, silence = apply(clip[None], np.array([len(clip)]), method="speakers")
    cond = batch.speaker[row, number]
    if draws.drops_sound[row, number]:
        voice, cond = silence, np.zeros_like(cond)
    if draws.drops_codes[row, number]:
        codes = np.full_like(codes, NULL_CODE)

    def to_blocks(values: np.ndarray) -> np.ndarray:
        padded = np.zeros((-(-length // CONFIG.block_size) * CONFIG.block_size, *values.shape[1:]), values.dtype)
        padded[:length] = values
        return padded.reshape(-1, CONFIG.block_size, *values.shape[1:])

    blocks, _ = pack([length], CONFIG.block_size, len(to_blocks(codes)))
    num_blocks = len(blocks.valid)
    speakers = np.repeat(np.stack([voice, silence])[None], num_blocks, axis=0)
    conditions = apply(to_blocks(codes), speakers, np.repeat(cond[None], num_blocks, axis=0), method="conditions")
    modulations = jax.tree.map(lambda a: a[0], apply(time[None], method="modulations"))
    noisy = to_blocks((1 - time) * noise + time * mel)
    velocity, _, _ = apply(noisy, conditions, modulations, blocks, method="velocity")
    errors = np.mean((np.asarray(velocity).reshape(-1, CONFIG.mel_dim)[:length] - (mel - noise)) ** 2, axis=1)
    counts = np.ones(length, bool)
    counts[clip_begin : clip_begin + clip_length] = False
    return float(errors[counts].mean() * length)


def test_packed_utterances_have_the_loss_that_they_have_alone(params: dict[str, Any]) -> None:
    """Of all kinds: with and without a clip of their own, and with all that may be dropped."""
    batch = make_batch([make_example(n, clip) for n, clip in ((38, 0), (13, 9), (8, 0), (30, 0), (12, 16), (5, 0))])
    objective = FlowMatching(Token2Wav(MODEL.token2wav_config), FlowMatchingOptions(drop_sound=0.5, drop_all=0.4))
    key = jax.random.key(3)
    draws = jax.device_get(objective.draw(batch, key))
    # of each kind at least one
    places = [tuple(place) for place in np.argwhere(batch.length > 0)]
    kinds = {(bool(draws.drops_sound[place]), bool(draws.drops_codes[place])) for place in places}
    assert len(places) == 6 and kinds == {(False, False), (True, False), (True, True)}
    dit = DiT(CONFIG)
    expected = 0.0
    for row, number in places:
        expected += loss_alone(dit, params["token2wav"]["dit"], batch, draws, row, number)
    denominators = objective.denominators(batch)
    loss = jax.jit(lambda p: objective.loss(p, batch, denominators, key, ()))(params)
    assert float(loss.total) == pytest.approx(expected / batch.length.sum(), rel=TOLERANCE)
    assert float(loss.terms["loss"]) == float(loss.total)


def test_padding_changes_nothing(params: dict[str, Any]) -> None:
    """Neither frames behind an utterance's end nor blocks of no utterance; not even the gradient."""
    objective = FlowMatching(Token2Wav(MODEL.token2wav_config))
    batch = make_batch([make_example(13, 9), make_example(17)])
    padding = ~np.asarray(valid_frames(batch))
    assert padding.any(axis=(1, 2)).all()
    spoiled = dataclasses.replace(batch, mel=np.where(padding[..., None], np.float32(1e3), batch.mel))
    spoiled = dataclasses.replace(spoiled, codes=np.where(padding, 7, batch.codes))
    denominators = objective.denominators(batch)
    gradient = jax.jit(jax.grad(lambda p, b: objective.loss(p, b, denominators, jax.random.key(0), ()).total))
    for ours, theirs in zip(*(jax.tree.leaves(gradient(params, b)) for b in (batch, spoiled)), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-6)


def test_what_is_drawn() -> None:
    objective = FlowMatching(Token2Wav(MODEL.token2wav_config), FlowMatchingOptions(clip_frames=16))
    rng = np.random.default_rng(0)
    shape = (50, 200)
    length = rng.integers(10, 100, shape).astype(np.int32)
    clip_length = np.where(rng.random(shape) < 0.25, 9, 0).astype(np.int32)
    batch: Any = dataclasses.replace(make_batch([]), length=length, clip_length=clip_length)
    draws = jax.device_get(objective.draw(batch, jax.random.key(0)))
    # within four standard deviations
    assert draws.drops_codes.mean() == pytest.approx(0.2, abs=0.016)
    assert draws.drops_sound[~draws.drops_codes].mean() == pytest.approx(0.3, abs=0.02)
    assert draws.drops_sound[draws.drops_codes].all()
    assert draws.time.mean() == pytest.approx(0.5, abs=0.012) and 0 <= draws.time.min() < draws.time.max() < 1
    assert draws.noise.shape == batch.mel.shape
    # a clip of its own for those that have no other
    assert (draws.clips.length[clip_length > 0] == 0).all()
    own = draws.clips.length[clip_length == 0]
    assert own.min() == shortest_clip(CONFIG) and own.max() == 16
    assert (own <= np.maximum(0.3 * length[clip_length == 0], shortest_clip(CONFIG))).all()
    assert (draws.clips.begin >= 0).all() and (draws.clips.begin + draws.clips.length <= length).all()


def test_weights_add_up_to_the_frames() -> None:
    batch = make_batch([make_example(38), make_example(13, 9), make_example(8)])
    draws = FlowMatching(Token2Wav(MODEL.token2wav_config)).draw(batch, jax.random.key(0))
    weights = np.asarray(frame_weights(batch, draws.clips))
    for row, number in np.argwhere(batch.length > 0):
        own = weights[row][np.asarray(batch.utterance[row]) == number]
        assert own.sum() == pytest.approx(batch.length[row, number], rel=1e-6)
        assert (own > 0).sum() == batch.length[row, number] - draws.clips.length[row, number]


def test_each_example_has_one_place() -> None:
    packing = make_packing()
    rng = np.random.default_rng(0)
    for _ in range(20):
        part = packing.new_part()
        placed = [n for n in rng.integers(5, 72, 30).tolist() if part.place(make_example(n))]
        assert placed and part.names == [str(n) for n in placed]
        batch = packing.assemble([part], first=0, streams=1)
        lengths = sorted(int(n) for n in batch.length.flat if n)
        assert lengths == sorted(2 * n for n in placed)
        assert np.asarray(valid_frames(batch)).sum() == sum(lengths)
        for row, number in np.argwhere(batch.length > 0):
            blocks = batch.utterance[row] == number
            assert blocks.sum() == -(-batch.length[row, number] // CONFIG.block_size)
            found = batch.mel[row][blocks].reshape(-1, CONFIG.mel_dim)[: batch.length[row, number]]
            np.testing.assert_array_equal(found, make_example(int(batch.length[row, number]) // 2).mel)


def write_sound(path: Path, num_samples: int, rate: int = RATE, loudest: int = 3000) -> str:
    samples = np.random.default_rng(num_samples).integers(-loudest, loudest + 1, num_samples).astype("<i2")
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(samples.tobytes())
    return path.name


@pytest.fixture(scope="module")
def speech_rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight utterances of unequal length, some with a clip or the vector of a voice."""
    folder = tmp_path_factory.mktemp("speech")
    lines = []
    for i in range(8):
        num_codes = 12 + 5 * i
        row: dict[str, Any] = {"codec_ids": [(7 * i + k) % 60 for k in range(num_codes)]}
        row["audio"] = write_sound(folder / f"{i}.wav", num_codes * RATE // 50)
        if i % 2:
            row["speaker"] = np.linspace(-1, i, CONFIG.enc_emb_dim).tolist()
        if i % 3 == 2:
            row["ref_audio"] = write_sound(folder / f"{i}-voice.wav", RATE // 4, RATE // 2)
        lines.append(json.dumps(row))
    (folder / "rows.jsonl").write_text("\n".join(lines))
    return folder / "rows.jsonl"


def prepare(folder: Path, row: Mapping[str, Any]) -> list[SpeechExample] | Reject:
    return read(READER, folder, row)


def read(reader: PrepareSpeech, folder: Path, row: Mapping[str, Any]) -> list[SpeechExample] | Reject:
    return reader(Row(str(folder / "rows.jsonl"), 1, json.dumps(row).encode()))


def test_a_row_is_read(speech_rows: Path) -> None:
    lines = speech_rows.read_text().splitlines()
    (example,) = prepare(speech_rows.parent, json.loads(lines[5]))
    assert isinstance(example, SpeechExample)
    assert example.mel.shape == (74, 80) and len(example.codes) == 37 == example.num_tokens
    assert example.speaker[-1] == 5 and len(example.clip) == 50
    (other,) = prepare(speech_rows.parent, json.loads(lines[0]))
    assert isinstance(other, SpeechExample)
    assert not other.speaker.any() and len(other.clip) == 0


def test_a_clip_is_what_it_is_in_use(speech_rows: Path) -> None:
    """Its mel is that of the same file as the voice of a reply."""
    folder = speech_rows.parent
    row = json.loads(speech_rows.read_text().splitlines()[0])
    row["ref_audio"] = write_sound(folder / "clip.wav", 3 * RATE // 2)
    found = read(dataclasses.replace(READER, longest_clip=200), folder, row)
    assert isinstance(found, list)
    np.testing.assert_array_equal(found[0].clip, read_clip(folder / "clip.wav").mel)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"codec_ids": []}, r"codec_ids is \[\]; it must be a list of codes, 50 a second"),
        ({"codec_ids": [1, 66]}, "a code of codec_ids is 66; it must be from 0 to 65"),
        ({"codec_ids": [1.5] * 12}, "a code of codec_ids is 1.5; it must be a whole number"),
        ({"codec_ids": [1] * 20}, "its sound has 24 frames, and its 20 codes stand for 40; they may differ by 10"),
        ({"audio": "none.wav"}, "audio 'none.wav': no such file"),
        ({"audio": "../x.wav"}, r"audio '../x.wav': .* is not within .*data.media_root"),
        ({"audio": 3}, "audio int: expected a path or a URL, got 3"),
        ({"audio": "https://example.com/a.wav"}, "audio .*allow-web"),
        ({"ref_audio": "long.wav"}, "the number of frames of ref_audio is 100; it must be from 5 to 60"),
        ({"ref_audio": "silent.wav"}, "the clip is silent: its largest sample is 0"),
        (
            {"audio": "long.wav", "codec_ids": [1] * 54},
            r"it has 50 codes, over the 45 of a row \(data.tokens\); cut it",
        ),
        (
            {"audio": "short.wav", "codec_ids": [1] * 4},
            "the number of frames of its sound is 8; it must be from 10 to 90",
        ),
        ({"speaker": [1.0]}, r"speaker has the shape \[1\]; it must be a list of 12 finite numbers"),
        ({"speaker": "x"}, "speaker is 'x'; it must be a list of 12 numbers"),
        ({"speaker": [float("nan")] * 12}, "finite numbers"),
        ({"voices": "Ethan"}, "unknown keys 'voices'; a row of speech has codec_ids, audio, speaker, ref_audio, codec"),
    ],
)
def test_what_is_wrong_with_a_row(speech_rows: Path, changes: dict[str, Any], reason: str) -> None:
    write_sound(speech_rows.parent / "long.wav", RATE)
    write_sound(speech_rows.parent / "short.wav", RATE // 12)
    write_sound(speech_rows.parent / "silent.wav", RATE // 2, loudest=0)
    row = {**json.loads(speech_rows.read_text().splitlines()[0]), **changes}
    found = prepare(speech_rows.parent, row)
    assert isinstance(found, Reject) and not found.is_fatal
    assert re.search(reason, found.reason), found.reason


def test_rows_of_another_codec_end_a_run(speech_rows: Path) -> None:
    reader = dataclasses.replace(READER, codec="abc")
    row = json.loads(speech_rows.read_text().splitlines()[0])
    # what else rows of speech have is for other objectives
    found = read(reader, speech_rows.parent, {**row, "codec": "abc", "text": "one", "voice": "Ethan"})
    assert not isinstance(found, Reject)
    for other in ({"codec": "abd"}, {}):
        found = read(reader, speech_rows.parent, {**row, **other})
        assert isinstance(found, Reject) and found.is_fatal
        assert re.search(r"codec is ('abd'|None), and the codec of this run is 'abc' \(objective.codec\)", found.reason)


@pytest.fixture
def recipe(make_recipe: Callable[..., Recipe], speech_rows: Path) -> Recipe:
    data = {"train": (str(speech_rows),), "valid": (str(speech_rows),), "rows": 2, "streams": 2, "tokens": 72}
    data["media_root"] = str(speech_rows.parent)
    return make_recipe(
        "token2wav-dit",
        data=data,
        optimizer={"learning_rate": 1e-3, "warmup": 0},
        eval={"every": 6},
        checkpoint={"every": 6},
        steps=12,
    )


def test_a_run(recipe: Recipe, tiny_model: Path, tmp_path: Path) -> None:
    """The loss of held-out rows falls, the vocoder and all else stay, and a run goes on with the same numbers."""
    # its checkpoints hold the average of the DiT (test_alternating.py), and beside the moments what goes on to train
    assert recipe.optimizer.ema == 0.9999
    assert train(recipe, tmp_path / "run")
    held_out = [values["loss"] for values in read_metrics(tmp_path / "run" / EVALUATIONS_FILE)]
    assert len(held_out) == 2 and held_out[1] < held_out[0]
    metrics = read_metrics(tmp_path / "run" / METRICS_FILE)
    assert all(values["tokens"] > 0 and np.isfinite(values["loss"]) for values in metrics)

    trained = step_folder(tmp_path / "run", 12)
    before = flatten_params(store.load(tiny_model, ["thinker", "talker", "token2wav"]))
    after = flatten_params(store.load(trained, ["thinker", "talker", "token2wav"]))
    changed = {path for path in before if not np.array_equal(before[path], after[path])}
    assert changed and all(path.startswith("token2wav/dit/") for path in changed)
    # of the speaker encoder and the embeddings too
    assert {path.split("/")[2] for path in changed} >= {"speaker_encoder", "codec_embed", "layers", "input_proj"}

    moments = flatten_params(store.tree_shapes(trained / "optimizer" / "moments", "moments"))
    assert {path.split("/")[1] for path in moments if path.startswith("trained/")} == {"token2wav"}

    shutil.rmtree(trained)
    assert train(recipe, tmp_path / "run")
    found = read_metrics(tmp_path / "run" / METRICS_FILE)
    assert [values["loss"] for values in found] == [values["loss"] for values in metrics]


@pytest.mark.long
def test_four_devices_have_the_losses_of_one(recipe: Recipe, tmp_path: Path) -> None:
    recipe = dataclasses.replace(recipe, steps=3, data=dataclasses.replace(recipe.data, valid=(), rows=4, streams=4))
    recipe = dataclasses.replace(recipe, optimizer=dataclasses.replace(recipe.optimizer, eps=1e-5))
    assert train(recipe, tmp_path / "one")
    data = recipe.data
    options = ["--init", str(recipe.init), "--data.train", data.train[0], "--data.media-root", str(data.media_root)]
    options += ["--data.rows", "4", "--data.streams", "4", "--data.tokens", "72", "--steps", "3"]
    options += ["--optimizer.learning-rate", "1e-3", "--optimizer.warmup", "0", "--optimizer.eps", "1e-5"]
    mesh = ["--mesh.data", "2", "--mesh.fsdp", "2"]
    finish(start("train.py", "token2wav-dit-tiny", *options, *mesh, "--workdir", str(tmp_path / "four"), devices=4))
    one, four = ([m["loss"] for m in read_metrics(tmp_path / run / METRICS_FILE)] for run in ("one", "four"))
    assert four == pytest.approx(one, rel=TOLERANCE)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(objective={"max_clip": 0.6}), "objective.max_clip is 0.6"),
        (dict(objective={"clip_frames": 8}), "objective.clip_frames is 8"),
        (dict(eval={"samples": 2}), "eval.samples asks for answers, which the flow of Token2Wav does not give"),
        (dict(parts={"llm": Path("x")}), "--parts are of the Thinker, which this recipe does not train"),
        (dict(lora={"rank": 2}), "lora.rank: there are no adapters for this objective"),
        (dict(data={"tokens": 11}), "data.tokens is 11; a row must hold a block of 12 codes"),
        (dict(data={"isolate_media": True}), "data.isolate_media is not there for rows of speech"),
    ],
)
def test_recipes_that_cannot_be(recipe: Recipe, changes: dict[str, dict], message: str, tmp_path: Path) -> None:
    for name, values in changes.items():
        recipe = dataclasses.replace(recipe, **{name: dataclasses.replace(getattr(recipe, name), **values)})
    with pytest.raises(ConfigError, match=message):
        objective: Any = make_objective(recipe)
        objective.abstract_row(recipe.data)
        objective.make_packing(recipe.data, None, 1)

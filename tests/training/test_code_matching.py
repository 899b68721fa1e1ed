"""A tokenizer finds the codes of a Token2Wav that does not train: its losses, its rows and batches, and runs."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from omni_jax.checkpoint import store
from omni_jax.checkpoint.train_checkpoints import step_folder
from omni_jax.config import DiTConfig, OmniConfig
from omni_jax.data.code_matching import MatchingBatch, MatchingExample, MatchingPacking
from omni_jax.data.examples import Reject
from omni_jax.data.sources import Row
from omni_jax.data.speech_examples import UNKNOWN_CODE
from omni_jax.engine.speech_tokenizer_engine import SpeechTokenizerEngine
from omni_jax.errors import ConfigError
from omni_jax.models.speech_tokenizer import SpeechTokenizer, init_params
from omni_jax.processing.processor import Processor
from omni_jax.speech_tokenizer_config import SpeechTokenizerConfig
from omni_jax.training.loop import train
from omni_jax.training.metrics_log import EVALUATIONS_FILE, METRICS_FILE, read_metrics
from omni_jax.training.objectives import make_objective
from omni_jax.training.objectives.code_matching import MatchCodes, pad_table
from omni_jax.training.objectives.packed_speech import valid_frames
from omni_jax.training.optimizer import flatten_params
from omni_jax.training.recipe import RANDOM, Recipe
from tests.training import tones

MODEL = OmniConfig.tiny()
CONFIG = MODEL.token2wav_config.dit_config
TOLERANCE = 1e-5  # of a loss: float32 sums in another order


@pytest.fixture(scope="module")
def sounds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sounds, of every other one of which the codes are known."""
    folder = tmp_path_factory.mktemp("matching")
    lines = []
    for number, text in enumerate(tones.TEXTS):
        tones.write_sound(folder / f"{number}.wav", text)
        row: dict[str, Any] = {"audio": f"{number}.wav", "text": text}
        if number % 2:
            count = 5 * (1 + 5 * len(text.split())) // 2
            row |= {"codec_ids": [(3 * number + k // 4) % 64 for k in range(count)], "codec": "abc"}
        lines.append(json.dumps(row))
    (folder / "rows.jsonl").write_text("\n".join(lines) + "\n")
    return folder / "rows.jsonl"


@pytest.fixture
def recipe(make_recipe: Callable[..., Recipe], sounds: Path) -> Recipe:
    data = {
        "train": (str(sounds),),
        "valid": (str(sounds),),
        "rows": 2,
        "streams": 2,
        "tokens": 120,
        "media_root": None,
    }
    return make_recipe(
        "speech-tokenizer-match",
        data=data,
        objective={"codec": "abc"},
        optimizer={"learning_rate": 3e-3, "warmup": 0},
        eval={"every": 6},
        checkpoint={"every": 6},
        steps=12,
    )


def make_packing(recipe: Recipe, model: Path) -> tuple[MatchCodes, MatchingPacking]:
    objective: Any = make_objective(recipe)
    return objective, objective.make_packing(recipe.data, Processor.load(model), 1)


def read_examples(packing: MatchingPacking, sounds: Path) -> list[MatchingExample]:
    examples = []
    for number, line in enumerate(sounds.read_text().splitlines()):
        found = packing.prepare(Row(str(sounds), number, line.encode()))
        assert not isinstance(found, Reject), found
        examples += found
    return examples


def make_batch(packing: MatchingPacking, examples: list[MatchingExample]) -> MatchingBatch:
    parts = [packing.new_part(), packing.new_part()]
    for number, example in enumerate(examples):
        assert parts[number % 2].place(example)
    return packing.assemble(parts, first=0, streams=2)


@pytest.fixture(scope="module")
def params(tiny_model: Path) -> dict[str, Any]:
    found = store.load(tiny_model, ["token2wav"])
    tokenizer = nn.unbox(init_params(SpeechTokenizer(SpeechTokenizerConfig.tiny()), jax.random.key(0)))
    table = found["token2wav"]["dit"]["codec_embed"]["embedding"]
    tokenizer["quantizer"]["codebook"] = pad_table(table, tokenizer["quantizer"]["codebook"].shape)
    return {**found, "speech_tokenizer": tokenizer}


def test_each_frame_has_the_code_of_its_time(recipe: Recipe, tiny_model: Path, sounds: Path) -> None:
    """Utterances begin a block of their own in both networks; the place of a code is that of its sound."""
    _, packing = make_packing(recipe, tiny_model)
    examples = read_examples(packing, sounds)
    batch = make_batch(packing, examples)
    codes = np.asarray(batch.codes).reshape(2, -1)  # of each row
    mel = np.asarray(batch.audio.mel).reshape(2, codes.shape[1], 2, -1)  # two frames a code
    of_frames = np.asarray(batch.position)
    valid = np.asarray(valid_frames(batch.speech))
    for number, example in enumerate(examples):
        row = number % 2
        own = (np.asarray(batch.speech.utterance[row]) == number // 2)[:, None] & valid[row]
        places = of_frames[row][own]
        assert len(places) == len(example.mel) == len(example.tokenizer_mel)
        np.testing.assert_array_equal(mel[row][places][::2].reshape(-1, 128)[: len(places)], example.tokenizer_mel)
        np.testing.assert_array_equal(codes[row][places], np.repeat(example.codes, 2))
        assert (example.codes == UNKNOWN_CODE).all() != bool(number % 2)


def test_the_loss_is_that_of_the_flow_with_the_codes_that_were_found(
    recipe: Recipe, tiny_model: Path, sounds: Path, params: dict[str, Any]
) -> None:
    objective, packing = make_packing(recipe, tiny_model)
    batch = make_batch(packing, read_examples(packing, sounds))
    denominators = objective.denominators(batch)
    key = jax.random.key(3)
    found = jax.jit(lambda p: objective.loss(p, batch, denominators, key, ()).terms)(params)

    model = objective.model.bind({"params": params["speech_tokenizer"]})
    features = np.asarray(model.features(batch.audio))[..., : CONFIG.emb_dim]
    table = np.asarray(params["token2wav"]["dit"]["codec_embed"]["embedding"])[:64]
    distances = np.square(features[:, :, None] - table).sum(axis=-1)  # [A, S, K]
    codes = distances.argmin(axis=-1)
    assert len(np.unique(codes)) > 3
    of_rows = codes.reshape(2, -1)
    of_frames = np.take_along_axis(of_rows, batch.position.reshape(2, -1), axis=1).reshape(batch.position.shape)
    speech = dataclasses.replace(batch.speech, codes=of_frames)
    flow = objective.flow.loss(params, speech, objective.flow.denominators(speech), key, ())
    assert float(found["flow"]) == pytest.approx(float(flow.total), rel=TOLERANCE)

    known = np.asarray(batch.codes) != UNKNOWN_CODE
    log_probs = np.asarray(jax.nn.log_softmax(-distances))
    own = np.take_along_axis(log_probs, np.maximum(batch.codes, 0)[..., None], axis=-1)[..., 0]
    assert float(found["code_loss"]) == pytest.approx(-own[known].mean(), rel=TOLERANCE)
    assert float(found["code_accuracy"]) == pytest.approx((codes == batch.codes)[known].mean())


def test_the_gradient_passes_straight_through(
    recipe: Recipe, tiny_model: Path, sounds: Path, params: dict[str, Any]
) -> None:
    """What is quantized gets the gradient that the embedding of its code has, and nothing of Token2Wav changes it."""
    recipe = dataclasses.replace(
        recipe, objective=dataclasses.replace(recipe.objective, code_weight=0.0, commitment_weight=0.0)
    )
    objective, packing = make_packing(recipe, tiny_model)
    batch = make_batch(packing, read_examples(packing, sounds))
    denominators = objective.denominators(batch)
    key = jax.random.key(3)
    model = objective.model.bind({"params": params["speech_tokenizer"]})
    codes = np.asarray(model.quantizer.encode(model.features(batch.audio)))
    table = jnp.asarray(params["token2wav"]["dit"]["codec_embed"]["embedding"])

    def flow(embeds: jax.Array) -> jax.Array:
        of_frames = jnp.take_along_axis(
            embeds.reshape(2, -1, CONFIG.emb_dim), batch.position.reshape(2, -1)[..., None], axis=1
        )
        of_frames = of_frames.reshape(*batch.position.shape, -1)
        return objective.flow.sum_errors(params, batch.speech, key, of_frames) / denominators["frames"]

    wanted = jax.jit(jax.grad(flow))(table[codes])  # [A, S, E]
    assert float(jnp.abs(wanted).max()) > 0

    def loss(shift: jax.Array) -> jax.Array:
        # of the bias behind the last layer before the quantizer, which all positions share
        tokenizer = jax.tree.map(lambda a: a, params["speech_tokenizer"])
        bias = tokenizer["front"]["layers"]["mlp"]["down"]["bias"]
        tokenizer["front"]["layers"]["mlp"]["down"]["bias"] = bias.at[-1].add(shift)
        return objective.loss({**params, "speech_tokenizer": tokenizer}, batch, denominators, key, ()).total

    width = objective.model.config.audio_config.d_model
    found = jax.jit(jax.grad(loss))(jnp.zeros(width))
    np.testing.assert_allclose(found[: CONFIG.emb_dim], jnp.sum(wanted, axis=(0, 1)), atol=1e-6)
    np.testing.assert_array_equal(found[CONFIG.emb_dim :], 0)


def test_a_run(recipe: Recipe, tiny_model: Path, tmp_path: Path) -> None:
    """Losses fall, Token2Wav stays to the bit, the codebook is its table, and the tokenizer encodes."""
    assert train(recipe, tmp_path / "run")
    lines = read_metrics(tmp_path / "run" / METRICS_FILE)
    assert lines[-1]["code_loss"] < lines[0]["code_loss"] and 0 <= lines[-1]["code_accuracy"] <= 1
    held_out = read_metrics(tmp_path / "run" / EVALUATIONS_FILE)
    assert held_out[1]["loss"] < held_out[0]["loss"] and held_out[1]["flow"] > 0
    trained = step_folder(tmp_path / "run", 12)
    before = flatten_params(store.load(tiny_model, ["token2wav"]))
    after = store.load(trained, ["token2wav", "speech_tokenizer"])
    for path, value in before.items():
        np.testing.assert_array_equal(flatten_params(after)[path], value)
    codebook = after["speech_tokenizer"]["quantizer"]["codebook"]
    table = before["token2wav/dit/codec_embed/embedding"]
    np.testing.assert_array_equal(codebook[:, : CONFIG.emb_dim], table[: len(codebook)])
    assert not codebook[:, CONFIG.emb_dim :].any()
    (codes,) = SpeechTokenizerEngine.load(trained).encode([np.zeros(tones.RATE, np.float32)])
    assert len(codes) == 50
    # killed behind the sixth step, it goes on with the same numbers
    step_folder(tmp_path / "run", 12).rename(tmp_path / "away")
    assert train(recipe, tmp_path / "run")
    again = read_metrics(tmp_path / "run" / METRICS_FILE)
    assert [line["loss"] for line in again] == [line["loss"] for line in lines]


def test_what_a_model_has_spoken_is_a_row(recipe: Recipe, tiny_model: Path, sounds: Path) -> None:
    """Rows of tools/self_distill.py are read like those with the same sound and codes."""
    _, packing = make_packing(recipe, tiny_model)
    speech = {"codec_ids": [3] * 15, "codec": "abc"}
    spoken = {"text": "top", "speech": {**speech, "voice": "Ben"}, "sound": "1.wav", "word_errors": 0.0}
    found = []
    for row in (spoken, {"audio": "1.wav", **speech}):
        (example,) = packing.prepare(Row(str(sounds), 1, json.dumps(row).encode()))
        found.append(example)
    for name in ("codes", "mel", "tokenizer_mel"):
        np.testing.assert_array_equal(getattr(found[0], name), getattr(found[1], name))


@pytest.mark.parametrize(
    ("row", "reason", "is_fatal"),
    [
        (
            {"audio": "1.wav", "codec_ids": [64] * 15, "codec": "abc"},
            "the largest code .* is 64; .* from 0 to 63",
            False,
        ),
        ({"audio": "1.wav", "codec_ids": [1] * 15, "codec": "abd"}, "codec is 'abd', .* this run is 'abc'", True),
        ({"audio": "1.wav", "codec_ids": [1] * 60, "codec": "abc"}, "its sound has 30 frames, and its 60 codes", False),
        ({"audio": "1.wav", "codec_ids": [], "codec": "abc"}, r"codec_ids is \[\]", False),
    ],
)
def test_what_is_wrong_with_a_row(
    recipe: Recipe, tiny_model: Path, sounds: Path, row: Mapping[str, Any], reason: str, is_fatal: bool
) -> None:
    _, packing = make_packing(recipe, tiny_model)
    found = packing.prepare(Row(str(sounds), 1, json.dumps(row).encode()))
    assert isinstance(found, Reject) and found.is_fatal is is_fatal
    assert re.search(reason, found.reason), found.reason


def test_recipes_that_cannot_be(recipe: Recipe, tmp_path: Path) -> None:
    options: Any = recipe.objective

    def make(dit: DiTConfig = CONFIG, **changes: Any) -> Recipe:
        token2wav = dataclasses.replace(MODEL.token2wav_config, dit_config=dit)
        tokenizer = dataclasses.replace(options.model, **changes)
        return dataclasses.replace(
            recipe,
            model=dataclasses.replace(MODEL, token2wav_config=token2wav),
            objective=dataclasses.replace(options, model=tokenizer),
        )

    with pytest.raises(ConfigError, match="the tokenizer has 67 codes, and the DiT 66"):
        make_objective(make(codebook_size=67))
    with pytest.raises(ConfigError, match="the codebook is 32 wide, less than the 40 of the embedding of a code"):
        make_objective(make(DiTConfig.tiny(emb_dim=40)))
    with pytest.raises(ConfigError, match="a code of the DiT is 4 frames, and one of the tokenizer 2"):
        make_objective(make(DiTConfig.tiny(repeats=4)))
    with pytest.raises(ConfigError, match="has no token2wav, whose codes are to be found"):
        train(dataclasses.replace(recipe, init=RANDOM, files="tiny"), tmp_path / "run")

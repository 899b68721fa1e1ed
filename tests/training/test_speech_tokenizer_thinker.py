"""The speech tokenizer is trained through a Thinker, which writes down what it is given in place of sound."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import pytest

from configs import RECIPES
from omni_jax.batch import NO_FEATURE, AudioBlocks, OmniBatch
from omni_jax.checkpoint import store
from omni_jax.checkpoint.train_checkpoints import step_folder
from omni_jax.config import AudioEncoderConfig, OmniConfig
from omni_jax.data.examples import Reject
from omni_jax.data.sources import Row
from omni_jax.data.transcribed_dialogues import DialogueBatch, DialogueExample, DialoguePacking
from omni_jax.errors import ConfigError
from omni_jax.models.audio_encoder import valid_positions
from omni_jax.models.speech_tokenizer import SpeechTokenizer, init_params
from omni_jax.processing.layout import audio_tokens
from omni_jax.processing.processor import Processor
from omni_jax.training.loop import train
from omni_jax.training.metrics_log import METRICS_FILE, read_metrics
from omni_jax.training.objectives import make_objective
from omni_jax.training.objectives.speech_tokenizer import TokenizeSpeech
from omni_jax.training.optimizer import flatten_params
from omni_jax.training.recipe import Recipe

CONFIG = OmniConfig.tiny()
TOLERANCE = 2e-5  # of a loss of about 6: float32 sums in another order


@pytest.fixture
def recipe(make_recipe: Callable[..., Recipe], tone_rows: Path) -> Recipe:
    data = {"train": (str(tone_rows),), "rows": 2, "streams": 2, "tokens": 120, "media_root": None}
    return make_recipe(
        "speech-tokenizer-thinker",
        data=data,
        objective={"unquantized": 0.0},
        optimizer={"learning_rate": 3e-3, "warmup": 0},
        phases=(dataclasses.replace(RECIPES["speech-tokenizer-thinker-tiny"].phases[0], steps=None),),
        steps=6,
    )


@pytest.fixture(scope="module")
def params(tiny_model: Path) -> dict[str, Any]:
    found = store.load(tiny_model, ["thinker"])
    model = SpeechTokenizer(RECIPES["speech-tokenizer-thinker-tiny"].objective.model)
    tokenizer = nn.unbox(init_params(model, jax.random.key(0)))
    codebook = np.random.default_rng(0).standard_normal(tokenizer["quantizer"]["codebook"].shape)
    tokenizer["quantizer"]["codebook"] = codebook.astype(np.float32)
    return {**found, "speech_tokenizer": tokenizer}


def make_packing(recipe: Recipe, model: Path) -> tuple[TokenizeSpeech, DialoguePacking]:
    objective: Any = make_objective(recipe)
    return objective, objective.make_packing(recipe.data, Processor.load(model), 1)


def read_examples(packing: DialoguePacking, rows: Path) -> list[DialogueExample]:
    examples = []
    for number, line in enumerate(rows.read_text().splitlines()):
        found = packing.prepare(Row(str(rows), number, line.encode()))
        assert not isinstance(found, Reject), found
        examples += found
    return examples


def output_alone(objective: TokenizeSpeech, params: dict[str, Any], mel: np.ndarray) -> np.ndarray:
    """What the tokenizer gives for a sound, block by block."""
    size = objective.model.config.audio_config.block_frames
    model = objective.model.bind({"params": params["speech_tokenizer"]})
    outputs = []
    for begin in range(0, len(mel), size):
        block = mel[begin : begin + size]
        padded = np.zeros((1, size, mel.shape[1]), np.float32)
        padded[0, : len(block)] = block
        audio = AudioBlocks(padded, np.array([len(block)], np.int32))
        vectors, _ = model.quantize(model.features(audio))
        output = model.output(model.hidden(model.project(vectors), valid_positions(audio)))
        outputs.append(np.asarray(output[0, : (len(block) + 1) // 2 // 2]))
    return np.concatenate(outputs)


def loss_alone(objective: TokenizeSpeech, params: dict[str, Any], example: DialogueExample) -> tuple[float, float]:
    """The loss of an example's answer, added up, in a sequence with nothing else in it; and how many targets it has."""
    assert objective.thinker is not None
    output = output_alone(objective, params, example.speech.mel)
    dialogue = example.dialogue
    is_sound = dialogue.tokens == CONFIG.thinker_config.audio_token_index
    # one for each 40 ms, in order
    assert is_sound.sum() == len(output) == audio_tokens(len(example.speech.mel))
    index = np.where(is_sound, np.cumsum(is_sound) - 1, NO_FEATURE).astype(np.int32)
    batch = OmniBatch(
        tokens=dialogue.tokens[None],
        segment_ids=np.ones((1, len(index)), np.int32),
        media_index=index[None],
        spans=dialogue.spans,
    )
    model = objective.thinker.model
    hidden: Any = model.apply({"params": params["thinker"]}, batch, [output], method="hidden_of_features")
    logits: Any = model.apply({"params": params["thinker"]}, hidden[0, :-1], method="logits")
    log_probs = np.asarray(jax.nn.log_softmax(logits))
    own = -log_probs[np.arange(len(log_probs)), dialogue.tokens[1:]]
    return float((own * dialogue.weights[1:]).sum()), float(dialogue.weights[1:].sum())


def test_packed_utterances_have_the_loss_that_they_have_alone(
    recipe: Recipe, tiny_model: Path, tone_rows: Path, params: dict[str, Any]
) -> None:
    objective, packing = make_packing(recipe, tiny_model)
    examples = read_examples(packing, tone_rows)
    parts = [packing.new_part(), packing.new_part()]
    for number, example in enumerate(examples):
        assert parts[number % 2].place(example)
    batch: DialogueBatch = packing.assemble(parts, first=0, streams=2)
    assert (batch.speech.length > 0).sum(axis=1).tolist() == [3, 3]
    denominators = objective.denominators(batch)
    loss = jax.jit(lambda p: objective.loss(p, batch, denominators, jax.random.key(0), ()).terms)(params)
    found = [loss_alone(objective, params, example) for example in examples]
    expected = sum(total for total, _ in found) / sum(weight for _, weight in found)
    assert float(loss["next_token"]) == pytest.approx(expected, rel=TOLERANCE)


def test_the_processes_of_a_run_count_features_alike(recipe: Recipe, tiny_model: Path, tone_rows: Path) -> None:
    """What two processes put together is what one puts together."""
    _, packing = make_packing(recipe, tiny_model)
    parts = [packing.new_part(), packing.new_part()]
    for number, example in enumerate(read_examples(packing, tone_rows)):
        assert parts[number % 2].place(example)
    whole = packing.assemble(parts, first=0, streams=2)
    halves = [packing.assemble([part], first=i, streams=2) for i, part in enumerate(parts)]
    joined = np.concatenate([np.asarray(half.dialogues.inputs.media_index) for half in halves])
    np.testing.assert_array_equal(joined, whole.dialogues.inputs.media_index)
    assert joined.max() > 0
    # as many features as there are
    row_blocks = packing.speech.budget.blocks
    assert joined.max() < 2 * row_blocks * packing.speech.config.audio_config.block_tokens
    fill = packing.measure_fill(whole)
    assert fill["utterances"] == 6 and 0 < fill["target_tokens"] < fill["tokens"] < 1


def test_a_run(recipe: Recipe, tiny_model: Path, tmp_path: Path) -> None:
    """The Thinker's loss falls for what the tokenizer learns; the Thinker stays to the bit."""
    assert train(recipe, tmp_path / "run")
    lines = read_metrics(tmp_path / "run" / METRICS_FILE)
    assert lines[-1]["next_token"] < lines[0]["next_token"] and lines[-1]["content"] < lines[0]["content"]
    trained = step_folder(tmp_path / "run", 6)
    assert "speech_tokenizer" in store.components(trained)
    before = flatten_params(store.load(tiny_model, ["thinker"]))
    after = flatten_params(store.load(trained, ["thinker"]))
    for path, value in before.items():
        np.testing.assert_array_equal(after[path], value)


def test_what_cannot_be(recipe: Recipe, tiny_model: Path, tone_rows: Path) -> None:
    _, packing = make_packing(dataclasses.replace(recipe, objective=_options(recipe, positions=20)), tiny_model)
    found = packing.prepare(Row(str(tone_rows), 0, tone_rows.read_bytes().splitlines()[0]))
    assert isinstance(found, Reject) and "over the limit of 20" in found.reason
    options: Any = recipe.objective
    wide = dataclasses.replace(options.model, audio_config=AudioEncoderConfig.tiny(output_dim=40))
    with pytest.raises(ConfigError, match="the output of the tokenizer is 40 wide, and the Thinker 48"):
        make_objective(dataclasses.replace(recipe, objective=_options(recipe, model=wide)))


def _options(recipe: Recipe, **changes: Any) -> Any:
    return dataclasses.replace(recipe.objective, **changes)

"""Training of low-rank adapters: what trains, what it begins from, kernels in 8 and 4 bits, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import unflatten_dict

from configs import RECIPES
from omni_jax.checkpoint import store
from omni_jax.checkpoint.lora import LORA
from omni_jax.checkpoint.train_checkpoints import step_folder
from omni_jax.config import OmniConfig
from omni_jax.errors import ConfigError
from omni_jax.layers.quantized import QuantizedKernel
from omni_jax.models.thinker import Thinker
from omni_jax.training.dry_run import estimate_memory, summarize_parameters
from omni_jax.training.loop import train
from omni_jax.training.metrics_log import METRICS_FILE, SAMPLES_FILE, read_metrics
from omni_jax.training.objectives import make_objective
from omni_jax.training.objectives.lora import LoRA, add_lora
from omni_jax.training.objectives.next_token import NextToken
from omni_jax.training.optimizer import flatten_params, split_params
from omni_jax.training.options import NextTokenOptions
from omni_jax.training.recipe import EvalConfig, LoRAOptions, OptimizerConfig, Recipe
from omni_jax.training.step import TrainState, TrainStep
from tests.adapters import add_adapter
from tests.training.examples import make_batch, make_examples

CONFIG = OmniConfig.tiny()
TARGETS = r"thinker/(decoder/layers|audio_encoder/layers).*"
TOLERANCE = 2e-5  # of the largest gradient; float32 products in another order


def make_lora(inner: NextToken, **options) -> LoRA:
    return add_lora(inner, CONFIG, LoRAOptions(rank=3, alpha=6.0, targets=TARGETS, **options))


@pytest.fixture(scope="module")
def inner() -> NextToken:
    return NextToken(Thinker(CONFIG.thinker_config, remat="full"), CONFIG, NextTokenOptions(chunk=16))


def loss_and_gradients(objective: LoRA, params: dict, batch):
    scales = {path: 1.0 for path in flatten_params(params) if path.startswith("lora/")}
    step = TrainStep(objective, OptimizerConfig(), scales, num_steps=10)
    trained, frozen = split_params(params, scales)
    state = TrainState(jnp.int32(0), trained, objective.convert_frozen(frozen), None)
    found = jax.jit(step.loss_and_gradients)(state, batch)
    terms = found.terms
    gradients = found.gradients
    return float(terms["loss"]), flatten_params(gradients)


@pytest.fixture(scope="module")
def params(inner: NextToken) -> dict:
    """Random numbers, none of which is 0."""
    rng = np.random.default_rng(1)
    shapes = nn.unbox(make_lora(inner).abstract_params())
    return jax.tree.map(lambda a: (0.3 * rng.standard_normal(a.shape)).astype(np.float32), shapes)


def test_gradients_are_those_of_the_merged_kernels(inner: NextToken, params: dict) -> None:
    """By the chain rule: of y = (W + s A B) x those of A and B follow from that of W."""
    batch = make_batch(make_examples(["text", "audio"], CONFIG), CONFIG)
    objective = make_lora(inner)
    loss, found = loss_and_gradients(objective, params, batch)
    merged = flatten_params({"thinker": params["thinker"]})
    adapters = flatten_params(params[LORA])
    pairs = {module: (adapters[f"{module}/a"], adapters[f"{module}/b"]) for module in objective.linear_maps}
    products = {}
    for module, linear_map in objective.linear_maps.items():
        a, b = pairs[module]
        letters = "abc"[: len(linear_map.inputs)], "xyz"[: len(linear_map.outputs)]
        products[module] = f"l{letters[0]}r,lr{letters[1]}->l{letters[0]}{letters[1]}", letters
        merged[f"{module}/kernel"] = merged[f"{module}/kernel"] + 2.0 * np.einsum(products[module][0], a, b)
    full = TrainStep(inner, OptimizerConfig(), dict.fromkeys(merged, 1.0), num_steps=10)
    trained = unflatten_dict(merged, sep="/")
    result = jax.jit(full.loss_and_gradients)(TrainState(jnp.int32(0), trained, {}, None), batch)
    assert float(result.terms["loss"]) == pytest.approx(loss, rel=1e-5)
    of_kernels = flatten_params(result.gradients)
    for module, (a, b) in pairs.items():
        _, (inputs, outputs) = products[module]
        kernel = 2.0 * np.asarray(of_kernels[f"{module}/kernel"])
        expected = {
            "a": np.einsum(f"l{inputs}{outputs},lr{outputs}->l{inputs}r", kernel, b),
            "b": np.einsum(f"l{inputs}{outputs},l{inputs}r->lr{outputs}", kernel, a),
        }
        for name, gradient in expected.items():
            largest = np.abs(gradient).max()
            assert np.abs(found[f"lora/{module}/{name}"] - gradient).max() < 20 * TOLERANCE * largest, (module, name)


def test_quantised_kernels_train_as_their_values(inner: NextToken, params: dict) -> None:
    """In 8 bits, as are those of the tiny model where 4 are asked for: it has no whole groups of inputs."""
    batch = make_batch(make_examples(["text", "audio"], CONFIG), CONFIG)
    objective = make_lora(inner, base="int4")
    frozen = objective.convert_frozen({"thinker": params["thinker"]})
    quantized = {p: leaf for p, leaf in flatten_params(frozen).items() if isinstance(leaf, QuantizedKernel)}
    assert set(quantized) == {f"{module}/kernel" for module in objective.linear_maps}
    widened = dict(flatten_params(frozen))
    for module, linear_map in objective.linear_maps.items():
        leaf = widened[f"{module}/kernel"]
        # one scale for each output
        scale = np.asarray(leaf.scale).reshape(len(leaf.scale), *[1] * linear_map.num_inputs, *linear_map.outputs)
        widened[f"{module}/kernel"] = np.asarray(leaf.values, np.float32) * scale
    loss, found = loss_and_gradients(objective, params, batch)
    plain = unflatten_dict(widened, sep="/")["thinker"]
    expected_loss, expected = loss_and_gradients(make_lora(inner), {**params, "thinker": plain}, batch)
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    largest = max(float(np.abs(g).max()) for g in expected.values())
    for path, gradient in expected.items():
        assert np.abs(found[path] - gradient).max() < TOLERANCE * largest, path


def test_what_a_run_saves(make_text_recipe: Callable[..., Recipe], tiny_model: Path, tmp_path: Path) -> None:
    """It trains adapters alone, keeps them alone, and goes on where it was; with the factored optimizer."""
    recipe = make_text_recipe(
        "thinker-lora",
        steps=4,
        lora={"base": "int8"},
        optimizer={"kind": "adafactor"},
        data={"valid": make_text_recipe().data.train},
        eval={"every": 4, "samples": 1, "max_tokens": 2},
    )
    assert train(recipe, tmp_path / "run")
    (sample,) = read_metrics(tmp_path / "run" / SAMPLES_FILE)
    assert sample["answer"] and not sample["answer"].startswith("error")
    first, last = (step_folder(tmp_path / "run", step) for step in (2, 4))
    trees = [store.load(folder) for folder in (first, last)]
    changed = {
        p for p, leaf in flatten_params(trees[0]).items() if not np.array_equal(leaf, flatten_params(trees[1])[p])
    }
    assert changed == {path for path in flatten_params(trees[0]) if path.startswith("lora/")}
    # the model is a hard link and takes no room
    for file in (tiny_model / "params" / "thinker").rglob("*"):
        if file.is_file():
            assert (last / "params" / "thinker" / file.relative_to(tiny_model / "params" / "thinker")).samefile(file)
    expected = [values["loss"] for values in read_metrics(tmp_path / "run" / METRICS_FILE)]
    shutil.rmtree(last)
    assert train(recipe, tmp_path / "run")
    assert [values["loss"] for values in read_metrics(tmp_path / "run" / METRICS_FILE)] == expected
    again = flatten_params(store.load(last)[LORA])
    assert all(np.array_equal(again[path], leaf) for path, leaf in flatten_params(trees[1][LORA]).items())
    # another run goes on with the adapter
    more = dataclasses.replace(recipe, init=tmp_path / "run", steps=1, eval=EvalConfig())
    more = dataclasses.replace(more, data=dataclasses.replace(more.data, valid=()))
    assert train(more, tmp_path / "more")
    assert read_metrics(tmp_path / "more" / METRICS_FILE)[0]["loss"] != expected[0]


def test_adapters_begin_with_nothing_to_add(inner: NextToken) -> None:
    objective = make_lora(inner)
    adapters = flatten_params(objective.init_params(LORA, jax.random.key(0)))
    shapes = flatten_params(nn.unbox(objective.abstract_params())[LORA])
    assert {path: leaf.shape for path, leaf in adapters.items()} == {path: leaf.shape for path, leaf in shapes.items()}
    values = [np.ravel(leaf) for path, leaf in adapters.items() if path.endswith("/a")]
    assert all(np.std(a) > 0.01 for a in values) and len({float(a[0]) for a in values}) == len(values)
    assert not any(np.any(leaf) for path, leaf in adapters.items() if path.endswith("/b"))


def test_what_cannot_train(make_recipe: Callable[..., Recipe], tiny_model: Path, tmp_path: Path) -> None:
    recipe = make_recipe("thinker-lora")
    for changes, message in (
        ({"lora": {"targets": "thinker/decoder/.*"}}, "matches thinker/decoder/head, which can have no adapter"),
        ({"lora": {"targets": "decoder"}}, "no linear map's whole path matches 'decoder'"),
        ({"lora": {"targets": "("}}, "is no regular expression"),
        ({"lora": {"rank": 2000}}, "lora.rank is 2000"),
        ({"phases": RECIPES["thinker-sft-tiny"].phases}, "only paths below lora/ can train"),
    ):
        with pytest.raises(ConfigError, match=message):
            make_objective(make_recipe("thinker-lora", **changes))
    # adapters that a run would drop, or that are of another rank
    add_adapter(tiny_model, tmp_path / "other", "thinker/decoder/layers/.*", rank=2, alpha=1.0)
    for name in ("thinker-lora", "thinker-sft"):
        with pytest.raises(
            ConfigError, match=r"has an adapter \(lora.json\), and this run has none, or one of another"
        ):
            train(make_recipe(name, init=tmp_path / "other"), tmp_path / name)
    assert json.loads((tmp_path / "other" / "lora.json").read_text())["rank"] == 2
    assert recipe.lora.rank == 16


def test_a_dry_run_shows_adapters(make_recipe: Callable[..., Recipe]) -> None:
    recipe = make_recipe("thinker-lora", lora={"base": "int8"}, dtype="bfloat16")
    parameters = {summary.path: summary for summary in summarize_parameters(recipe, recipe.phases[0])}
    query = parameters["thinker/decoder/layers/attention/query/kernel"]
    assert query.dtype == "int8" and query.learning_rate is None
    assert parameters["lora/thinker/decoder/layers/attention/query/a"].dtype == "float32"
    full = estimate_memory(make_recipe("thinker-sft", dtype="bfloat16"), RECIPES["thinker-sft-tiny"].phases[0])
    found = estimate_memory(recipe, recipe.phases[0])
    assert found["moments of the optimizer"] < full["moments of the optimizer"] / 3


def test_flops_are_those_of_the_adapters(inner: NextToken) -> None:
    """2 n p forward and for the gradient of positions, nothing for that of kernels, 6 n p of each adapter."""
    objective = make_lora(inner)
    sizes = {
        path: int(np.prod(leaf.shape)) for path, leaf in flatten_params(nn.unbox(objective.abstract_params())).items()
    }
    counts = {"tokens": 10, "pairs": 0.0}
    trained = [path for path in sizes if path.startswith("lora/")]
    layers = sum(
        size for path, size in sizes.items() if path.startswith("thinker/decoder/layers/") and path.endswith("kernel")
    )
    adapters = sum(size for path, size in sizes.items() if path.startswith("lora/thinker/decoder/layers/"))
    head = sizes["thinker/decoder/head/kernel"]
    assert objective.count_flops(sizes, trained, counts) == pytest.approx(10 * (4 * layers + 4 * head + 6 * adapters))

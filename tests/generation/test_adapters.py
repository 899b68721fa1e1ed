"""Adapters of a model that serves: merged, beside the kernels, and several that requests choose from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import omni_jax
import serve
from omni_jax.checkpoint import store
from omni_jax.checkpoint.export import to_hf
from omni_jax.checkpoint.lora import LORA
from omni_jax.checkpoint.peft import read_adapter, write_adapter
from omni_jax.config import OmniConfig
from omni_jax.engine.warmup import Compilations
from omni_jax.errors import CheckpointError, InputError
from omni_jax.generation.adapters import attach_table, merge_adapter
from omni_jax.models.thinker import Thinker
from tests.adapters import add_adapter
from tests.training.examples import make_batch, make_examples

TARGETS = r"thinker/(decoder/layers|audio_encoder/layers|vision_encoder).*"
TOLERANCE = 1e-5  # of the largest hidden state: float32 products in another order
LONG = "Name a colour. " * 40  # more than a block of prompts
MESSAGES = [[{"role": "user", "content": LONG + text}] for text in ("One.", "Two.", "Three.", "Four.")]
CHOICE = [None, "one", "two", "one"]


@pytest.fixture(scope="module")
def adapters(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two adapters of other ranks and maps; one of them as peft has it."""
    folder = tmp_path_factory.mktemp("adapters")
    add_adapter(tiny_model, folder / "one", TARGETS, rank=3, alpha=4.0)
    add_adapter(tiny_model, folder / "second", r"thinker/decoder/layers/.*(query|down)", rank=5, alpha=9.0, seed=1)
    write_adapter(folder / "second", folder / "two")
    return {"one": folder / "one", "two": folder / "two"}


@pytest.fixture(scope="module")
def model(tiny_model: Path, adapters: dict[str, Path]) -> omni_jax.OmniModel:
    return omni_jax.load(tiny_model, components=["thinker"], adapters=adapters)


def with_adapter(model: omni_jax.OmniModel, **options: Any) -> list[tuple[int, ...]]:
    """The ids of all dialogues, one after the other."""
    return [
        model.generate(messages, adapter=adapter, **options).token_ids
        for messages, adapter in zip(MESSAGES, CHOICE, strict=True)
    ]


def test_merged_and_beside_the_kernels_are_the_same(tiny_model: Path, adapters: dict[str, Path]) -> None:
    config = OmniConfig.load(tiny_model)
    params = store.load(tiny_model, ["thinker"])
    thinker = Thinker(config.thinker_config)
    batch = make_batch(make_examples(["image", "audio"], config), config)
    hidden = jax.jit(lambda params: thinker.apply({"params": params}, batch.inputs, method=Thinker.hidden))
    base = np.asarray(hidden(params["thinker"]))
    for name, folder in adapters.items():
        adapter = read_adapter(folder, config)
        merged = np.asarray(hidden(merge_adapter(params, adapter)["thinker"]))
        beside = np.asarray(hidden(attach_table(params["thinker"], {name: adapter}, np.float32)))
        largest = np.abs(merged).max()
        assert np.abs(merged - beside).max() < TOLERANCE * largest
        assert np.abs(merged - base).max() > 1000 * TOLERANCE * largest


def test_requests_choose_their_adapter(model: omni_jax.OmniModel, tiny_model: Path, adapters: dict[str, Path]) -> None:
    """Each row of a batch has the answer of a model with its adapter alone, and so has each alone."""
    options: dict[str, Any] = dict(max_tokens=6, temperature=0.0)
    alone = {
        None: omni_jax.load(tiny_model, components=["thinker"]),
        # the adapter of a checkpoint is merged
        "one": omni_jax.load(adapters["one"], components=["thinker"]),
        "two": omni_jax.load(adapters["two"].with_name("second"), components=["thinker"]),
    }
    expected = [
        alone[adapter].generate(messages, **options).token_ids
        for messages, adapter in zip(MESSAGES, CHOICE, strict=True)
    ]
    assert len(set(expected)) > 2
    assert with_adapter(model, **options) == expected
    scheduler = model.scheduler(omni_jax.generation.model.SchedulerConfig(4, 4))
    states = {}
    for messages, adapter in zip(MESSAGES, CHOICE, strict=True):
        chosen = omni_jax.generation.options.Options.create(adapter=adapter, **options)
        states[model.submit(scheduler, model.processor(messages), chosen)] = len(states)
    found = {states[state]: event.reply.token_ids for state, event in scheduler.run() if event.reply is not None}
    assert [found[number] for number in range(4)] == expected


@pytest.mark.long
def test_nothing_is_compiled_after_the_warm_up(tiny_model: Path, adapters: dict[str, Path]) -> None:
    model = omni_jax.load(tiny_model, components=["thinker"], adapters=adapters)
    model.warmup(tokens=1024, windows=0, batch_size=4)
    with Compilations() as compilations:
        with_adapter(model, max_tokens=3)
        assert all(
            reply.error is None for reply in model.generate_batch(MESSAGES, batch_size=4, max_tokens=3, adapter="two")
        )
    assert not compilations.count


@pytest.mark.long
def test_a_quantised_model_with_an_adapter(tiny_model: Path, adapters: dict[str, Path]) -> None:
    model = omni_jax.load(tiny_model, components=["thinker"], adapters=adapters, quantization="int8")
    base, one, two, _ = with_adapter(model, max_tokens=6, temperature=0.0)
    assert len({base, one, two}) == 3


def test_an_adapter_that_is_not_there(model: omni_jax.OmniModel) -> None:
    with pytest.raises(InputError, match="adapter is 'three'; there are: one, two"):
        model.generate(MESSAGES[0], adapter="three")
    with pytest.raises(InputError, match="adapter is 3; it must be a name"):
        model.generate(MESSAGES[0], adapter=3)


def test_adapters_that_cannot_be_used(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="has no adapter"):
        omni_jax.load(tiny_model, adapters={"one": tiny_model})
    add_adapter(tiny_model, tmp_path / "talker", "talker/decoder/layers/.*", rank=2, alpha=2.0)
    with pytest.raises(CheckpointError, match="requests can choose adapters of the Thinker alone"):
        omni_jax.load(tiny_model, adapters={"one": tmp_path / "talker"})


def test_an_adapter_is_merged_where_it_is_exported(tiny_model: Path, adapters: dict[str, Path], tmp_path: Path) -> None:
    from omni_jax.checkpoint.convert import to_jax

    to_hf(adapters["one"], tmp_path / "torch")
    to_jax(tmp_path / "torch", tmp_path / "back")
    config = OmniConfig.load(tiny_model)
    expected = merge_adapter(store.load(tiny_model), read_adapter(adapters["one"], config))
    found = store.load(tmp_path / "back")
    assert LORA not in found
    for name, tree in expected.items():
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), found[name], tree)


def test_lines_of_a_batch_choose(
    tiny_model: Path, adapters: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """On the command line; a name that there is not costs its own line."""
    lines = []
    for number, adapter in enumerate(["one", None, "two", "three"]):
        body = {"messages": MESSAGES[0], "adapter": adapter, "max_completion_tokens": 6}
        line = {"custom_id": str(number), "method": "POST", "url": "/v1/chat/completions", "body": body}
        lines.append(json.dumps(line))
    (tmp_path / "requests.jsonl").write_text("\n".join(lines) + "\n")
    files = ["-i", str(tmp_path / "requests.jsonl"), "-o", str(tmp_path / "results.jsonl")]
    names = [part for name, folder in adapters.items() for part in (name, str(folder))]
    options = ["--slots", "4", "--workers", "1", "--warmup-tokens", "0"]
    assert serve.main(["batch", "--model", str(tiny_model), *files, *options, "--adapters", *names]) == 0
    results = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    results.sort(key=lambda result: result["custom_id"])
    texts = [result["response"]["body"]["choices"][0]["message"]["content"] for result in results[:3]]
    assert len(set(texts)) == 3
    assert results[3]["error"]["message"] == "adapter is 'three'; there are: one, two"

"""Adapters in peft's format, both ways: the logits of PyTorch's peft are ours."""

from __future__ import annotations

import copy
import re
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file

from omni_jax.checkpoint.lora import LORA_FILE
from omni_jax.checkpoint.name_map import make_name_table
from omni_jax.checkpoint.peft import CONFIG_FILE, TENSORS_FILE, read_adapter, write_adapter
from omni_jax.config import OmniConfig
from omni_jax.data.examples import make_example
from omni_jax.layers.lora import attach_adapters
from omni_jax.models.thinker import Thinker
from tests.adapters import add_adapter
from tests.conftest import MODELS
from tests.oracle import load
from tests.pairs import Pair
from tests.training.examples import make_batch, make_prompt, torch_arguments, weights_of

TOLERANCE = 1e-4  # of the largest logit; float32 sums in another order, through a few layers
ALL = r"thinker/(decoder/layers|audio_encoder|vision_encoder).*"


def our_logits(pair: Pair, adapter_folder: Path, batch) -> np.ndarray:
    adapter = read_adapter(adapter_folder, pair.config)
    model = Thinker(pair.config.thinker_config)
    params = attach_adapters(pair.params, adapter.params["thinker"], adapter.config.scale)

    def compute(params, inputs):
        hidden = model.apply({"params": params}, inputs, method=Thinker.hidden)
        return model.apply({"params": params}, hidden, method=Thinker.logits)

    return np.asarray(jax.jit(compute)(params, batch.inputs))


def compare(pair: Pair, theirs: torch.nn.Module, adapter_folder: Path) -> None:
    for number, kind in enumerate(["audio", "image"]):
        rng = np.random.default_rng(number)
        prompt = make_prompt(kind, pair.config, rng)
        weights = weights_of(prompt, rng)
        batch = make_batch([make_example(prompt, weights, kind, pair.config)], pair.config)
        found = our_logits(pair, adapter_folder, batch)[0, : len(prompt)]
        with torch.no_grad():
            expected = theirs(**torch_arguments(prompt, weights)).logits[0].numpy()
            plain = pair.torch(**torch_arguments(prompt, weights)).logits[0].numpy()
        largest = np.abs(expected).max()
        assert np.abs(found - expected).max() < TOLERANCE * largest, kind
        # an adapter that does nothing would pass
        assert np.abs(plain - expected).max() > 100 * TOLERANCE * largest, kind


@pytest.mark.parametrize("pair", [MODELS[1]], ids=["seven"], indirect=True)
def test_pytorch_loads_what_is_written(pair: Pair, tmp_path: Path) -> None:
    """Every linear map of the Thinker but its head, of a Thinker alone."""
    add_adapter(pair.folder, tmp_path / "ours", ALL, rank=3, alpha=5.0)
    write_adapter(tmp_path / "ours", tmp_path / "peft")
    theirs = PeftModel.from_pretrained(copy_model(pair), tmp_path / "peft").eval()
    compare(pair, theirs, tmp_path / "ours")
    # and back: nothing is lost on the way
    for a, b in zip(*(flat_values(tmp_path / name, pair.config) for name in ("ours", "peft")), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("pair", [MODELS[1]], ids=["seven"], indirect=True)
def test_what_peft_saves_is_read(pair: Pair, tmp_path: Path) -> None:
    """Some layers and maps alone, with rank-stabilised scales."""
    torch.manual_seed(3)
    names = [
        name.removeprefix("thinker.").removesuffix(".weight")
        for entry in make_name_table(pair.config, ["thinker"])
        for name in entry.names
        if re.fullmatch(r"thinker\.(model\.layers\.1\..*(q|down)_proj|visual\.blocks\..*\.q)\.weight", name)
    ]
    assert len(names) > 3
    options = LoraConfig(r=4, lora_alpha=6, target_modules=names, init_lora_weights=False, use_rslora=True)
    theirs = get_peft_model(copy_model(pair), options).eval()
    theirs.save_pretrained(tmp_path / "alone")
    compare(pair, theirs, tmp_path / "alone")


def copy_model(pair: Pair) -> torch.nn.Module:
    """Another copy of the pair's PyTorch model: peft changes what it is given."""
    return copy.deepcopy(pair.torch)


def flat_values(folder: Path, config: OmniConfig) -> list[np.ndarray]:
    return jax.tree.leaves(read_adapter(folder, config).params)


def test_the_names_of_a_whole_model(tiny_checkpoint: Path, tiny_model: Path, tmp_path: Path) -> None:
    """The Talker and the DiT have adapters too."""
    targets = r"(talker/decoder/layers|token2wav/dit|thinker/decoder/layers)/.*"
    add_adapter(tiny_model, tmp_path / "ours", targets, rank=2, alpha=2.0)
    adapter = write_adapter(tmp_path / "ours", tmp_path / "peft")
    parts = {module.split("/")[0] for module in adapter.modules}
    assert parts == {"thinker", "talker", "token2wav"}
    theirs = PeftModel.from_pretrained(load(tiny_checkpoint), tmp_path / "peft").eval()
    # every tensor of the file has found its place
    state = {name.replace(".default.", "."): value for name, value in theirs.state_dict().items() if "lora_" in name}
    stored = load_file(tmp_path / "peft" / TENSORS_FILE)
    assert set(state) == set(stored) and all(torch.equal(state[name], stored[name]) for name in stored)
    assert (tmp_path / "peft" / CONFIG_FILE).exists() and (tmp_path / "ours" / LORA_FILE).exists()

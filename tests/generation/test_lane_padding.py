"""Parameters padded with zeros compute the same."""

from __future__ import annotations

from pathlib import Path

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

import omni_jax
from omni_jax.config import OmniConfig
from omni_jax.generation.lane_padding import LANES, pad_params, widen_config
from omni_jax.layers.lora import LoRAKernel
from omni_jax.models.thinker import Thinker, abstract_params
from omni_jax.processing.collate import collate
from tests.adapters import add_adapter


def test_the_hidden_axis_is_whole_lanes_on_each_chip() -> None:
    config = OmniConfig.qwen2_5_omni_7b()
    assert config.thinker_config.vision_config.intermediate_size == 3420
    for num_parts, width in ((1, 3456), (4, 3584), (8, 4096)):
        wider = widen_config(config, num_parts).thinker_config.vision_config
        assert wider.intermediate_size == width and width % (LANES * num_parts) == 0


@pytest.mark.parametrize("quantization", [None, "int8"])
def test_pictures_have_the_same_features(tiny_model: Path, tmp_path: Path, quantization: str | None) -> None:
    """Also with kernels in 8 bits, and with adapters beside them."""
    add_adapter(tiny_model, tmp_path / "adapter", "thinker/vision_encoder/.*mlp.*", rank=3, alpha=3.0)
    model = omni_jax.load(
        tiny_model, components=["thinker"], adapters={"one": tmp_path / "adapter"}, quantization=quantization
    )
    c = model.config.thinker_config.vision_config
    wider = Thinker(widen_config(model.config, 2).thinker_config, scan_layers=False)
    assert wider.config.vision_config.intermediate_size == 2 * LANES != c.intermediate_size
    narrow = Thinker(model.config.thinker_config, scan_layers=False)
    params = model.engines.thinker.params
    shapes = jax.tree.map(lambda leaf: leaf.value, abstract_params(wider), is_leaf=lambda leaf: hasattr(leaf, "value"))
    padded = pad_params(params, shapes)
    rng = np.random.default_rng(0)
    picture = rng.integers(0, 255, (56, 84, 3), np.uint8)
    prompt = model.processor([{"role": "user", "content": [{"type": "image", "image": picture}]}])
    (frames,) = collate([prompt], model.config).vision
    expected = narrow.apply({"params": params}, frames, method="encode_vision")
    found = wider.apply({"params": padded}, frames, method="encode_vision")
    flat = flatten_dict(padded, sep="/")
    assert isinstance(flat["vision_encoder/layers_0/mlp/up/kernel"], LoRAKernel)
    # the same sums with zeros among them
    np.testing.assert_allclose(found, expected, atol=1e-5)

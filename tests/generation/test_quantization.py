"""Kernels in 8 and 4 bits: what they stand for, where they are used, and replies of a model that has them."""

from __future__ import annotations

import functools
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

import omni_jax
from omni_jax.config import OmniConfig, ThinkerConfig
from omni_jax.errors import InputError
from omni_jax.generation.quantization import choose_bits, count_inputs, quantize_params
from omni_jax.layers.linear import Linear
from omni_jax.layers.quantized import GROUP, QuantizedKernel, multiply_quantized, quantize_kernel
from omni_jax.layers.stack import unstack_layers
from omni_jax.models import talker, token2wav
from omni_jax.models.decoder import KVCache
from omni_jax.models.talker import Talker
from omni_jax.models.thinker import Thinker, abstract_params, smallest_batch
from omni_jax.sharding import make_mesh, param_shardings

MAX_ERROR = {8: 0.5 / 127, 4: 0.5 / 7}  # of a weight, over the largest of its output: half of a step


def random_kernel(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape, np.float32)


def dequantize(kernel: QuantizedKernel) -> np.ndarray:
    values, scale = np.asarray(kernel.values, np.float32), np.asarray(kernel.scale)
    grouped = values.reshape(len(scale), -1, *scale.shape[1:])
    return (grouped * scale[:, None]).reshape(values.shape)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(("shape", "num_inputs"), [((256, 3, 5), 1), ((2, 128, 7), 2), ((384, 11), 1)])
def test_a_weight_is_within_half_a_step(bits: int, shape: tuple[int, ...], num_inputs: int) -> None:
    kernel = random_kernel(*shape)
    kernel[..., 0] = 0  # an output without weights
    quantized = quantize_kernel(kernel, num_inputs, bits)
    assert quantized.values.shape == shape and quantized.values.dtype == (jnp.int8 if bits == 8 else jnp.int4)
    assert quantized.scale.shape[1:] == shape[num_inputs:]
    assert len(quantized.scale) == (1 if bits == 8 else np.prod(shape[:num_inputs]) // GROUP)
    error = np.abs(dequantize(quantized) - kernel)
    largest = np.abs(kernel).max(axis=tuple(range(num_inputs)))
    assert (error <= 1.001 * MAX_ERROR[bits] * largest).all()
    assert error.max() > 0


def test_four_bits_need_whole_groups() -> None:
    assert quantize_kernel(random_kernel(100, 4), 1, 4).values.dtype == jnp.int8


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("rows", [1, 63, 65])  # few are multiplied in another way than many
def test_products_are_those_of_the_widened_kernel(bits: int, rows: int) -> None:
    kernel = quantize_kernel(random_kernel(2, 128, 3, 5), 2, bits)
    x = np.random.default_rng(1).standard_normal((rows, 2, 128), np.float32)
    expected = np.einsum("rab,abcd->rcd", x.astype(np.float64), dequantize(kernel))
    found = multiply_quantized(jnp.asarray(x), kernel, 2, jnp.float32)
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())


def test_a_linear_map_takes_such_a_kernel() -> None:
    linear = Linear((2, 64), (3,), ("heads", "head_dim", "embed"))
    kernel, bias = quantize_kernel(random_kernel(2, 64, 3), 2, 8), random_kernel(3)
    x = random_kernel(5, 2, 64)
    found = linear.apply({"params": {"kernel": kernel, "bias": bias}}, x)
    np.testing.assert_allclose(found, np.einsum("rab,abc->rc", x, dequantize(kernel)) + bias, atol=1e-4)


@pytest.mark.parametrize("component", ["thinker", "talker", "token2wav"])
def test_every_linear_map_is_found(component: str) -> None:
    """The table of names has the maps that the modules have, with their inputs."""
    config = OmniConfig.tiny()
    found: dict[tuple[str, ...], int] = {}

    def note(call, args, kwargs, context):
        if isinstance(context.module, Linear) and context.method_name == "__call__":
            found[tuple(context.module.path)] = len(context.module.inputs)
        return call(*args, **kwargs)

    with nn.intercept_methods(note):
        # making the abstract parameters calls every module once
        if component == "thinker":
            abstract_params(Thinker(config.thinker_config))
        elif component == "talker":
            talker.abstract_params(Talker(config.talker_config))
        else:
            token2wav.abstract_params(token2wav.Token2Wav(config.token2wav_config))
    assert count_inputs(config, component) == found and len(found) > 5


def test_which_maps_are_in_how_many_bits() -> None:
    thinker, talker = (
        {"/".join(path) for path in count_inputs(OmniConfig.tiny(), component)} for component in ("thinker", "talker")
    )
    assert {"decoder/head", "decoder/layers/attention/out", "decoder/layers/mlp/down"} <= thinker
    assert {"vision_encoder/patch_embed", "vision_encoder/merger/up", "audio_encoder/proj"} <= thinker
    assert {"decoder/head", "decoder/layers/mlp/gate", "proj"} <= talker
    assert choose_bits("thinker", ("decoder", "layers", "mlp", "down"), "int4") == 4
    assert choose_bits("thinker", ("decoder", "head"), "int4") == 8
    assert choose_bits("talker", ("decoder", "layers", "mlp", "down"), "int4") == 8


def test_scales_lie_where_their_outputs_lie() -> None:
    """Of abstract parameters over a mesh; groups of inputs that are spread are spread too."""
    config = OmniConfig.qwen2_5_omni_7b().thinker_config
    model = Thinker(config)
    mesh = make_mesh(devices=jax.devices()[:1])
    boxed = abstract_params(model)
    placed = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        nn.unbox(boxed),
        param_shardings(boxed, mesh),
    )
    flat = flatten_dict(quantize_params("thinker", OmniConfig.qwen2_5_omni_7b(), placed, "int4"))
    down, up = (flat["decoder", "layers", "mlp", name, "kernel"] for name in ("down", "up"))
    assert down.values.dtype == jnp.int4 and down.scale.shape == (28, 18_944 // GROUP, 3584)
    assert tuple(down.scale.sharding.spec) == tuple(down.values.sharding.spec) == (None, "tensor", "fsdp")
    assert tuple(up.scale.sharding.spec) == (None, "fsdp", "tensor")


def test_a_model_in_8_bits(tiny_model: Path) -> None:
    """Kernels and caches; text and speech. It answers as its widened kernels would, and its slots do not mix."""
    # the tiny model's linear maps have too few inputs for groups of 4 bits
    model = omni_jax.load(tiny_model, quantization="int8", kv_cache_dtype="int8")
    engine = model.engines.thinker
    kernels = [leaf for leaf in flatten_dict(engine.params).values() if isinstance(leaf, QuantizedKernel)]
    assert len(kernels) > 10
    cache = engine.init_state(2, 100).context.cache
    assert {leaf.dtype for leaf in jax.tree.leaves((cache.k, cache.v))} == {jnp.dtype("int8"), jnp.dtype("float32")}
    messages = [[{"role": "user", "content": text}] for text in ("Name a colour. " * 40, "What is the time?")]
    spoken = dict(modalities=("text", "audio"), max_tokens=6, talker=dict(max_tokens=8, temperature=0.0))
    alone = [model.generate(message, **spoken) for message in messages]
    for one, other in zip(alone, model.generate_batch(messages, **spoken), strict=True):
        assert (one.token_ids, one.codec_ids) == (other.token_ids, other.codec_ids)
        assert one.token_ids and one.codec_ids and one.audio is not None
    # the same numbers in float32
    plain = omni_jax.load(tiny_model, kv_cache_dtype="int8")
    for engine, of in ((plain.engines.thinker, model.engines.thinker), (plain.engines.talker, model.engines.talker)):
        engine.params = jax.tree.map(
            lambda leaf: jnp.asarray(dequantize(leaf)) if isinstance(leaf, QuantizedKernel) else leaf,
            of.params,
            is_leaf=lambda leaf: isinstance(leaf, QuantizedKernel),
        )
    expected = plain.generate(messages[1], **spoken)
    assert (expected.token_ids, expected.codec_ids) == (alone[1].token_ids, alone[1].codec_ids)


def test_hidden_states_behind_a_cache_in_8_bits() -> None:
    """Both layouts of layers, chunk by chunk: near those of a cache in float32, and the same as each other."""
    config = ThinkerConfig.tiny()
    model = Thinker(config)
    params = jax.jit(model.init)(jax.random.key(0), smallest_batch(config))["params"]
    width = config.text_config.hidden_size
    x = np.random.default_rng(0).standard_normal((2, 12, width)).astype(np.float32)
    ids = np.broadcast_to(np.arange(12, dtype=np.int32), (3, 2, 12))
    found = {}
    for dtype, scanned in ((jnp.float32, True), (jnp.int8, True), (jnp.int8, False)):
        cache = KVCache.init(config.text_config, 2, 16, scanned, dtype)
        own = params if scanned else unstack_layers(params)
        layout = model.clone(scan_layers=scanned)
        extend = jax.jit(functools.partial(layout.apply, method="extend"))
        parts = []
        for part in (slice(i, i + 3) for i in range(0, 12, 3)):
            valid = np.ones((2, 3), bool)
            hidden, cache = extend({"params": own}, x[:, part], ids[..., part], valid, cache)
            parts.append(hidden)
        found[dtype, scanned] = np.concatenate(parts, axis=1)
    exact = found[jnp.float32, True]
    error = np.sqrt(np.mean((found[jnp.int8, True] - exact) ** 2) / np.mean(exact**2))
    assert 1e-5 < error < 0.01, error
    # the same whole numbers, but where a number lies on the edge of two
    np.testing.assert_allclose(found[jnp.int8, False], found[jnp.int8, True], atol=1e-3)


def test_another_quantisation_is_refused(tiny_model: Path) -> None:
    with pytest.raises(InputError, match="quantization is 'int3'; there are int8 and int4"):
        omni_jax.load(tiny_model, quantization="int3")
    with pytest.raises(InputError, match="kv_cache_dtype is 'int4'; there is int8"):
        omni_jax.load(tiny_model, kv_cache_dtype="int4")

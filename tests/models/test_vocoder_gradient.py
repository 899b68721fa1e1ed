"""What the vocoder's gradient is in training, where it is written out, against what JAX derives."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from omni_jax.config import BigVGANConfig
from omni_jax.models.bigvgan import BigVGAN
from omni_jax.training.optimizer import flatten_params

FRAMES = 7
TOLERANCE = 1e-4  # of the largest element of each gradient; float32, summed in another order through sines of sums
CONFIG = BigVGANConfig(
    upsample_initial_channel=16,
    upsample_rates=(3, 2),
    upsample_kernel_sizes=(7, 4),
    resblock_kernel_sizes=(3, 5),
    resblock_dilation_sizes=((1, 3), (1,)),
)


@pytest.fixture(scope="module")
def params() -> Any:
    abstract = jax.eval_shape(BigVGAN(CONFIG).init, jax.random.key(0), np.zeros((1, 9, 80)), np.array([9]))["params"]
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda a: rng.standard_normal(a.shape).astype(np.float32) / a.size**0.5, nn.unbox(abstract))


def gradient(params: Any, single_convs: bool, knows_ends: bool) -> tuple[jax.Array, Any]:
    """The samples of two rows, and the gradient of a weighted sum of them."""
    rng = np.random.default_rng(1)
    mel = rng.standard_normal((2, FRAMES, 80)).astype(np.float32)
    weights = rng.standard_normal((2, FRAMES * 6)).astype(np.float32)
    length = np.full(2, FRAMES) if knows_ends else None
    model = BigVGAN(CONFIG, single_convs=single_convs)

    def loss(params: Any) -> tuple[jax.Array, jax.Array]:
        samples: Any = model.apply({"params": params}, mel, length)
        return jnp.sum(samples * weights), samples

    found, samples = jax.jit(jax.grad(loss, has_aux=True))(params)
    return samples, found


@pytest.mark.parametrize("single_convs", [True, False])
def test_the_gradient_is_what_jax_derives(params: Any, single_convs: bool) -> None:
    samples, ours = gradient(params, single_convs, knows_ends=False)
    expected_samples, expected = gradient(params, single_convs=True, knows_ends=True)
    np.testing.assert_allclose(samples, expected_samples, atol=1e-6)
    assert np.abs(samples).max() < 1  # where samples are clipped there is no gradient
    flat = flatten_params(expected)
    for path, value in flatten_params(ours).items():
        largest = np.abs(flat[path]).max()
        assert largest > 0, path
        np.testing.assert_allclose(value, flat[path], rtol=0, atol=TOLERANCE * largest, err_msg=path)


@pytest.mark.parametrize("single_convs", [True, False])
def test_products_of_the_gradient_are_as_exact_as_those_forward(params: Any, single_convs: bool) -> None:
    """Where they are written out they are traced when the code around them, which says it, is gone."""
    model = BigVGAN(CONFIG, precision="highest", single_convs=single_convs)
    mel = np.zeros((1, FRAMES, 80), np.float32)

    def loss(params: Any) -> jax.Array:
        samples: Any = model.apply({"params": params}, mel, None)
        return jnp.sum(samples)

    with jax.default_matmul_precision("bfloat16"):
        text = str(jax.make_jaxpr(jax.grad(loss))(params))
    products = text.count("dot_general[") + text.count("conv_general_dilated[")
    # forward, by the kernel and by the input
    assert products >= 3 * len(CONFIG.upsample_rates)
    assert text.count("precision=(Precision.HIGHEST, Precision.HIGHEST)") == products

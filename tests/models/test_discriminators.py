"""The discriminators against the same networks in PyTorch, on random weights."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import numpy as np
import pytest
import torch
from flax.traverse_util import flatten_dict, unflatten_dict
from torch.nn import functional

from omni_jax.layers.stft import Resolution, stft_magnitude
from omni_jax.models.discriminators import PERIODS, RESOLUTIONS, Discriminators, abstract_params
from omni_jax.training.optimizer import flatten_params

MODEL = Discriminators(channels=2)
SAMPLES = 2400  # no multiple of 7 and 11
TOLERANCE = 1e-5  # of the largest element; float32, summed in another order


@pytest.fixture(scope="module")
def params() -> Any:
    rng = np.random.default_rng(0)
    flat = {}
    for path, leaf in flatten_params(nn.unbox(abstract_params(MODEL))).items():
        scale = 0.5 if path.endswith("bias") else 2 / np.prod(leaf.shape[:-1]) ** 0.5
        flat[path] = (scale * rng.standard_normal(leaf.shape)).astype(np.float32)
    return unflatten_dict(flat, sep="/")


@pytest.fixture(scope="module")
def samples() -> np.ndarray:
    return np.random.default_rng(1).uniform(-1, 1, (2, SAMPLES)).astype(np.float32)


def magnitude(x: torch.Tensor, resolution: Resolution) -> torch.Tensor:
    fft, hop, size = resolution
    window = torch.hann_window(size)
    return torch.stft(x, fft, hop, size, window, center=False, return_complex=True).abs()  # [B, F, T]


def by_period(weights: dict[str, torch.Tensor], x: torch.Tensor, period: int) -> list[torch.Tensor]:
    x = functional.pad(x[:, None], (0, -x.shape[1] % period), "reflect")
    x = x.reshape(len(x), 1, -1, period)
    maps = []
    for number, stride in enumerate((3, 3, 3, 3, 1)):
        kernel = weights[f"conv_{number}/kernel"].permute(2, 1, 0)[..., None]
        x = functional.conv2d(x, kernel, weights[f"conv_{number}/bias"], (stride, 1), (2, 0))
        x = functional.leaky_relu(x, 0.1)
        maps.append(x)
    kernel = weights["conv_out/kernel"].permute(2, 1, 0)[..., None]
    maps.append(functional.conv2d(x, kernel, weights["conv_out/bias"], 1, (1, 0)))
    return [x.permute(0, 3, 2, 1) for x in maps]  # [B, p, T, C]


def by_resolution(weights: dict[str, torch.Tensor], x: torch.Tensor, resolution: Resolution) -> list[torch.Tensor]:
    edge = (resolution.fft - resolution.hop) // 2
    x = magnitude(functional.pad(x[:, None], (edge, edge), "reflect")[:, 0], resolution)[:, None]  # [B, 1, F, T]
    maps = []
    for number, stride in enumerate((1, 2, 2, 2, 1)):
        kernel = weights[f"conv_{number}/kernel"].permute(3, 2, 0, 1)
        padding = (1, 4) if number < 4 else (1, 1)
        x = functional.leaky_relu(
            functional.conv2d(x, kernel, weights[f"conv_{number}/bias"], (1, stride), padding), 0.1
        )
        maps.append(x)
    kernel = weights["conv_out/kernel"].permute(3, 2, 0, 1)
    maps.append(functional.conv2d(x, kernel, weights["conv_out/bias"], 1, 1))
    return [x.permute(0, 2, 3, 1) for x in maps]  # [B, F, T, C]


@pytest.mark.parametrize("single_convs", [False, True])
def test_discriminators_equal_pytorch(params: Any, samples: np.ndarray, single_convs: bool) -> None:
    model = Discriminators(MODEL.channels, single_convs)
    ours = jax.jit(lambda p, x: model.apply({"params": p}, x))(params, samples)
    x = torch.tensor(samples)
    theirs = []
    for number, period in enumerate(PERIODS):
        theirs.append(by_period(to_torch(params[f"period_{number}"]), x, period))
    for number, resolution in enumerate(RESOLUTIONS):
        theirs.append(by_resolution(to_torch(params[f"resolution_{number}"]), x, resolution))
    assert len(ours) == len(theirs) == 8
    for our_maps, their_maps in zip(ours, theirs, strict=True):
        assert len(our_maps) == 6 and our_maps[-1].shape[-1] == 1
        for one, other in zip(our_maps, their_maps, strict=True):
            np.testing.assert_allclose(one, other, rtol=0, atol=TOLERANCE * float(other.abs().max()))


def to_torch(tree: Any) -> dict[str, torch.Tensor]:
    return {path: torch.tensor(value) for path, value in flatten_dict(tree, sep="/").items()}


@pytest.mark.parametrize("resolution", [*RESOLUTIONS, Resolution(256, 64, 256), Resolution(32, 8, 32)])
def test_magnitudes_and_their_gradient_equal_pytorch(samples: np.ndarray, resolution: Resolution) -> None:
    x = torch.tensor(samples, requires_grad=True)
    theirs = magnitude(x, resolution).transpose(1, 2)  # [B, T, F]
    weights = np.random.default_rng(2).standard_normal(theirs.shape).astype(np.float32)
    (theirs * torch.tensor(weights)).sum().backward()
    ours = stft_magnitude(samples, resolution)
    np.testing.assert_allclose(ours, theirs.detach(), rtol=0, atol=TOLERANCE * float(theirs.max()))
    gradient = jax.jit(jax.grad(lambda x: (stft_magnitude(x, resolution) * weights).sum()))(samples)
    assert x.grad is not None
    # near a magnitude of 0 its direction turns with a rounding
    np.testing.assert_allclose(gradient, x.grad, rtol=0, atol=20 * TOLERANCE * float(x.grad.abs().max()))


def test_silence_has_a_gradient_of_zero() -> None:
    gradient = jax.grad(lambda x: stft_magnitude(x, RESOLUTIONS[2]).sum())(np.zeros((1, 600), np.float32))
    assert not np.asarray(gradient).any()

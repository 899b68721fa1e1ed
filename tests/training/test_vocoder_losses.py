"""The losses of the vocoder and of its discriminators against PyTorch."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from omni_jax.processing.audio import mel_filters
from omni_jax.training.adversarial_losses import discriminator_loss, feature_loss, generator_loss
from omni_jax.training.spectral_losses import multi_scale_mel_error, stft_distance

RATE = 24_000
TOLERANCE = 1e-5  # of each loss; float32, summed in another order


@pytest.fixture(scope="module")
def sounds() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    recorded = rng.uniform(-0.5, 0.5, (2, 3000)).astype(np.float32)
    # of another level, and with silence that is under the floor
    generated = (0.3 * recorded[:, ::-1] + 0.1 * rng.standard_normal((2, 3000))).astype(np.float32)
    recorded[0, :600] = 0
    return generated, recorded


def magnitude(x: torch.Tensor, fft: int, hop: int, size: int) -> torch.Tensor:
    window = torch.hann_window(size)
    return torch.stft(x, fft, hop, size, window, center=False, return_complex=True).abs().transpose(1, 2)


def test_the_error_of_the_mel_and_its_gradient(sounds: tuple[np.ndarray, np.ndarray]) -> None:
    generated = torch.tensor(sounds[0].copy(), requires_grad=True)
    total = torch.zeros(2)
    for window, bins in ((32, 5), (64, 10), (128, 20), (256, 40), (512, 80), (1024, 160), (2048, 320)):
        filters = torch.tensor(mel_filters(bins, window, RATE).astype(np.float32))
        logs = []
        for x in (generated, torch.tensor(sounds[1])):
            logs.append((magnitude(x, window, window // 4, window) @ filters).clamp(min=1e-5).log10())
        total = total + (logs[0] - logs[1]).abs().mean(dim=(1, 2))
    ours = jax.jit(lambda *xs: multi_scale_mel_error(*xs, RATE))
    np.testing.assert_allclose(ours(*sounds), total.detach(), rtol=TOLERANCE)
    total.sum().backward()
    gradient = jax.jit(jax.grad(lambda *xs: jnp.sum(ours(*xs))))(*sounds)
    assert generated.grad is not None
    # a bin whose error is near 0 may have either sign, and one near silence a large slope
    np.testing.assert_allclose(gradient, generated.grad, atol=1e-3 * float(generated.grad.abs().max()))


def test_no_error_and_no_distance_of_what_is_equal(sounds: tuple[np.ndarray, np.ndarray]) -> None:
    assert not np.asarray(multi_scale_mel_error(sounds[1], sounds[1], RATE)).any()
    assert not np.asarray(stft_distance(sounds[1], sounds[1])).any()


def test_the_distance_of_spectra(sounds: tuple[np.ndarray, np.ndarray]) -> None:
    expected = torch.zeros(2)
    for resolution in ((1024, 120, 600), (2048, 240, 1200), (512, 50, 240)):
        ours, theirs = (magnitude(torch.tensor(x.copy()), *resolution).clamp(min=1e-6) for x in sounds)
        convergence = torch.linalg.norm(theirs - ours, dim=(1, 2)) / torch.linalg.norm(theirs, dim=(1, 2))
        expected += convergence + (theirs.log() - ours.log()).abs().mean(dim=(1, 2))
    np.testing.assert_allclose(stft_distance(*sounds), expected / 3, rtol=TOLERANCE)


def test_adversarial_losses() -> None:
    """Of two discriminators with maps of several shapes; those of a row, as PyTorch has them of the row alone."""
    rng = np.random.default_rng(1)
    shapes = (((2, 3, 5, 4), (2, 3, 5, 1)), ((2, 7, 6, 2), (2, 7, 3, 2), (2, 7, 3, 1)))
    recorded, generated = (
        tuple(tuple(rng.standard_normal(shape).astype(np.float32) for shape in layers) for layers in shapes)
        for _ in range(2)
    )
    for row in range(2):
        expected = {"discriminator": 0.0, "generator": 0.0, "features": 0.0}
        for real_layers, fake_layers in zip(recorded, generated, strict=True):
            reals = [torch.tensor(layer[row]) for layer in real_layers]
            fakes = [torch.tensor(layer[row]) for layer in fake_layers]
            ones = torch.ones_like(reals[-1])
            mse = torch.nn.functional.mse_loss
            expected["discriminator"] += float(mse(reals[-1], ones) + mse(fakes[-1], 0 * ones))
            expected["generator"] += float(mse(fakes[-1], ones))
            for real, fake in zip(reals, fakes, strict=True):
                expected["features"] += float(torch.nn.functional.l1_loss(fake, real))
        assert float(discriminator_loss(recorded, generated)[row]) == pytest.approx(
            expected["discriminator"], rel=TOLERANCE
        )
        assert float(generator_loss(generated)[row]) == pytest.approx(expected["generator"], rel=TOLERANCE)
        assert float(feature_loss(recorded, generated)[row]) == pytest.approx(expected["features"], rel=TOLERANCE)


def test_features_of_recorded_sound_are_no_aim_that_moves() -> None:
    """A gradient through them would teach the discriminators to see nothing."""
    maps = ((np.ones((1, 2, 3), np.float32), np.ones((1, 2, 1), np.float32)),)
    other = jax.tree.map(lambda x: 2 * x, maps)
    gradient = jax.grad(lambda recorded: jnp.sum(feature_loss(recorded, other)))(maps)
    assert not any(np.asarray(leaf).any() for leaf in jax.tree.leaves(gradient))

"""Attention in all of its forms against a plain loop over queries."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from omni_jax.layers import attention as module
from omni_jax.layers.attention import Mask, attention, cached_attention
from omni_jax.layers.quantized import quantize_rows

TOLERANCE = 2e-6  # float32 sums over some hundred numbers of size one


def plain(q: np.ndarray, k: np.ndarray, v: np.ndarray, segments: np.ndarray, causal: bool) -> np.ndarray:
    """In float64, query by query. Padding (segment 0) is attended to by padding alone."""
    out = np.zeros(q.shape)
    group = q.shape[2] // k.shape[2]
    for b, t, n in np.ndindex(q.shape[:3]):
        seen = segments[b] == segments[b, t]
        if causal:
            seen &= np.arange(len(seen)) <= t
        scores = k[b, seen, n // group].astype(np.float64) @ q[b, t, n] / np.sqrt(q.shape[-1])
        weights = np.exp(scores - scores.max())
        out[b, t, n] = weights / weights.sum() @ v[b, seen, n // group]
    return out


def inputs(batch: int, length: int, heads: int, kv_heads: int, seed: int = 0) -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(seed)
    q = rng.standard_normal((batch, length, heads, 8)).astype(np.float32)
    k, v = (rng.standard_normal((batch, length, kv_heads, 8)).astype(np.float32) for _ in range(2))
    segments = np.sort(rng.integers(0, 3, (batch, length)), axis=1).astype(np.int32)
    return q, k, v, segments


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (7, 1), (4, 2)])
def test_all_at_once(heads: int, kv_heads: int, causal: bool) -> None:
    q, k, v, segments = inputs(2, 40, heads, kv_heads)
    ours = attention(q, k, v, Mask(segments, causal))
    assert np.abs(ours - plain(q, k, v, segments, causal)).max() < TOLERANCE


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("at_once", [100, 2_000, 10_000])
def test_in_pieces(monkeypatch: pytest.MonkeyPatch, at_once: int, causal: bool) -> None:
    """At 100 logits a query at a time; at 2,000 some queries; at 10,000 some rows of the batch."""
    q, k, v, segments = inputs(5, 36, 2, 1)
    monkeypatch.setattr(module, "_MAX_LOGITS", at_once)
    ours = jax.jit(lambda *a: attention(*a[:3], Mask(a[3], causal)))(q, k, v, segments)
    assert np.abs(ours - plain(q, k, v, segments, causal)).max() < TOLERANCE


def test_causal_pieces_read_only_what_came_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_CAUSAL_PIECE", 8)
    q, k, v, segments = inputs(2, 50, 4, 2)
    assert np.abs(attention(q, k, v, Mask(segments, True)) - plain(q, k, v, segments, True)).max() < TOLERANCE


@pytest.mark.parametrize("causal", [False, True])
def test_one_head_at_a_time(monkeypatch: pytest.MonkeyPatch, causal: bool) -> None:
    monkeypatch.setattr(module, "_HEAD_BY_HEAD", 1)
    q, k, v, segments = inputs(3, 20, 6, 2)
    ours = jax.jit(lambda *a: attention(*a[:3], Mask(a[3], causal)))(q, k, v, segments)
    assert np.abs(ours - plain(q, k, v, segments, causal)).max() < TOLERANCE
    # and its gradient is that of all heads at once
    grads = [jax.grad(lambda q: attention(q, k, v, Mask(segments, causal)).sum() ** 2)(q)]
    monkeypatch.setattr(module, "_HEAD_BY_HEAD", 10**9)
    grads += [jax.grad(lambda q: attention(q, k, v, Mask(segments, causal)).sum() ** 2)(q)]
    assert np.abs(grads[0] - grads[1]).max() < 1e-4 * np.abs(grads[0]).max()


def test_padding_of_nan_does_not_leak() -> None:
    q, k, v, _ = inputs(1, 24, 2, 2)
    segments = (np.arange(24) >= 6).astype(np.int32)[None]
    clean = np.asarray(attention(q, k, v, Mask(segments, True)))[:, 6:]
    for a in (q, k):
        a[:, :6] = np.nan
    v[:, :6] = 1e30
    assert np.array_equal(np.asarray(attention(q, k, v, Mask(segments, True)))[:, 6:], clean)


@pytest.mark.parametrize(("count", "at_once"), [(1, 10**9), (6, 10**9), (6, 10)])
def test_what_follows_a_cache_sees_the_slots_that_it_may(
    monkeypatch: pytest.MonkeyPatch, count: int, at_once: int
) -> None:
    """A token, or some of a prompt; and where the logits are too many to be held at a time."""
    monkeypatch.setattr(module, "_MAX_LOGITS", at_once)
    q, k, v, _ = inputs(3, 20, 4, 2)
    last = np.array([19, 5, 10])[:, None] - np.arange(count)[::-1]
    visible = np.arange(20) <= last[..., None]
    ours = cached_attention(q[:, :count], k.swapaxes(1, 2), v.swapaxes(1, 2), visible)
    for b, t in np.ndindex(3, count):
        seen = slice(0, last[b, t] + 1)
        alone = np.concatenate([q[b : b + 1, t : t + 1]] * (last[b, t] + 1), axis=1)
        theirs = plain(alone, k[b : b + 1, seen], v[b : b + 1, seen], np.ones((1, last[b, t] + 1)), True)
        assert np.abs(ours[b, t] - theirs[0, -1]).max() < TOLERANCE


def test_keys_in_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """What accelerators do where all logits are too many; the last tiles are visible to no query."""
    monkeypatch.setattr(module, "_TILE", 4)
    q, k, v, _ = inputs(3, 20, 4, 2)
    grouped = q[:, :4].reshape(3, 2, 8, 8)
    visible = np.arange(20) <= np.array([0, 9, 11])[:, None, None] - np.array([0, 3])[:, None]
    visible = np.repeat(visible, 4, axis=1)
    operands = (grouped, k.swapaxes(1, 2), v.swapaxes(1, 2), visible)
    tiled = np.asarray(module._attend_tile_by_tile(*operands))
    at_once = np.asarray(module._attend_all_heads(*operands))
    sees_any = np.broadcast_to(visible.any(-1)[:, None], tiled.shape[:3])
    assert np.abs(tiled - at_once)[sees_any].max() < TOLERANCE
    assert np.isfinite(tiled).all()


@pytest.mark.parametrize("form", ["_attend_all_heads", "_attend_head_by_head", "_attend_tile_by_tile"])
def test_keys_in_8_bits_are_what_they_stand_for(monkeypatch: pytest.MonkeyPatch, form: str) -> None:
    monkeypatch.setattr(module, "_TILE", 4)
    q, k, v, _ = inputs(3, 20, 4, 2)
    k[:, 3] = 0  # a row of zeros keeps them
    grouped = q[:, :4].reshape(3, 2, 8, 8)
    visible = np.repeat(np.arange(20) <= np.array([4, 9, 19])[:, None, None], 8, axis=1)
    rows = [quantize_rows(a.swapaxes(1, 2)) for a in (k, v)]
    widened = [np.asarray(row.values, np.float32) * row.scale for row in rows]
    for row, exact in zip(widened, (k, v), strict=True):
        exact = exact.swapaxes(1, 2)
        # half of a step, which is the largest number of a row over 127
        assert (np.abs(row - exact) <= 0.501 / 127 * np.abs(exact).max(-1, keepdims=True)).all()
    expected = np.asarray(module._attend_all_heads(grouped, *widened, visible))
    assert np.abs(np.asarray(getattr(module, form)(grouped, *rows, visible)) - expected).max() < TOLERANCE

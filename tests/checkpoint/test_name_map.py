from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from omni_jax.checkpoint.name_map import (
    COMPONENTS,
    describe_differences,
    make_name_table,
    optional_constants,
    parameter_count,
    published_name,
)
from omni_jax.config import OmniConfig

DATA = Path(__file__).parents[1] / "data"
PUBLISHED = {"7B": OmniConfig.qwen2_5_omni_7b(), "3B": OmniConfig.qwen2_5_omni_3b()}
TINY = OmniConfig.tiny()

# docs/reference.md, 1.8: part of the tree -> parameters of the 7B and of the 3B
LEDGER = {
    ("thinker", "audio_encoder"): (639_647_232, 637_676_544),
    ("thinker", "vision_encoder"): (676_550_144, 668_684_288),
    ("thinker", "decoder"): (7_070_619_136 + 544_997_376, 3_085_938_688 + 311_164_928),
    ("thinker", "decoder", "head"): (544_997_376, 311_164_928),
    ("talker",): (1_351_360_256, 384_604_928),
    ("token2wav", "dit"): (333_607_760, 333_607_760),
    ("token2wav", "bigvgan"): (115_443_504, 115_443_504),
    (): (10_732_225_408, 5_537_120_640),
}


@pytest.mark.parametrize("size", PUBLISHED)
def test_names_and_shapes_are_the_published_ones(size: str) -> None:
    published = json.loads(gzip.decompress((DATA / f"weights_{size}.json.gz").read_bytes()))
    ours = {name: list(entry.shape) for entry in make_name_table(PUBLISHED[size]) for name in entry.names}
    assert ours == dict(published)
    assert len(published) == {"7B": 2447, "3B": 2543}[size]


@pytest.mark.parametrize("part", LEDGER)
def test_parameter_counts(part: tuple[str, ...]) -> None:
    assert tuple(parameter_count(config, part) for config in PUBLISHED.values()) == LEDGER[part]


def test_the_published_total_counts_the_constant_too() -> None:
    (shape,) = optional_constants(PUBLISHED["7B"]).values()
    assert parameter_count(PUBLISHED["7B"]) + shape[0] == 10_732_225_440


def test_paths_and_names_are_unique() -> None:
    entries = make_name_table(TINY)
    assert len({e.path for e in entries}) == len(entries)
    names = [name for e in entries for name in e.names]
    assert len(set(names)) == len(names)
    assert {e.component for e in entries} == set(COMPONENTS)


def test_every_layout_is_undone_exactly() -> None:
    for entry in make_name_table(TINY):
        x = np.arange(np.prod(entry.shape), dtype=np.float32).reshape(entry.shape)
        leaf = entry.to_jax(x)
        assert leaf.shape == entry.leaf_shape[1 if entry.stacked else 0 :], entry.path
        np.testing.assert_array_equal(entry.to_torch(leaf), x, err_msg="/".join(entry.path))
        assert np.prod(entry.leaf_shape) == entry.size


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_layouts_are_undone_for_any_bits(data: st.DataObject) -> None:
    entry = data.draw(st.sampled_from(make_name_table(TINY)))
    seed = data.draw(st.integers(0, 2**32 - 1))
    x = np.random.default_rng(seed).integers(0, 2**16, entry.shape, dtype=np.uint16)
    np.testing.assert_array_equal(entry.to_torch(entry.to_jax(x)), x)


def entry_of(*path: str):
    (entry,) = (e for e in make_name_table(TINY) if e.path == path)
    return entry


def test_a_query_kernel_splits_heads_first() -> None:
    entry = entry_of("thinker", "decoder", "layers", "attention", "query", "kernel")
    n, h, d = 4, 12, 48
    x = np.random.default_rng(0).standard_normal((n * h, d))
    leaf = entry.to_jax(x)
    assert entry.leaf_shape == (2, d, n, h)
    for head in range(n):
        np.testing.assert_array_equal(leaf[:, head], x[head * h : (head + 1) * h].T)


def test_an_output_kernel_joins_heads() -> None:
    entry = entry_of("thinker", "decoder", "layers", "attention", "out", "kernel")
    x = np.random.default_rng(0).standard_normal(entry.shape)
    heads = np.random.default_rng(1).standard_normal((4, 12))
    np.testing.assert_allclose(np.einsum("nh,nhd->d", heads, entry.to_jax(x)), x @ heads.reshape(-1))


def test_patches_are_flattened_in_the_order_of_the_pixel_rows() -> None:
    entry = entry_of("thinker", "vision_encoder", "patch_embed", "kernel")
    x = np.random.default_rng(0).standard_normal(entry.shape)
    patch = np.random.default_rng(1).standard_normal(entry.shape[1:])
    np.testing.assert_allclose(patch.reshape(-1) @ entry.to_jax(x), np.einsum("cthw,dcthw->d", patch, x))


def test_convolutions_put_time_first() -> None:
    x = np.arange(32 * 128 * 3).reshape(32, 128, 3)
    leaf = entry_of("thinker", "audio_encoder", "conv1", "kernel").to_jax(x)
    assert leaf[2, 7, 5] == x[5, 7, 2]  # [k, in, out] of [out, in, k]
    up = entry_of("token2wav", "bigvgan", "stage_0", "upsample", "kernel")
    x = np.arange(np.prod(up.shape)).reshape(up.shape)
    assert up.to_jax(x)[2, 7, 5] == x[7, 5, 2]  # [k, in, out] of [in, out, k], not flipped


@pytest.mark.parametrize(
    ("in_memory", "published"),
    [
        ("thinker.model.language_model.layers.0.mlp.up_proj.weight", "thinker.model.layers.0.mlp.up_proj.weight"),
        ("thinker.model.audio_tower.proj.bias", "thinker.audio_tower.proj.bias"),
        ("thinker.model.visual.merger.ln_q.weight", "thinker.visual.merger.ln_q.weight"),
        ("thinker.lm_head.weight", "thinker.lm_head.weight"),
        ("talker.model.layers.0.mlp.up_proj.weight", "talker.model.layers.0.mlp.up_proj.weight"),
    ],
)
def test_both_naming_schemes(in_memory: str, published: str) -> None:
    assert published_name(in_memory) == published
    assert published_name(published) == published


def test_describe_differences_lists_twenty_and_counts_the_rest() -> None:
    expected = {f"n{i:02}": (2,) for i in range(30)} | {"shape": (2, 3)}
    text = describe_differences(expected, {"shape": np.zeros((3, 2)), "other": np.zeros(1)})
    assert "30 missing" in text and "n19" in text and "n20" not in text and "and 10 more" in text
    assert "1 unexpected" in text and "other" in text
    assert "shape: config.json makes it [2, 3], found [3, 2]" in text
    assert describe_differences({"a": (1,)}, {"a": np.zeros(1)}) == ""

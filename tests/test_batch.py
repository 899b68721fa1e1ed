"""The logical axes of a batch, and the buckets of its lengths."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import pytest
from jax.sharding import AbstractMesh, AxisType, PartitionSpec

from omni_jax.batch import OmniBatch, TrainBatch, batch_axes, bucket
from omni_jax.config import OmniConfig
from omni_jax.data.config import DataConfig
from omni_jax.data.packing import Budget, Part, assemble
from omni_jax.models.thinker import Thinker
from omni_jax.sharding import MESH_AXES, RULES
from omni_jax.training.objectives.next_token import NextToken
from omni_jax.training.step import abstract_batch

MESH = AbstractMesh((1, 2, 4, 1), MESH_AXES, axis_types=(AxisType.Auto,) * 4)
OBJECTIVE = NextToken(Thinker(OmniConfig.tiny().thinker_config), OmniConfig.tiny())
DATA = DataConfig(rows=8, streams=8, tokens=64, spans=16, audio_blocks=2, canvases=3, windows=4)
# sizes that equal each other: S = N, then rows = S = N, then S = N = A = F = W
EQUAL_SIZES = [
    dict(spans=64),
    dict(rows=16, tokens=16, spans=16),
    dict(rows=16, tokens=16, spans=16, audio_blocks=1, canvases=1, windows=16),
]


def sharding_specs(data: DataConfig, accumulate: int = 1) -> TrainBatch:
    batch = abstract_batch(data, OBJECTIVE, MESH, accumulate)
    return jax.tree.map(lambda x: x.sharding.spec, batch)


@pytest.mark.parametrize("sizes", EQUAL_SIZES)
def test_equal_sizes_change_no_sharding(sizes: dict[str, int]) -> None:
    expected = sharding_specs(DATA)
    assert sharding_specs(dataclasses.replace(DATA, **sizes)) == expected
    rows, positions = ("data", "fsdp"), ("sequence",)
    assert expected.inputs.tokens == expected.targets == PartitionSpec(rows, positions)
    assert expected.inputs.spans.begin == expected.inputs.spans.seconds == PartitionSpec(rows, None)
    assert expected.inputs.audio is not None
    assert expected.inputs.audio.length == PartitionSpec(rows)
    assert expected.inputs.vision[0].valid == PartitionSpec(rows, None, None)


def test_accumulated_batches_have_an_axis_that_is_not_sharded() -> None:
    alone = sharding_specs(DATA)
    stacked = sharding_specs(DATA, accumulate=3)
    assert stacked == jax.tree.map(lambda spec: PartitionSpec(None, *spec), alone)


def test_every_array_of_a_batch_declares_each_of_its_axes() -> None:
    budget = Budget.of(dataclasses.replace(DATA, rows=1, streams=1))
    batch = assemble([Part(budget)], budget, OmniConfig.tiny(), first=0, streams=1)

    def check(axes: PartitionSpec, leaf: Any) -> None:
        assert len(axes) == leaf.ndim
        assert set(axes) <= {*RULES, None}
        assert axes[0] == "batch"

    jax.tree.map(check, batch_axes(batch), batch)
    assert isinstance(batch_axes(batch.inputs), OmniBatch)


def test_buckets() -> None:
    assert [bucket(n) for n in range(10)] == [1, 1, 2, 3, 4, 6, 6, 8, 8, 12]
    assert [bucket(n, 64) for n in (0, 1, 64, 65, 200)] == [64, 64, 64, 128, 256]
    for n in range(5, 5000, 7):
        assert n <= bucket(n) <= 1.5 * n
    with pytest.raises(ValueError, match="a length cannot be -1"):
        bucket(-1)

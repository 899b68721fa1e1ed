"""What a run trains, as the loop sees it: the seam between the loop and the parts of the model.

The loop, the step, checkpoints and the dry run know parameters by path, batches as trees of arrays and losses by name.
Which modules there are, how rows become batches and what the loss is, an objective says (``training/objectives``).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeAlias

import jax
import numpy as np
from jax.sharding import Mesh

from omni_jax.data.config import DataConfig
from omni_jax.data.packing_protocol import Packing
from omni_jax.data.sources import Row
from omni_jax.processing.processor import Processor

Metrics: TypeAlias = dict[str, jax.Array]
Params: TypeAlias = Mapping[str, Any]  # a tree for each component
Batch: TypeAlias = Any  # a dataclass of ``omni_jax.batch`` or one like those, whose fields name their logical axes


class Loss(NamedTuple):
    """Of a batch, or of a part of it.

    Attributes:
      total: float32 []; it is differentiated.
      terms: what is reported, by name, "loss" among them. Terms of accumulated batches are added up, so each is a sum
        over the batch divided by a denominator of the whole step. Scalars among them are logged under their names.
      statistics: sums over the batch that ``Objective.apply_statistics`` takes, and that no gradient passes.
    """

    total: jax.Array
    terms: Metrics
    statistics: Metrics | None = None


@dataclass(frozen=True)
class SampleRequest:
    """Held-out rows that a run answers at each evaluation.

    Attributes:
      rows: to be answered.
      data: says where their media may lie.
      processor: that reads them, as it reads the rows that train.
      mesh: of the run.
      max_tokens: of an answer.
    """

    rows: Sequence[Row]
    data: DataConfig
    processor: Processor
    mesh: Mesh
    max_tokens: int


class Sample(NamedTuple):
    """What a model makes of a held-out row, for people to look at.

    Attributes:
      row: its name, file and number.
      expected: what the row has.
      answer: what the model gives; or "error: " and why it gives none.
    """

    row: str
    expected: str
    answer: str


class Objective(Protocol):
    """A loss over some components of a checkpoint, and how rows become its batches.

    An objective is a subclass; what it does not define does nothing.
    """

    @property
    def components(self) -> tuple[str, ...]:
        """Components of a checkpoint whose parameters the loss takes; their names begin the paths of parameters."""
        ...

    @property
    def initial_copies(self) -> Mapping[str, str]:
        """Trees of parameters that stay what components were where the run began: component by the tree's name.

        A teacher, or the reference of a preference. They never train, and are in no checkpoint: a run keeps them
        beside, as further names of the files that it began from.
        """
        return {}

    @property
    def dtype(self) -> Any:
        """What frozen parameters are kept in where no checkpoint says it."""
        ...

    def abstract_params(self) -> dict[str, Any]:
        """Shapes, dtypes and logical axes of the parameters of each component and initial copy, in Flax' boxes."""
        ...

    def init_params(self, component: str, key: jax.Array) -> Any:
        """Fresh parameters of a component that the checkpoint to begin from does not have; traced.

        Raises:
          ConfigError: if the checkpoint must have it.
        """
        ...

    def initial_values(self, component: str, folder: Path) -> Mapping[str, np.ndarray]:
        """What replaces some of the parameters that ``init_params`` made, since the checkpoint says more.

        Args:
          component: whose parameters they are.
          folder: the checkpoint that the run begins from.

        Returns:
          arrays of the shapes of those that they replace, by path within the component, as ``dit/proj/bias``.
        """
        return {}

    def check_start(self, folder: Path) -> None:
        """Looks at the checkpoint that a run is to begin from.

        Raises:
          ConfigError: if the run cannot begin from it.
        """

    def convert_frozen(self, frozen: Params) -> Params:
        """What a run keeps of the parameters that never train, abstract ones or arrays, once they are read."""
        return frozen

    def extra_files(self) -> dict[str, str]:
        """Small files that each checkpoint of a run needs beside the model's: their texts, by name."""
        return {}

    def make_packing(self, data: DataConfig, processor: Processor, num_streams: int) -> Packing:
        """How rows become batches; ``num_streams`` is how many this process reads."""
        ...

    def abstract_row(self, data: DataConfig) -> Batch:
        """The batch of one row: its arrays or their shapes. Every leading axis grows with the number of rows."""
        ...

    def denominators(self, batch: Batch) -> Metrics:
        """What the sums of the loss are divided by, of a batch with or without an axis of accumulated ones."""
        ...

    def loss(
        self, params: Params, batch: Batch, denominators: Metrics, key: jax.Array, trained: Collection[str]
    ) -> Loss:
        """The loss of a batch, which may be one of several that are accumulated.

        Args:
          params: of each component and initial copy.
          batch: without an axis of accumulated batches.
          denominators: of the whole step.
          key: of random numbers, another for each batch of each step of a run.
          trained: paths of the parameters that train; the gradient of others is not used.
        """
        ...

    def for_phase(self, paths: Collection[str]) -> Objective:
        """The same as a phase has it in which these parameters train."""
        return self

    def optimizer_groups(self, paths: Sequence[str]) -> tuple[tuple[str, ...], ...]:
        """Parameters that train, in groups that a step updates one after the other.

        Each group has a loss of its own (``loss`` with its paths as ``trained``), of the parameters that the groups
        before it have just been given, and gradients that are clipped on their own: the networks of a GAN. A group
        that is empty is passed over.

        Args:
          paths: of all that trains.
        """
        return (tuple(paths),)

    def apply_statistics(self, params: Params, statistics: Metrics, key: jax.Array) -> dict[str, jax.Array]:
        """New values of parameters that no gradient changes, by path; called once a step, after the gradients.

        Such parameters are in no group of a phase. What trains is not to be among them.

        Args:
          params: of each component, before the step.
          statistics: of ``Loss``, summed over the batches of the step.
          key: of random numbers, another for each step of a run.
        """
        return {}

    def count_work(self, batch: Batch) -> Metrics:
        """What was in a batch and is no padding; "tokens" and "target_tokens" among it. Scalars, or one per source."""
        ...

    def count_flops(self, sizes: Mapping[str, int], trained: Collection[str], counts: Mapping[str, float]) -> float:
        """FLOPs of a step, forward and backward (docs/training.md).

        Args:
          sizes: elements of every parameter, by path.
          trained: paths of those that train.
          counts: from ``count_work``.
        """
        ...

    def sample(self, params: Params, request: SampleRequest) -> list[Sample]:
        """What the model answers to rows; rows that ask for nothing are passed over. Every process calls it.

        Args:
          params: of each component.
          request: what to answer, and over which mesh the parameters are sharded.
        """
        return []

    def estimate_activations(
        self, data: DataConfig, row_parts: int, sequence: int, tensor: int, trained: Collection[str]
    ) -> dict[str, int]:
        """Bytes of a device for the time of a step, by what holds them, beside gradients and the batch.

        Args:
          data: gives the sizes of a batch.
          row_parts: that the rows of a batch are spread over.
          sequence: that the positions of a row are spread over.
          tensor: that the vocabulary is spread over.
          trained: paths of the parameters that train.
        """
        ...

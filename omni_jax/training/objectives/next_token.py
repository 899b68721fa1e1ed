"""The Thinker's objective: cross-entropy of the next token, in pretraining and in instruction tuning.

Letters: B rows, S positions, D width, W windows of a canvas, P patches of a window, N sources of rows.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

from omni_jax.batch import PADDING, Array, TrainBatch
from omni_jax.config import OmniConfig
from omni_jax.data.config import DataConfig
from omni_jax.data.packing import Budget, OmniPacking, Part, assemble
from omni_jax.models.thinker import Thinker, abstract_params, init_params
from omni_jax.processing.processor import Processor
from omni_jax.training.losses import next_token_loss
from omni_jax.training.objective import Loss, Metrics, Objective, Params, Sample, SampleRequest
from omni_jax.training.objectives.next_token_flops import count_step_flops
from omni_jax.training.objectives.next_token_samples import answer_rows
from omni_jax.training.options import NextTokenOptions
from omni_jax.training.recipe import Recipe

_FLOAT32_BYTES = 4
_PREFIX = "thinker/"  # of the paths of its parameters
_HEAD = "thinker/decoder/head/kernel"


# compared and hashed by identity, as the step that holds it
@dataclass(frozen=True, eq=False)
class NextToken(Objective):
    """The loss of a Thinker's next token (docs/reference.md, 6); see ``Objective`` for its methods.

    Attributes:
      model: the Thinker as it is trained.
      config: of the whole model.
      options: of the loss.
      num_sources: N, the files of rows whose losses are told apart.
    """

    model: Thinker
    config: OmniConfig
    options: NextTokenOptions = dataclasses.field(default_factory=NextTokenOptions)
    num_sources: int = 1

    @property
    def components(self) -> tuple[str, ...]:
        return ("thinker",)

    @property
    def dtype(self) -> Any:
        return self.model.dtype

    def abstract_params(self) -> dict[str, Any]:
        return {"thinker": abstract_params(self.model)}

    def init_params(self, component: str, key: jax.Array) -> Any:
        return nn.unbox(init_params(self.model, key))

    def make_packing(self, data: DataConfig, processor: Processor, num_streams: int) -> OmniPacking:
        return OmniPacking.create(data, processor, num_streams, self.dtype)

    def abstract_row(self, data: DataConfig) -> TrainBatch:
        # an empty batch of one row, made by the code that makes all others, so that the two cannot differ
        budget = Budget.of(dataclasses.replace(data, rows=1, streams=1))
        return assemble([Part(budget)], budget, self.config, first=0, streams=1, media_dtype=self.dtype)

    def denominators(self, batch: TrainBatch) -> Metrics:
        # A batch of padding alone has no weight, and nor has a source of which nothing came.
        return {
            "weight": jnp.maximum(jnp.sum(batch.weights), 1e-6),
            "weight_by_source": jnp.maximum(self._sum_by_source(batch, batch.weights), 1e-6),
        }

    def loss(
        self, params: Params, batch: TrainBatch, denominators: Metrics, key: jax.Array, trained: Collection[str]
    ) -> Loss:
        thinker = params["thinker"]
        hidden = self.model.apply({"params": thinker}, batch.inputs, method=Thinker.hidden)  # [B, S, D]
        return self.loss_of_hidden(thinker, jnp.asarray(hidden), batch, denominators, trained)

    def loss_of_hidden(
        self,
        thinker: Any,
        hidden: Float[Array, "B S D"],
        batch: TrainBatch,
        denominators: Metrics,
        trained: Collection[str],
    ) -> Loss:
        """The same, of the hidden states that the Thinker has for the batch."""
        sums = next_token_loss(
            thinker["decoder"]["head"]["kernel"],
            hidden,
            batch.targets,
            batch.weights / denominators["weight"],
            chunk=chunk_of_mesh(batch.targets.shape[1], self.options.chunk),
            z_loss=self.options.z_loss,
            head_trains=_HEAD in trained,
        )
        # the z-loss is trained on, but not reported
        terms = {"loss": jnp.sum(sums.cross_entropy)}
        if self.num_sources > 1:
            by_source = self._sum_by_source(batch, sums.cross_entropy) * denominators["weight"]
            terms["loss_by_source"] = by_source / denominators["weight_by_source"]
        return Loss(sums.total, terms)

    def _sum_by_source(self, batch: TrainBatch, values: Array) -> jax.Array:
        """[N]: the values of all positions, added up by the source that each came from."""
        is_source = jnp.asarray(batch.source)[..., None] == jnp.arange(self.num_sources)  # [..., B, S, N]
        axes = tuple(range(is_source.ndim - 1))
        return jnp.sum(jnp.where(is_source, jnp.asarray(values)[..., None], 0), axis=axes)

    def count_work(self, batch: TrainBatch) -> Metrics:
        counts = count_work(batch)
        if self.num_sources > 1:
            is_token = (jnp.asarray(batch.inputs.segment_ids) != PADDING).astype(jnp.int32)
            counts["tokens_by_source"] = self._sum_by_source(batch, is_token)
        return counts

    def count_flops(self, sizes: Mapping[str, int], trained: Collection[str], counts: Mapping[str, float]) -> float:
        own_sizes = {path.removeprefix(_PREFIX): size for path, size in sizes.items() if path.startswith(_PREFIX)}
        own_trained = {path.removeprefix(_PREFIX) for path in trained}
        return count_step_flops(self.config.thinker_config, own_sizes, own_trained, counts)

    def sample(self, params: Params, request: SampleRequest) -> list[Sample]:
        return answer_rows(params["thinker"], self.dtype, self.config, request)

    def estimate_activations(
        self, data: DataConfig, row_parts: int, sequence: int, tensor: int, trained: Collection[str]
    ) -> dict[str, int]:
        text = self.config.thinker_config.text_config
        compute_bytes = jnp.dtype(self.dtype).itemsize
        # of one device; activations of a layer are recomputed, so only the inputs of the layers stay
        rows = data.rows // row_parts
        length = data.tokens // sequence
        positions = rows * length
        vocab = text.vocab_size // tensor
        # of a device's part of each row, a chunk at a time; in float32 whatever the dtype of activations
        logits = rows * divide_chunk(length, self.options.chunk) * vocab * _FLOAT32_BYTES
        # gathered once for all chunks in the dtype of activations; its gradient is summed in float32
        head_bytes = compute_bytes + (_FLOAT32_BYTES if _HEAD in trained else 0)
        return {
            "inputs of the decoder's layers": text.num_hidden_layers * positions * text.hidden_size * compute_bytes,
            "logits of a chunk and their gradient": 2 * logits,
            "head on every device, and its gradient": text.hidden_size * vocab * head_bytes,
        }


def divide_chunk(num_positions: int, chunk: int) -> int:
    """Positions whose logits exist at a time: at most ``chunk``, and a divisor of a device's part of a row."""
    # where it does not divide the part, their greatest common divisor divides both
    return math.gcd(num_positions, chunk) if num_positions % chunk else chunk


def chunk_of_mesh(num_positions: int, chunk: int) -> int:
    """The same for a row of ``num_positions``, under the mesh that is set."""
    mesh = jax.sharding.get_abstract_mesh()
    parts = 1 if mesh.empty else mesh.shape["sequence"]
    return divide_chunk(num_positions // parts, chunk)


def make_next_token(recipe: Recipe) -> NextToken:
    """The recipe's Thinker, with scanned layers and computing in the recipe's dtype."""
    num_sources = max(1, len(recipe.data.train), len(recipe.data.valid))
    assert isinstance(recipe.objective, NextTokenOptions)
    return NextToken(make_thinker(recipe), recipe.model, recipe.objective, num_sources)


def make_thinker(recipe: Recipe) -> Thinker:
    """The Thinker as any objective trains it or passes gradients through it."""
    dtype = jnp.dtype(recipe.dtype)
    return Thinker(recipe.model.thinker_config, remat=recipe.remat, media_by_rows=True, dtype=dtype)


def count_work(batch: TrainBatch) -> Metrics:
    """How much of a batch is not padding: what the model's FLOPs are counted from (docs/training.md)."""
    inputs = batch.inputs
    num_tokens, num_pairs = count_pairs(inputs.segment_ids)
    counts = {"tokens": num_tokens, "target_tokens": jnp.sum(batch.weights > 0), "pairs": num_pairs}
    if inputs.audio is not None:
        counts["blocks"] = jnp.sum(inputs.audio.length > 0)
    for frames in inputs.vision:
        sizes = _frame_sizes(frames.valid)  # [canvases, W]
        # a patch attends to all patches of its frame, itself included
        counts["patches"] = counts.get("patches", 0) + jnp.sum(sizes)
        counts["frame_pairs"] = counts.get("frame_pairs", 0.0) + jnp.sum(sizes.astype(jnp.float32) ** 2)
    return counts


def count_pairs(segment_ids: Int[Array, "*batch S"]) -> tuple[jax.Array, jax.Array]:
    """Positions that are no padding, and the pairs of those that see each other; each [].

    Causal attention: a position sees those of its segment up to itself.
    """
    # rows of accumulated batches are counted as rows of one
    segments = jnp.asarray(segment_ids).reshape(-1, segment_ids.shape[-1])  # [B, S]
    position = jnp.arange(segments.shape[1])  # [S]

    # the start of the example that a position belongs to: the last place up to it at which the segment id changes
    changes = segments[:, 1:] != segments[:, :-1]  # [B, S - 1]
    is_first = jnp.concatenate([jnp.full_like(segments[:, :1], True), changes], axis=1)  # [B, S]
    segment_start = jax.lax.cummax(jnp.where(is_first, position, 0), axis=1)  # [B, S]

    is_token = segments != PADDING  # [B, S]
    attended = jnp.where(is_token, position - segment_start + 1, 0)  # [B, S]
    # int32 holds the tokens of any batch, but not the pairs of a long row
    return jnp.sum(is_token), jnp.sum(attended, dtype=jnp.float32)


def _frame_sizes(valid: Int[Array, "*canvases W P"]) -> Int[jax.Array, "canvases W"]:
    """Patches of each frame of each canvas; a canvas has at most as many frames as windows."""
    num_windows, num_patches = valid.shape[-2:]
    # ``valid`` numbers the frames of a canvas from 1; 0 is padding, which is dropped
    frame_ids = jnp.asarray(valid, jnp.int32).reshape(-1, num_windows * num_patches)  # [canvases, W * P]
    return jax.vmap(lambda canvas: jnp.bincount(canvas, length=num_windows + 1)[1:])(frame_ids)

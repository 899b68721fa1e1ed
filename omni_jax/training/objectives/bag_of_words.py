"""Encoders without a language model behind them: features predict the tokens of answers as bags of words.

Letters: B rows, S positions, T positions of targets, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float

from omni_jax.batch import NO_FEATURE, Array, TrainBatch
from omni_jax.data.config import DataConfig
from omni_jax.models.thinker import Thinker
from omni_jax.training.objective import Loss, Metrics, Params, Sample, SampleRequest
from omni_jax.training.objectives.next_token import NextToken, make_thinker
from omni_jax.training.recipe import Recipe

_FLOAT32_BYTES = 4
_MIN_PROBABILITY = 1e-9  # added where the logarithm is taken


@dataclass(frozen=True, eq=False)
class BagOfWords(NextToken):
    """Answers as bags of words, by the features of all media of their example.

    The products of a feature with the token embeddings, scaled to a mean length of 1, are logits over the vocabulary.
    The distribution of an example is the mean over the features of its media, and the loss is the cross-entropy of the
    answer's tokens under it. So a feature comes to lie near the embeddings of what is in its place. Learning from
    captions as bags of words is from https://arxiv.org/abs/1511.02251; the mean of distributions, and the embeddings as
    classifiers, are ours. No decoder runs. Examples without media have no loss.
    """

    def denominators(self, batch: TrainBatch) -> Metrics:
        has_media = _sees_feature(batch).any(axis=-1)  # [..., B, T]
        weights = jnp.where(has_media, batch.weights, 0)
        return {
            "weight": jnp.maximum(jnp.sum(weights), 1e-6),
            "weight_by_source": jnp.maximum(self._sum_by_source(batch, weights), 1e-6),
        }

    def loss(
        self, params: Params, batch: TrainBatch, denominators: Metrics, key: jax.Array, trained: Collection[str]
    ) -> Loss:
        thinker = params["thinker"]
        x = self.model.apply({"params": thinker}, batch.inputs, method=Thinker.embeds)  # [B, S, D]
        table = thinker["decoder"]["embed"]["embedding"]  # [V, D]
        losses = bag_of_words_loss(jnp.asarray(x), table, batch) * batch.weights  # [B, T]
        terms = {"loss": jnp.sum(losses) / denominators["weight"]}
        if self.num_sources > 1:
            terms["loss_by_source"] = self._sum_by_source(batch, losses) / denominators["weight_by_source"]
        return Loss(terms["loss"], terms)

    def count_flops(self, sizes: Mapping[str, int], trained: Collection[str], counts: Mapping[str, float]) -> float:
        # nothing passes the decoder
        encoders = super().count_flops(sizes, trained, {**counts, "tokens": 0, "pairs": 0})
        text = self.config.thinker_config.text_config
        # a product forward, and one for the gradient of the features
        return encoders + 4.0 * text.hidden_size * text.vocab_size * counts["tokens"]

    def sample(self, params: Params, request: SampleRequest) -> list[Sample]:
        return []

    def estimate_activations(
        self, data: DataConfig, row_parts: int, sequence: int, tensor: int, trained: Collection[str]
    ) -> dict[str, int]:
        rows = data.rows // row_parts
        vocab = self.config.thinker_config.text_config.vocab_size
        logits = rows * data.tokens // sequence * vocab * _FLOAT32_BYTES
        return {
            "probabilities of words at all positions, and their gradient": 2 * logits,
            "probabilities of targets by position": 2 * rows * data.tokens**2 * _FLOAT32_BYTES,
        }


def bag_of_words_loss(
    x: Float[Array, "B S D"], table: Float[Array, "V D"], batch: TrainBatch
) -> Float[jax.Array, "B T"]:
    """Negative logarithm of the probability of each target under the media of its example; 0 where it has none.

    Args:
      x: features where media are; elsewhere whatever.
      table: token embeddings.
      batch: says where media are, and what the targets are.
    """
    # of length 1 on average: then words are about as likely as each other at first, however long embeddings are
    length = jnp.sqrt(jnp.mean(jnp.sum(table.astype(jnp.float32) ** 2, axis=1)))  # []
    logits = jnp.einsum("bsd,vd->bsv", x, (table / length).astype(x.dtype)).astype(jnp.float32)  # [B, S, V]
    probabilities = jax.nn.softmax(logits)  # [B, S, V]
    # of each target at each position
    of_targets = jnp.take_along_axis(probabilities, jnp.asarray(batch.targets)[:, None, :], axis=2)  # [B, S, T]
    sees = _sees_feature(batch).swapaxes(1, 2)  # [B, S, T]
    count = jnp.sum(sees, axis=1)  # [B, T]
    mean = jnp.sum(jnp.where(sees, of_targets, 0), axis=1) / jnp.maximum(count, 1)  # [B, T]
    return jnp.where(count > 0, -jnp.log(mean + _MIN_PROBABILITY), 0.0)


def _sees_feature(batch: TrainBatch) -> Bool[jax.Array, "*batch T S"]:
    """Whether a position holds a feature of the example that a target is of."""
    segment_ids = jnp.asarray(batch.inputs.segment_ids)  # [..., S]
    is_feature = jnp.asarray(batch.inputs.media_index) != NO_FEATURE  # [..., S]
    return (segment_ids[..., :, None] == segment_ids[..., None, :]) & is_feature[..., None, :]


def make_bag_of_words(recipe: Recipe) -> BagOfWords:
    """Over the recipe's Thinker, of which the encoders run."""
    num_sources = max(1, len(recipe.data.train), len(recipe.data.valid))
    return BagOfWords(make_thinker(recipe), recipe.model, num_sources=num_sources)

"""What encoders can learn before a language model reads them: the words that are said of sounds and pictures.

Letters: B rows, S positions, T positions of targets, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from omni_jax.batch import TrainBatch
from omni_jax.data.config import DataConfig
from omni_jax.models.thinker import Thinker
from omni_jax.training.bag_of_words import bag_of_words_loss, sees_feature
from omni_jax.training.objective import Loss, Metrics, Params, Sample, SampleRequest
from omni_jax.training.objectives.next_token import NextToken, make_thinker
from omni_jax.training.recipe import Recipe

_FLOAT32_BYTES = 4


@dataclass(frozen=True, eq=False)
class MediaWords(NextToken):
    """Answers as bags of words, of the features of the media that come before them.

    Each feature gives a distribution over the vocabulary, by its products with the token embeddings, which are scaled
    to length 1; the media of an example, the mean of those of its features; the loss is the cross-entropy of the
    answer's tokens under it. So a feature comes to lie near the embeddings of what is seen or heard there. That answers
    can be learned from as bags of words is from https://arxiv.org/abs/1511.02251; that features share the embeddings,
    and that places are not told, is ours. Nothing is decoded. Examples without media have no loss.
    """

    def denominators(self, batch: TrainBatch) -> Metrics:
        has_media = sees_feature(batch).any(axis=-1)  # [..., B, T]
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


def make_media_words(recipe: Recipe) -> MediaWords:
    """Over the recipe's Thinker, of which the encoders run."""
    num_sources = max(1, len(recipe.data.train), len(recipe.data.valid))
    return MediaWords(make_thinker(recipe), recipe.model, num_sources=num_sources)

"""A speech tokenizer whose codes are those of a Token2Wav that is there already, and stays as it is.

The codebook is the table of codes of the DiT: what is quantized is compared with the embeddings themselves, so a code
of the tokenizer is the DiT's code of the same number. Two losses say which code a sound has. Flow: the velocity of the
frozen DiT with the nearest embedding as the code of each frame, whose gradient passes straight through to what was
quantized; so codes are those from which the DiT makes this sound. Codes: where the row has those that the model's own
Talker has drawn, their cross-entropy, the logits being negative squared distances. Commitment keeps what is quantized
near its embedding.

Letters: A blocks of the tokenizer, S positions of a block, E width of an embedding, K codes, B rows, N blocks of a row
of the DiT, F frames of a block.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Float, Int

from omni_jax.batch import Array
from omni_jax.checkpoint import store
from omni_jax.data.code_matching import MatchingBatch, MatchingPacking, PrepareMatching, make_empty_batch
from omni_jax.data.config import DataConfig
from omni_jax.data.speech_examples import UNKNOWN_CODE
from omni_jax.errors import ConfigError
from omni_jax.models.audio_encoder import valid_positions
from omni_jax.models.ode_solver import Solver
from omni_jax.models.speech_tokenizer import SpeechTokenizer, abstract_params, init_params
from omni_jax.models.vector_quantizer import perplexity
from omni_jax.processing.processor import Processor
from omni_jax.speech_tokenizer_config import SPEECH_TOKENIZER, SPEECH_TOKENIZER_FILE, SpeechTokenizerConfig
from omni_jax.training.objective import Loss, Metrics, Objective, Params
from omni_jax.training.objectives.flow_matching import FlowMatching
from omni_jax.training.objectives.packed_speech import make_model
from omni_jax.training.options import CodeMatchingOptions, FlowMatchingOptions
from omni_jax.training.recipe import Recipe

_CODEBOOK = f"{SPEECH_TOKENIZER}/quantizer/codebook"
_TABLE = "token2wav/dit/codec_embed/embedding"
# what is computed of the tokenizer
_FRONT = tuple(f"{SPEECH_TOKENIZER}/{part}/" for part in ("conv1", "conv2", "front", "project_in"))
_FLOAT32_BYTES = 4


# compared and hashed by identity, as the step that holds it
@dataclass(frozen=True, eq=False)
class MatchCodes(Objective):
    """Losses of flow, codes and commitment; see ``Objective`` for its methods.

    Attributes:
      model: the tokenizer as it is trained; what is behind its quantizer is no part of the loss.
      flow: the loss of the DiT, whose parameters do not train.
      options: of the losses.
    """

    model: SpeechTokenizer
    flow: FlowMatching
    options: CodeMatchingOptions

    @property
    def components(self) -> tuple[str, ...]:
        return (SPEECH_TOKENIZER, "token2wav")

    @property
    def dtype(self) -> Any:
        return jnp.float32

    @property
    def _config(self) -> SpeechTokenizerConfig:
        return self.model.config

    @property
    def _width(self) -> int:
        """Of an embedding of the DiT."""
        return self.flow.config.emb_dim

    def abstract_params(self) -> dict[str, Any]:
        return {SPEECH_TOKENIZER: abstract_params(self.model), **self.flow.abstract_params()}

    def init_params(self, component: str, key: jax.Array) -> Any:
        if component != SPEECH_TOKENIZER:
            raise ConfigError(f"the checkpoint to begin from has no {component}, whose codes are to be found")
        return nn.unbox(init_params(self.model, key))

    def check_start(self, folder: Path) -> None:
        if "token2wav" in store.components(folder) and not Solver.load(folder).guidance:
            raise ConfigError(
                f"the DiT of {folder} was distilled, and its velocity is not that of sound any more; begin from the "
                "checkpoint that the distillation began from"
            )

    def convert_frozen(self, frozen: Params) -> Params:
        flat: dict[str, Any] = flatten_dict(frozen, sep="/")
        table = flat[_TABLE]
        codebook = flat[_CODEBOOK]
        # of abstract parameters only the shapes are asked for, which do not change
        if isinstance(table, jax.Array):
            flat[_CODEBOOK] = jax.jit(pad_table, static_argnums=1, out_shardings=codebook.sharding)(
                table, codebook.shape
            )
        return unflatten_dict(flat, sep="/")

    def extra_files(self) -> dict[str, str]:
        return {SPEECH_TOKENIZER_FILE: self._config.to_json()}

    def make_packing(self, data: DataConfig, processor: Processor, num_streams: int) -> MatchingPacking:
        bins = self._config.audio_config.num_mel_bins
        settings = processor.settings.mel
        if settings.feature_size != bins:
            raise ConfigError(f"the tokenizer takes {bins} mel bins; the preprocessor makes {settings.feature_size}")
        speech = self.flow.make_packing(data, processor, num_streams)
        # the tokenizer of the checkpoint is what trains: it has not made the codes of rows
        speech_rows = dataclasses.replace(speech.prepare, codec=self.options.codec)
        prepare = PrepareMatching(speech_rows, settings, self._config.codebook_size)
        return MatchingPacking(prepare, speech, self._config)

    def abstract_row(self, data: DataConfig) -> MatchingBatch:
        return make_empty_batch(self.flow.config, self.flow.budget(data), self._config)

    def denominators(self, batch: MatchingBatch) -> Metrics:
        length = jnp.asarray(batch.audio.length)
        return {
            **self.flow.denominators(batch.speech),
            "positions": jnp.maximum(jnp.sum((length + 1) // 2), 1).astype(jnp.float32),
            "known": jnp.maximum(jnp.sum(batch.codes != UNKNOWN_CODE), 1).astype(jnp.float32),
        }

    def loss(
        self, params: Params, batch: MatchingBatch, denominators: Metrics, key: jax.Array, trained: Collection[str]
    ) -> Loss:
        options = self.options
        model = self.model.bind({"params": params[SPEECH_TOKENIZER]})
        valid = valid_positions(batch.audio)  # [A, S]
        features = jnp.asarray(model.features(batch.audio), jnp.float32)  # [A, S, D]
        codes = model.quantizer.encode(features)  # [A, S]
        table = params["token2wav"]["dit"]["codec_embed"]["embedding"]  # [rows, E]
        nearest = jnp.asarray(table, jnp.float32)[codes]  # [A, S, E]
        compared = features[..., : self._width]  # [A, S, E]

        away = jnp.mean(jnp.square(compared - nearest), axis=-1)  # [A, S]
        commitment = jnp.sum(jnp.where(valid, away, 0)) / denominators["positions"]
        embeds = compared + jax.lax.stop_gradient(nearest - compared)  # [A, S, E]
        with jax.named_scope("flow"):
            errors = self.flow.sum_errors(params, batch.speech, key, take_positions(embeds, batch.position))
            flow = errors / denominators["frames"]
        with jax.named_scope("known_codes"):
            known = self._known_codes(compared, codes, table, batch.codes)
        known_loss = known["loss"] / denominators["known"]

        total = options.flow_weight * flow + options.code_weight * known_loss + options.commitment_weight * commitment
        weight = valid.reshape(-1).astype(jnp.float32)  # [A * S]
        counts = jax.ops.segment_sum(weight, codes.reshape(-1), self._config.codebook_size)  # [K]
        terms = {
            "loss": total,
            "flow": flow,
            "commitment": commitment,
            "code_loss": known_loss,
            "code_accuracy": known["right"] / denominators["known"],
            # of the batches of a step the mean, which for one is the value
            "perplexity": perplexity(counts) * jnp.sum(counts) / denominators["positions"],
        }
        return Loss(total, terms)

    def _known_codes(
        self,
        compared: Float[jax.Array, "A S E"],
        codes: Int[jax.Array, "A S"],
        table: Float[jax.Array, "rows E"],
        expected: Int[Array, "A S"],
    ) -> Metrics:
        """Of the codes that rows have: the cross-entropy, and how many are found; sums."""
        table = jnp.asarray(table, jnp.float32)[: self._config.codebook_size]  # [K, E]
        # the square of what is compared is the same for every code
        logits = 2 * compared @ table.T - jnp.sum(jnp.square(table), axis=-1)  # [A, S, K]
        expected = jnp.asarray(expected)
        is_known = expected != UNKNOWN_CODE  # [A, S]
        own = jnp.take_along_axis(jax.nn.log_softmax(logits), jnp.maximum(expected, 0)[..., None], axis=-1)  # [A, S, 1]
        return {
            "loss": -jnp.sum(jnp.where(is_known, own[..., 0], 0)),
            "right": jnp.sum(codes == expected).astype(jnp.float32),
        }

    def count_work(self, batch: MatchingBatch) -> Metrics:
        return self.flow.count_work(batch.speech)

    def count_flops(self, sizes: Mapping[str, int], trained: Collection[str], counts: Mapping[str, float]) -> float:
        # the DiT, which gradients pass; then what is before the quantizer
        total = self.flow.count_flops(sizes, (), counts)
        for path, size in sizes.items():
            if path.startswith(_FRONT) and path.endswith("/kernel"):
                # the first convolution is over frames, of which there are two a code
                positions = counts["tokens"] * (2 if "/conv1/" in path else 1)
                total += 2.0 * size * positions * (2 + (path in trained))
        # of the nearest code; and of the cross-entropy forward and backward
        return total + 4 * 2.0 * self._config.codebook_size * self._width * counts["tokens"]

    def estimate_activations(
        self, data: DataConfig, row_parts: int, sequence: int, tensor: int, trained: Collection[str]
    ) -> dict[str, int]:
        audio = self._config.audio_config
        codes = data.rows // row_parts * data.tokens
        compute_bytes = jnp.dtype(self.model.dtype).itemsize
        return {
            **self.flow.estimate_activations(data, row_parts, sequence, tensor, trained),
            "inputs of the tokenizer's layers": self._config.quantizer_layer * codes * audio.d_model * compute_bytes,
            "distances to codes, and their gradient": 2 * codes * self._config.codebook_size * _FLOAT32_BYTES,
        }


def pad_table(table: Float[jax.Array, "rows E"], shape: tuple[int, int]) -> Float[jax.Array, "K D"]:
    """The codebook: embeddings of codes, and behind them zeros, which tell no code from another."""
    num_codes, width = shape
    table = jnp.asarray(table, jnp.float32)[:num_codes]  # [K, E]
    return jnp.pad(table, ((0, 0), (0, width - table.shape[1])))


def take_positions(values: Float[jax.Array, "A S E"], position: Int[Array, "B N F"]) -> Float[jax.Array, "B N F E"]:
    """What each frame of the DiT takes of its row's blocks of the tokenizer."""
    position = jnp.asarray(position)
    own = values.reshape(len(position), -1, values.shape[-1])  # [B, positions, E]
    taken = jnp.take_along_axis(own, position.reshape(len(position), -1)[..., None], axis=1)  # [B, N * F, E]
    return taken.reshape(*position.shape, -1)


def make_match_codes(recipe: Recipe) -> MatchCodes:
    """The recipe's tokenizer and its Token2Wav.

    Raises:
      ConfigError: if the recipe asks for what this objective has not, or the two do not go together.
    """
    options = recipe.objective
    assert isinstance(options, CodeMatchingOptions)
    token2wav = make_model(recipe)
    dit = token2wav.config.dit_config
    config = options.model.with_blocks(options.block_codes)
    if config.codebook_size > dit.num_embeds + 1:
        raise ConfigError(f"the tokenizer has {config.codebook_size} codes, and the DiT {dit.num_embeds + 1}")
    if config.codebook_dim < dit.emb_dim:
        raise ConfigError(
            f"the codebook is {config.codebook_dim} wide, less than the {dit.emb_dim} of the embedding of a "
            "code of the DiT, which must fit in"
        )
    if dit.repeats != 2:
        raise ConfigError(f"a code of the DiT is {dit.repeats} frames, and one of the tokenizer 2")
    model = SpeechTokenizer(config, remat=recipe.remat, dtype=jnp.dtype(recipe.dtype))
    flow = FlowMatchingOptions(
        options.utterances, options.clip_frames, options.max_clip, options.codec, options.drop_sound, drop_all=0.0
    )
    return MatchCodes(model, dataclasses.replace(FlowMatching(token2wav), options=flow), options)

"""The speech tokenizer, from nothing: codes that keep what is said, and then how it sounds.

Three losses. Content: the text of an utterance by CTC over what the layers behind the quantizer make of its codes
(Graves et al. 2006, doi.org/10.1145/1143844.1143891), and where there is a Thinker, its next token as it writes down
what it is given in place of the features of its own encoder (as the 25 Hz tokenizer of the same family begins:
https://arxiv.org/abs/2601.15621). Sound: the mean absolute error of the log-mel of Token2Wav that a small decoder makes
of the quantized vectors. Commitment: vectors are to stay near the codes that they become. The codebook has no gradient:
it is an average over steps (``models.vector_quantizer``).

Letters: B rows, N blocks of a row, A = B N blocks, T mel frames of a block, S positions of a block, D width, Q channels
of the codebook, E width of the Thinker, U utterances of a row, P positions of an utterance at most, L labels.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Float

from omni_jax.batch import TrainBatch
from omni_jax.data.config import DataConfig
from omni_jax.data.packing import Budget
from omni_jax.data.speech_packing import SpeechBudget
from omni_jax.data.transcribed_dialogues import (
    DialogueBatch,
    DialoguePacking,
    PrepareDialogues,
    make_empty_dialogues,
)
from omni_jax.data.transcribed_examples import NO_LABEL, PrepareTranscribed
from omni_jax.data.transcribed_packing import TranscribedBatch, TranscribedPacking, make_empty_batch
from omni_jax.errors import ConfigError
from omni_jax.models.audio_encoder import valid_positions
from omni_jax.models.speech_tokenizer import SpeechTokenizer, abstract_params, init_params
from omni_jax.models.thinker import Thinker
from omni_jax.models.vector_quantizer import CodeSums, perplexity, sum_codes, update_codebook
from omni_jax.processing.processor import Processor
from omni_jax.speech_tokenizer_config import SPEECH_TOKENIZER, SPEECH_TOKENIZER_FILE, SpeechTokenizerConfig
from omni_jax.training.objective import Loss, Metrics, Objective, Params
from omni_jax.training.objectives.next_token import NextToken, make_thinker
from omni_jax.training.options import SpeechTokenizerOptions
from omni_jax.training.recipe import Recipe

_QUANTIZER = f"{SPEECH_TOKENIZER}/quantizer"
_MEL_DECODER = f"{SPEECH_TOKENIZER}/mel_decoder/"
_EMBEDDING = "thinker/decoder/embed/embedding"
_FLOAT32_BYTES = 4


# compared and hashed by identity, as the step that holds it
@dataclass(frozen=True, eq=False)
class TokenizeSpeech(Objective):
    """Losses of content, sound and commitment; see ``Objective`` for its methods.

    Attributes:
      model: the tokenizer as it is trained.
      options: of the losses.
      thinker: the loss of a Thinker's next token; None: there is none, and a batch is a ``TranscribedBatch`` and no
        ``DialogueBatch``.
    """

    model: SpeechTokenizer
    options: SpeechTokenizerOptions = dataclasses.field(default_factory=SpeechTokenizerOptions)
    thinker: NextToken | None = None

    @property
    def components(self) -> tuple[str, ...]:
        return (SPEECH_TOKENIZER,) if self.thinker is None else (SPEECH_TOKENIZER, "thinker")

    @property
    def dtype(self) -> Any:
        # of the codebook, which no gradient changes
        return jnp.float32

    @property
    def _config(self) -> SpeechTokenizerConfig:
        return self.model.config

    def abstract_params(self) -> dict[str, Any]:
        own = {SPEECH_TOKENIZER: abstract_params(self.model)}
        return own if self.thinker is None else {**own, **self.thinker.abstract_params()}

    def init_params(self, component: str, key: jax.Array) -> Any:
        if component == SPEECH_TOKENIZER:
            return nn.unbox(init_params(self.model, key))
        assert self.thinker is not None
        return self.thinker.init_params(component, key)

    def extra_files(self) -> dict[str, str]:
        return {SPEECH_TOKENIZER_FILE: self._config.to_json()}

    def make_packing(
        self, data: DataConfig, processor: Processor, num_streams: int
    ) -> TranscribedPacking | DialoguePacking:
        if data.isolate_media:
            raise ConfigError("data.isolate_media is not there for rows of speech; decode files that you trust")
        bins = self._config.audio_config.num_mel_bins
        settings = processor.settings.mel
        if settings.feature_size != bins:
            raise ConfigError(f"the tokenizer takes {bins} mel bins; the preprocessor makes {settings.feature_size}")
        budget = self._budget(data)
        prepare = PrepareTranscribed(
            settings,
            min(self.options.max_codes, budget.blocks * self._config.block_codes),
            self.options.max_labels,
            access=data.access,
            media_root=data.media_root,
            too_long=data.too_long,
        )
        packing = TranscribedPacking(prepare, budget, self._config)
        if self.thinker is None:
            return packing
        dialogues = self._dialogue_budget(data)
        reader = PrepareDialogues(prepare, processor, self.options.instruction, dialogues)
        return DialoguePacking(reader, packing, dialogues, self.thinker.config)

    def abstract_row(self, data: DataConfig) -> TranscribedBatch | DialogueBatch:
        budget = self._budget(data)
        if self.thinker is None:
            return make_empty_batch(self._config, budget, 1, self.options.max_labels)
        dialogues = dataclasses.replace(self._dialogue_budget(data), rows=1)
        return make_empty_dialogues(self._config, self.thinker.config, budget, dialogues, self.options.max_labels)

    def _dialogue_budget(self, data: DataConfig) -> Budget:
        """What a stream has for the Thinker."""
        return Budget(
            rows=data.rows // data.streams,
            tokens=self.options.positions,
            spans=data.spans,
            blocks=0,
            canvases=0,
            windows=data.windows,
        )

    def _budget(self, data: DataConfig) -> SpeechBudget:
        blocks = data.tokens // self._config.block_codes
        if not blocks:
            size = self._config.block_codes
            raise ConfigError(f"data.tokens is {data.tokens}; a row must hold a block of {size} codes")
        return SpeechBudget(data.rows // data.streams, blocks, self.options.utterances, clip_frames=0)

    def denominators(self, batch: TranscribedBatch | DialogueBatch) -> Metrics:
        speech = _speech_of(batch)
        length = jnp.asarray(speech.length)
        found = {
            "labels": jnp.maximum(jnp.sum(speech.labels != NO_LABEL), 1).astype(jnp.float32),
            "frames": jnp.maximum(jnp.sum(length), 1).astype(jnp.float32),
            "codes": jnp.maximum(jnp.sum((length + 1) // 2), 1).astype(jnp.float32),
        }
        if self.thinker is not None:
            assert isinstance(batch, DialogueBatch)
            found |= self.thinker.denominators(batch.dialogues)
        return found

    def loss(
        self,
        params: Params,
        batch: TranscribedBatch | DialogueBatch,
        denominators: Metrics,
        key: jax.Array,
        trained: Collection[str],
    ) -> Loss:
        options = self.options
        speech = _speech_of(batch)
        model = self.model.bind({"params": params[SPEECH_TOKENIZER]})
        valid = valid_positions(speech.audio)  # [A, S]
        features = model.features(speech.audio)  # [A, S, Q]
        vectors, codes = model.quantize(features)  # [A, S, Q], [A, S]
        away = jnp.mean(jnp.square(features - jax.lax.stop_gradient(vectors)), axis=-1)  # [A, S]
        commitment = jnp.sum(jnp.where(valid, away, 0)) / denominators["codes"]
        total = options.commitment_weight * commitment
        draw_key, pass_key = jax.random.split(key)
        if trained:
            # what is behind the quantizer begins to learn before codes say anything
            passes = jax.random.bernoulli(pass_key, options.unquantized, (len(valid), 1, 1))
            vectors = jnp.where(passes, features, vectors)  # [A, S, Q]
        inputs = model.project(vectors)  # [A, S, D]
        terms = {"commitment": commitment}

        hidden = model.hidden(inputs, valid)  # [A, S, D]
        with jax.named_scope("content"):
            content = self._content_loss(model.content_logits(hidden), speech) / denominators["labels"]
        terms["content"] = content
        total += options.content_weight * content
        if self.thinker is not None:
            assert isinstance(batch, DialogueBatch)
            output = model.output(hidden)  # [A, S / 2, E]
            found = self._next_token_loss(params["thinker"], output, batch.dialogues, denominators, trained)
            terms["next_token"] = found.terms["loss"]
            total += options.thinker_weight * found.total
        # of a phase without the decoder it would say nothing
        if not trained or any(path.startswith(_MEL_DECODER) for path in trained):
            with jax.named_scope("sound"):
                mel = model.decode_mel(inputs, valid)  # [A, T, mel]
                sound = self._mel_loss(mel, speech) / denominators["frames"]
            terms["mel"] = sound
            total += options.mel_weight * sound

        flat = features.reshape(-1, features.shape[-1])  # [A S, Q]
        sums = sum_codes(flat, codes.reshape(-1), valid.reshape(-1), self._config.codebook_size, draw_key)
        # of the batches of a step the mean, which for one is the value
        share = jnp.sum(sums.counts) / denominators["codes"]
        terms |= self._describe_codes(params, sums, share)
        return Loss(total, {"loss": total, **terms}, sums._asdict())

    def _next_token_loss(
        self,
        thinker: Any,
        output: Float[jax.Array, "A pairs E"],
        dialogues: TrainBatch,
        denominators: Metrics,
        trained: Collection[str],
    ) -> Loss:
        """Of the Thinker, which reads the tokenizer's output in the places of sound."""
        assert self.thinker is not None
        features = [output.reshape(-1, output.shape[-1])]  # [A * S / 2, E]
        with jax.named_scope("thinker"):
            hidden = self.thinker.model.apply(
                {"params": thinker}, dialogues.inputs, features, method=Thinker.hidden_of_features
            )  # [B, positions, E]
        return self.thinker.loss_of_hidden(thinker, jnp.asarray(hidden), dialogues, denominators, trained)

    def _content_loss(self, logits: Float[jax.Array, "A S labels"], batch: TranscribedBatch) -> Float[jax.Array, ""]:
        """The CTC loss of all utterances, in nats."""
        rows = len(batch.begin)
        positions = logits.reshape(rows, -1, logits.shape[-1])  # [B, N S, labels]
        length = (jnp.asarray(batch.length) + 1) // 2  # [B, U]
        place = jnp.arange(min(self.options.max_codes, positions.shape[1]))  # [P]
        first = jnp.asarray(batch.begin) * self._config.block_codes  # [B, U]
        index = jnp.minimum(first[..., None] + place, positions.shape[1] - 1)  # [B, U, P]
        own = jnp.take_along_axis(positions, index.reshape(rows, -1)[..., None], axis=1)
        own = own.reshape(-1, len(place), logits.shape[-1])  # [B U, P, labels]
        is_padding = place >= length.reshape(-1, 1)  # [B U, P]
        labels = jnp.asarray(batch.labels).reshape(len(own), -1)  # [B U, L]
        losses = optax.ctc_loss(own, is_padding.astype(jnp.float32), labels, (labels == NO_LABEL).astype(jnp.float32))
        return jnp.sum(jnp.where(length.reshape(-1) > 0, losses, 0))

    def _mel_loss(self, mel: Float[jax.Array, "A T mel"], batch: TranscribedBatch) -> Float[jax.Array, ""]:
        """The absolute error of all frames, each the mean over its bins."""
        target = jnp.asarray(batch.target_mel).reshape(mel.shape)
        is_sound = jnp.arange(mel.shape[1]) < jnp.asarray(batch.audio.length)[:, None]  # [A, T]
        return jnp.sum(jnp.where(is_sound, jnp.mean(jnp.abs(mel - target), axis=-1), 0))

    def _describe_codes(self, params: Params, found: CodeSums, share: Float[jax.Array, ""]) -> Metrics:
        """How the codebook is used: in the batch, and over the steps before it."""
        average = jnp.asarray(params[SPEECH_TOKENIZER]["quantizer"]["counts"])  # [N]
        # a code that is drawn as often as one in a hundred of an even share
        in_use = average > 0.01 * jnp.sum(average) / len(average)
        return {
            "codebook_use": share * jnp.mean(in_use.astype(jnp.float32)),
            "perplexity": share * perplexity(found.counts),
        }

    def apply_statistics(self, params: Params, statistics: Metrics, key: jax.Array) -> dict[str, jax.Array]:
        new = update_codebook(
            params[SPEECH_TOKENIZER]["quantizer"], CodeSums(**statistics), self.options.codebook_decay
        )
        return {f"{_QUANTIZER}/{name}": value for name, value in new.items()}

    def count_work(self, batch: TranscribedBatch | DialogueBatch) -> Metrics:
        speech = _speech_of(batch)
        codes = jnp.sum((jnp.asarray(speech.length) + 1) // 2)
        counts = {"tokens": codes, "target_tokens": jnp.sum(speech.labels != NO_LABEL)}
        if self.thinker is not None:
            assert isinstance(batch, DialogueBatch)
            own = self.thinker.count_work(batch.dialogues)
            counts |= {"thinker_tokens": own["tokens"], "thinker_pairs": own["pairs"]}
        return counts

    def count_flops(self, sizes: Mapping[str, int], trained: Collection[str], counts: Mapping[str, float]) -> float:
        total = 0.0
        for path, size in sizes.items():
            if path.startswith(SPEECH_TOKENIZER) and path.endswith("/kernel"):
                # the first convolution is over frames, of which there are two a code
                positions = counts["tokens"] * (2 if "/conv1/" in path else 1)
                total += 2.0 * size * positions * (2 + (path in trained))
        # of the nearest code, forward alone
        total += 2.0 * sizes[f"{_QUANTIZER}/codebook"] * counts["tokens"]
        if self.thinker is not None:
            thinker_counts = {"tokens": counts["thinker_tokens"], "pairs": counts["thinker_pairs"]}
            # what it reads trains, as if it were the embeddings of its tokens
            total += self.thinker.count_flops(sizes, {*trained, _EMBEDDING}, thinker_counts)
        return total

    def estimate_activations(
        self, data: DataConfig, row_parts: int, sequence: int, tensor: int, trained: Collection[str]
    ) -> dict[str, int]:
        audio = self._config.audio_config
        codes = data.rows // row_parts * data.tokens
        found = {
            "inputs of the layers": audio.encoder_layers * codes * audio.d_model * jnp.dtype(self.model.dtype).itemsize,
            "distances to codes": codes * self._config.codebook_size * _FLOAT32_BYTES,
        }
        if self.thinker is not None:
            dialogues = dataclasses.replace(data, tokens=self.options.positions)
            found |= self.thinker.estimate_activations(dialogues, row_parts, sequence, tensor, trained)
        return found


def make_speech_tokenizer(recipe: Recipe) -> TokenizeSpeech:
    """The recipe's tokenizer, computing in its dtype; distances to codes are float32.

    Raises:
      ConfigError: if the recipe asks for what this objective has not.
    """
    assert isinstance(recipe.objective, SpeechTokenizerOptions)
    if recipe.optimizer.accumulate > 1:
        raise ConfigError(
            "optimizer.accumulate: codes that are not used are replaced by vectors of one batch; give larger data.rows"
        )
    if recipe.parts.folders:
        raise ConfigError("--parts are of the Thinker, which this recipe does not train; leave them out")
    if recipe.eval.samples:
        raise ConfigError("eval.samples asks for answers, which a speech tokenizer does not give")
    options = recipe.objective
    config = options.model.with_blocks(options.block_codes)
    model = SpeechTokenizer(config, remat=recipe.remat, dtype=jnp.dtype(recipe.dtype))
    if not options.thinker_weight:
        return TokenizeSpeech(model, options)
    width = recipe.model.thinker_config.text_config.hidden_size
    output = options.model.audio_config.output_dim
    if output != width:
        raise ConfigError(f"the output of the tokenizer is {output} wide, and the Thinker {width}; use another size")
    # one loss for all files of rows
    thinker = NextToken(make_thinker(recipe), recipe.model)
    return TokenizeSpeech(model, options, thinker)


def _speech_of(batch: TranscribedBatch | DialogueBatch) -> TranscribedBatch:
    return batch.speech if isinstance(batch, DialogueBatch) else batch

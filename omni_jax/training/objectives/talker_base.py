"""What objectives of the Talker share: its rows, and its hidden states over the streams that the Thinker's make.

Letters: B rows, S positions of the Thinker, P of the Talker, U utterances of a row, E width of the Thinker, D of the
Talker.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from omni_jax.batch import NO_FEATURE
from omni_jax.checkpoint.fingerprint import find_codec
from omni_jax.checkpoint.voices import VOICES_FILE, load_voices
from omni_jax.config import OmniConfig, TalkerConfig
from omni_jax.data.config import DataConfig
from omni_jax.data.packing import Budget, processor_of_rows
from omni_jax.data.spoken_examples import PrepareSpoken
from omni_jax.data.spoken_packing import SpokenBatch, SpokenBudget, SpokenPacking, SpokenPart, assemble_spoken
from omni_jax.errors import ConfigError
from omni_jax.models import talker
from omni_jax.models.talker import Talker
from omni_jax.models.talker_conditioning import gather_rows, select_text, talker_rows
from omni_jax.models.thinker import Thinker
from omni_jax.plain_files import has_file
from omni_jax.processing.processor import Processor
from omni_jax.training.code_vectors import read_codebook, write_code_vectors
from omni_jax.training.losses import TokenLogProbs, token_log_probs
from omni_jax.training.objective import Metrics, Objective, Params, Sample, SampleRequest
from omni_jax.training.objectives.next_token import NextToken, chunk_of_mesh, count_pairs, divide_chunk
from omni_jax.training.options import TalkerOptions

_FLOAT32_BYTES = 4
_THINKER = "thinker/"  # of the paths of its parameters
_EMBEDDING = "thinker/decoder/embed/embedding"


class Streams(NamedTuple):
    """What both models make of a batch.

    Attributes:
      thinker: hidden states of the Thinker.
      talker: of the Talker, of which the logits of the next code are a product.
    """

    thinker: Float[jax.Array, "B S E"]
    talker: Float[jax.Array, "B P D"]


# compared and hashed by identity, as the step that holds it
@dataclass(frozen=True, eq=False)
class TalkerObjective(Objective):
    """A loss over the codes of the Talker; see ``Objective`` for its methods.

    Attributes:
      thinker: the Thinker's own objective.
      model: the Talker as it is trained.
      config: of the whole model.
      options: of the loss.
    """

    thinker: NextToken
    model: Talker
    config: OmniConfig
    options: Any = dataclasses.field(default_factory=TalkerOptions)  # or ``TalkerDPOOptions``

    @property
    def has_text_loss(self) -> bool:
        """Whether the Thinker's own loss is taken too."""
        return False

    @property
    def components(self) -> tuple[str, ...]:
        return ("thinker", "talker")

    @property
    def dtype(self) -> Any:
        return self.model.dtype

    def abstract_params(self) -> dict[str, Any]:
        return {**self.thinker.abstract_params(), "talker": talker.abstract_params(self.model)}

    def init_params(self, component: str, key: jax.Array) -> Any:
        if component == "talker":
            return nn.unbox(talker.init_params(self.model, key))
        return self.thinker.init_params(component, key)

    def initial_values(self, component: str, folder: Path) -> dict[str, np.ndarray]:
        """Codes that are neighbours in the speech tokenizer's codebook begin as neighbours, in embeddings and logits.

        The embedding of a code is added to a hidden state of the Thinker, so that it begins about as large. Other ids
        keep small ones: the padding code must not hide the token of the voice, whose embedding is small too.
        """
        if component != "talker":
            return {}
        codebook = read_codebook(folder)
        if codebook is None:
            return {}
        c = self.config.talker_config
        rng = np.random.default_rng(2)
        embedding = 0.02 * rng.standard_normal((c.vocab_size, c.embedding_size), np.float32)
        head = rng.standard_normal((c.vocab_size, c.hidden_size), np.float32)
        write_code_vectors(embedding, codebook)
        write_code_vectors(head, codebook, seed=1)
        return {
            "decoder/embed/embedding": embedding,
            "decoder/head/kernel": np.ascontiguousarray(head.T) / np.sqrt(c.hidden_size),
        }

    def make_packing(self, data: DataConfig, processor: Processor, num_streams: int) -> SpokenPacking:
        prepare = PrepareSpoken(**self.prepare_arguments(data, processor, num_streams))
        return SpokenPacking(prepare, self.budget(data), processor.config, self.dtype)

    def prepare_arguments(self, data: DataConfig, processor: Processor, num_streams: int) -> dict[str, Any]:
        """The fields of ``PrepareSpoken``, by name; see ``make_packing``."""
        return dict(
            processor=processor_of_rows(data, processor, max(data.workers, 1) * num_streams),
            max_length=data.tokens,
            check=self.budget(data).check,
            voices=self._find_voices(processor),
            codec=self.options.codec or find_codec(processor.folder),
            use_audio_in_video=data.use_audio_in_video,
            media_root=data.media_root,
            too_long=data.too_long,
        )

    def _find_voices(self, processor: Processor) -> dict[str, int]:
        """The voices of the checkpoint that a run started from, and those of its options.

        Raises:
          ConfigError: if a new one is not new, or begins with a token that there is not.
        """
        voices: dict[str, int] = {}
        if processor.folder is not None and has_file(processor.folder / VOICES_FILE):
            for name, voice in load_voices(processor.folder).items():
                voices[name] = voice.bos_token
        vocab_size = self.config.thinker_config.text_config.vocab_size
        for name, token in self.options.voices.items():
            if token >= vocab_size:
                raise ConfigError(
                    f"objective.voices: {name!r} begins with the token {token}, but the Thinker has {vocab_size}"
                )
            if voices.get(name, token) != token:
                raise ConfigError(
                    f"objective.voices: {name!r} is a voice of the checkpoint and begins with the token {voices[name]}"
                )
            voices[name] = token
        return voices

    def abstract_row(self, data: DataConfig) -> Any:
        # an empty batch of one row, made by the code that makes all others, so that the two cannot differ
        budget = self.budget(dataclasses.replace(data, rows=1, streams=1))
        return assemble_spoken([SpokenPart(budget)], budget, self.config, first=0, streams=1, media_dtype=self.dtype)

    def budget(self, data: DataConfig) -> SpokenBudget:
        """What a stream may put into a step."""
        return SpokenBudget(Budget.of(data), self.options.positions, self.options.utterances)

    def trains_thinker(self, trained: Collection[str]) -> bool:
        """Whether something of the Thinker trains beside the embeddings of new voices."""
        return any(path.startswith(_THINKER) and path != _EMBEDDING for path in trained)

    def run_models(self, params: Params, batch: SpokenBatch, trained: Collection[str]) -> Streams:
        """Both models, once; nothing that is frozen is differentiated.

        Args:
          params: of both.
          batch: it.
          trained: paths of the parameters that train.
        """
        live: Any = params["thinker"]
        thinker = live if self.trains_thinker(trained) else jax.lax.stop_gradient(live)
        inputs = batch.dialogues.inputs
        found: Any = self.thinker.model.apply({"params": thinker}, inputs, method=Thinker.hidden_and_embeds)
        hidden, embeds = found  # [B, S, E]
        rows = talker_rows(hidden, embeds, jnp.asarray(inputs.media_index) != NO_FEATURE)  # [B, S, E]
        special = jnp.asarray(batch.special)
        special = special.reshape(len(special), -1)  # [B, 3 U]
        special_embeds: Any = self.thinker.model.apply({"params": thinker}, special, method=Thinker.embed_tokens)
        if self.options.voices and _EMBEDDING in trained:
            own: Any = self.thinker.model.apply({"params": live}, special, method=Thinker.embed_tokens)
            # of the whole table only the rows of new voices have a gradient
            is_new = jnp.isin(special, np.array(list(self.options.voices.values())))[..., None]
            special_embeds = jnp.where(is_new, own, special_embeds)  # [B, 3 U, E]
        with jax.named_scope("talker_stream"):
            text = select_text(gather_rows(rows, batch.text_row), batch.part, special_embeds)  # [B, P, E]
        stream = (text, batch.codes, batch.spans, batch.segment_ids)
        codes: Any = self.model.apply({"params": params["talker"]}, *stream, method=Talker.hidden)
        return Streams(hidden, codes)

    def code_log_probs(self, params: Params, streams: Streams, batch: SpokenBatch) -> TokenLogProbs:
        """Of the code after each position, among all ids of the Talker; [B, P]."""
        head = params["talker"]["decoder"]["head"]["kernel"]
        chunk = chunk_of_mesh(batch.targets.shape[1], self.options.chunk)
        return token_log_probs(head, streams.talker, batch.targets, chunk=chunk)

    def count_work(self, batch: Any) -> Metrics:
        return self.count_spoken(batch)

    def count_spoken(self, batch: SpokenBatch) -> Metrics:
        """How much of a batch is no padding; see ``Objective.count_work``."""
        counts = self.thinker.count_work(batch.dialogues)
        positions, pairs = count_pairs(batch.segment_ids)
        # what is trained on are codes; the Talker's positions are what its FLOPs are counted from
        return {
            **counts,
            "text_tokens": counts["tokens"],
            "tokens": positions,
            "target_tokens": jnp.sum(batch.weights > 0),
            "talker_pairs": pairs,
        }

    def count_flops(self, sizes: Mapping[str, int], trained: Collection[str], counts: Mapping[str, float]) -> float:
        c = self.config.talker_config
        total = self._thinker_flops(sizes, trained, counts)
        for path, size in sizes.items():
            if path.startswith("talker/") and path.endswith("/kernel"):
                # gradients pass everywhere, since the embeddings of codes come before all else
                total += 2.0 * size * counts["tokens"] * (2 + (path in trained))
        # 4: two products, each of 2 FLOPs a pair and element of the heads; two backward for each of them
        width = c.num_attention_heads * c.head_dim
        return total + 3 * 4.0 * c.num_hidden_layers * width * counts["talker_pairs"]

    def _thinker_flops(self, sizes: Mapping[str, int], trained: Collection[str], counts: Mapping[str, float]) -> float:
        own_sizes = {}
        for path, size in sizes.items():
            if path.startswith(_THINKER) and (self.has_text_loss or "/head/" not in path):
                own_sizes[path] = size
        own_trained = trained if self.trains_thinker(trained) else ()
        return self.thinker.count_flops(own_sizes, own_trained, {**counts, "tokens": counts["text_tokens"]})

    def sample(self, params: Params, request: SampleRequest) -> list[Sample]:
        return self.thinker.sample(params, request)

    def estimate_activations(
        self, data: DataConfig, row_parts: int, sequence: int, tensor: int, trained: Collection[str]
    ) -> dict[str, int]:
        c: TalkerConfig = self.config.talker_config
        compute_bytes = jnp.dtype(self.dtype).itemsize
        rows = data.rows // row_parts
        length = self.options.positions // sequence
        logits = rows * divide_chunk(length, self.options.chunk) * (c.vocab_size // tensor) * _FLOAT32_BYTES
        thinker_positions = rows * (data.tokens // sequence)
        found = {
            # hidden states, embeddings, and their sum; then the text of each position, and what is projected
            "what the Talker reads": (3 * thinker_positions + 2 * rows * length) * c.embedding_size * compute_bytes,
            "inputs of the Talker's layers": c.num_hidden_layers * rows * length * c.hidden_size * compute_bytes,
            "logits of a chunk of codes and their gradient": 2 * logits,
        }
        if self.trains_thinker(trained):
            found |= self.thinker.estimate_activations(data, row_parts, sequence, tensor, trained)
        return found

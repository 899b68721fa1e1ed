"""Both decode loops, Thinker's and Talker's, over the parts of a checkpoint: what the tests of speech drive."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
from jaxtyping import Float

from omni_jax import mrope
from omni_jax.batch import Array, bucket
from omni_jax.checkpoint import store
from omni_jax.config import OmniConfig
from omni_jax.engine.decode_state import Context
from omni_jax.engine.request import TalkerParams
from omni_jax.engine.sampling import SamplingParams
from omni_jax.engine.talker_engine import SpeechRequest, TalkerEngine, TextProgress
from omni_jax.engine.talker_programs import NO_SLOT, TalkerState, TextCounters, end_codes
from omni_jax.engine.thinker_engine import TextRequest, ThinkerEngine
from omni_jax.engine.thinker_programs import ThinkerPrefix, ThinkerState
from omni_jax.layers.stack import unstack_layers
from omni_jax.models.talker import Talker
from omni_jax.models.thinker import Thinker
from omni_jax.processing.layout import Prompt
from omni_jax.processing.prefill_plan import PrefillChunk, PrefillPlan, PromptPiece, plan_prefill
from omni_jax.segments import Text

CAPACITY = 512  # of the caches: one for all prompts, so that the loops compile once


@dataclass(frozen=True)
class Dialogue:
    """A prompt, how long the reply is at most, and how it is spoken."""

    prompt: Prompt
    max_tokens: int
    voice_token: int
    talker: TalkerParams
    stop_ids: tuple[int, ...] = ()


class Parts:
    """A model's two engines in float32."""

    def __init__(self, folder: Path, max_positions: int | None = None):
        """``max_positions``: of the Talker, other than in the folder's config."""
        self.config = OmniConfig.load(folder)
        if max_positions is not None:
            talker_config = dataclasses.replace(self.config.talker_config, max_position_embeddings=max_positions)
            self.config = dataclasses.replace(self.config, talker_config=talker_config)
        params = store.load(folder, ["thinker", "talker"])
        thinker = Thinker(self.config.thinker_config, scan_layers=False)
        talker = Talker(self.config.talker_config, scan_layers=False)
        self.thinker = ThinkerEngine(thinker, unstack_layers(params["thinker"]), collect_talker_inputs=True)
        self.talker = TalkerEngine(talker, unstack_layers(params["talker"]), self.config, self.thinker.embed_tokens)

    def suppress_ends(self) -> None:
        suppress_ends(self.talker, self.config)

    def plan(self, prompt: Prompt) -> PrefillPlan:
        spans = mrope.resolve_spans(prompt.segments, self.config.thinker_config)
        return plan_prefill([PromptPiece(prompt, spans)], self.config)

    def prefill(self, prompt: Prompt) -> tuple[ThinkerPrefix, Context]:
        """Both prefixes of a prompt."""
        plan = self.plan(prompt)
        features = [self.thinker.encode(media) for media in plan.encoder_inputs]
        prefix, context = self.thinker.init_prefix(1, CAPACITY), self.talker.init_prefix(1, CAPACITY)
        start = 0
        for chunk in plan.chunks:
            prefix = self.thinker.prefill(prefix, chunk, features)
            context = self.prefill_talker(context, prefix.talker_inputs, chunk, start)
            start += chunk.num_tokens
        return prefix, context

    def prefill_talker(self, context: Context, talker_inputs: Array | None, chunk: PrefillChunk, start: int) -> Context:
        assert talker_inputs is not None
        return self.talker.prefill(context, talker_inputs, chunk, start)

    def insert_all(self, dialogues: Sequence[Dialogue]) -> tuple[ThinkerState, TalkerState]:
        """Each prompt in a slot of both engines, with slots to spare."""
        num_slots = bucket(len(dialogues))
        thinker_state = self.thinker.init_state(num_slots, CAPACITY)
        talker_state = self.talker.init_state(num_slots, CAPACITY)
        for slot, dialogue in enumerate(dialogues):
            prefix, context = self.prefill(dialogue.prompt)
            request = TextRequest(dialogue.prompt.tokens, SamplingParams(), dialogue.max_tokens, dialogue.stop_ids)
            thinker_state = self.thinker.insert(thinker_state, slot, prefix, request)
            talker_state = self.talker.insert(talker_state, slot, context)
        return thinker_state, talker_state

    def answer(self, state: ThinkerState, num_replies: int) -> tuple[list[list[int]], ThinkerState]:
        """The token ids of each reply, and the state after them."""
        replies: list[list[int]] = [[] for _ in range(num_replies)]
        remaining = np.ones(1)
        length = int(np.max(state.context.cache.lengths))
        while remaining.any():
            length += self.thinker.tokens_per_call
            state, result = self.thinker.decode(self.thinker.resize(state, length))
            decoded = result.to_host()
            remaining = decoded.remaining
            for slot, reply in enumerate(replies):
                reply += decoded.at_slot(slot).tolist()
        return replies, state

    def append_all(
        self,
        state: TalkerState,
        talker_inputs: Float[Array, "T capacity E"],
        prompts: Sequence[int],
        counts: Sequence[int],
    ) -> TalkerState:
        """Takes the first so many tokens of each reply to the Talker's slots; slot i follows slot i."""
        num_slots = len(state.remaining)
        thinker_slot = np.where(np.arange(num_slots) < len(prompts), np.arange(num_slots), NO_SLOT).astype(np.int32)
        lengths = np.array([*prompts, *[0] * (num_slots - len(prompts))], np.int32)
        num_tokens = np.array([*counts, *[0] * (len(talker_inputs) - len(counts))], np.int32)
        for _ in range(0, max(counts, default=0), self.talker.append_width):
            state = self.talker.append_reply(state, talker_inputs, num_tokens, thinker_slot, lengths)
        return state

    def speak(
        self,
        state: TalkerState,
        talker_inputs: Float[Array, "T capacity E"],
        dialogues: Sequence[Dialogue],
        counts: Sequence[int],
    ) -> list[list[int]]:
        """The codes of complete replies of so many tokens."""
        prompts = [len(dialogue.prompt) for dialogue in dialogues]
        state = self.append_all(state, talker_inputs, prompts, counts)
        state = self.talker.begin(state, self.requests(dialogues, counts))
        progress = finished_text(counts, len(state.remaining))
        return self.decode_all(state, progress, len(dialogues))[0]

    def requests(self, dialogues: Sequence[Dialogue], counts: Sequence[int]) -> dict[int, SpeechRequest]:
        """Of the replies that can be spoken."""
        requests = {}
        for slot, (dialogue, count) in enumerate(zip(dialogues, counts, strict=True)):
            if count > 1:
                requests[slot] = self.request(dialogue)
        return requests

    def request(self, dialogue: Dialogue) -> SpeechRequest:
        segments = (*dialogue.prompt.segments, Text(2))
        span = mrope.resolve_spans(segments, self.config.thinker_config)[-1]
        talker = dialogue.talker
        span = dataclasses.replace(span, begin=0)
        return SpeechRequest(len(dialogue.prompt), dialogue.voice_token, talker.sampling, talker.max_tokens, span)

    def decode_all(
        self, state: TalkerState, progress: TextProgress, num_replies: int
    ) -> tuple[list[list[int]], TalkerState]:
        """All codes that a text of this progress allows."""
        codes: list[list[int]] = [[] for _ in range(num_replies)]
        none = np.zeros(len(state.remaining), np.int32)
        while True:
            length = int(np.max(state.context.cache.lengths)) + self.talker.codes_per_call
            state = self.talker.resize(state, length)
            state, result = self.talker.decode(state, progress, TextCounters(none, none))
            decoded = result.to_host()
            new = [decoded.at_slot(slot).tolist() for slot in range(num_replies)]
            for reply, more in zip(codes, new, strict=True):
                reply += more
            if not any(new):
                return codes, state

    def run(self, dialogues: Sequence[Dialogue]) -> tuple[list[list[int]], list[list[int]]]:
        """The token ids of each reply, and its codes."""
        thinker_state, talker_state = self.insert_all(dialogues)
        replies, thinker_state = self.answer(thinker_state, len(dialogues))
        assert thinker_state.talker_inputs is not None
        return replies, self.speak(talker_state, thinker_state.talker_inputs, dialogues, [*map(len, replies)])


def suppress_ends(engine: TalkerEngine, config: OmniConfig) -> None:
    """Gives the two ends a logit of zero, which is never the highest: greedy speech goes on to its limit."""
    head = engine.params["decoder"]["head"]
    ends = end_codes(config.talker_config)
    head["kernel"] = jax.numpy.asarray(head["kernel"]).at[:, ends].set(0)


def finished_text(counts: Sequence[int], num_slots: int) -> TextProgress:
    """Replies that are complete; slots to spare have none."""
    tokens = np.array([*counts, *[0] * (num_slots - len(counts))], np.int32)
    return TextProgress(np.full(num_slots, NO_SLOT, np.int32), tokens, np.ones(num_slots, bool))

"""Both loops, Thinker's and Talker's, over the parts of a checkpoint: what the tests of speech drive."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
from jaxtyping import Float

from omni_jax import mrope
from omni_jax.batch import Array, Spans, bucket
from omni_jax.checkpoint import store
from omni_jax.config import OmniConfig
from omni_jax.engine.prefill import EMPTY_PROMPT
from omni_jax.engine.sampling import SamplingParams
from omni_jax.engine.talker_engine import Said, SpeechRequest, SpeechState, TalkerEngine, TalkerParams
from omni_jax.engine.thinker_engine import PAD_TOKEN, TextRequest, TextState, ThinkerEngine
from omni_jax.layers.stack import unstack_layers
from omni_jax.models.talker import Talker
from omni_jax.models.thinker import Thinker
from omni_jax.processing.layout import Prompt
from omni_jax.processing.prefill_plan import Feed, feed

SLOTS = 512  # of the caches: one number for all prompts, so that the loops compile once


@dataclass(frozen=True)
class Line:
    """One row to be spoken: a prompt, how long the reply is at most, and how it is said."""

    prompt: Prompt
    max_tokens: int
    speaker: int
    talk: TalkerParams
    stop: tuple[int, ...] = ()


class Parts:
    """A model's two loops in float32."""

    def __init__(self, folder: Path):
        self.config = OmniConfig.load(folder)
        held = store.load(folder, ["thinker", "talker"])
        thinker = Thinker(self.config.thinker_config, scan_layers=False)
        talker = Talker(self.config.talker_config, scan_layers=False)
        self.text = ThinkerEngine(thinker, unstack_layers(held["thinker"]), keep=True)
        self.speech = TalkerEngine(talker, unstack_layers(held["talker"]), self.config, self.text.embed_tokens)

    def silence_ends(self) -> None:
        silence_ends(self.speech, self.config)

    def read(self, prompts: Sequence[Prompt]) -> tuple[TextState, SpeechState]:
        """Both loops after prompts, with rows to spare."""
        rows = bucket(len(prompts))
        plan = self.plan(prompts, rows)
        features = [self.text.encode(call) for call in plan.calls]
        text, speech = self.text.empty(rows, SLOTS), self.speech.empty(rows, SLOTS)
        for stretch in plan.stretches:
            text = self.text.read(text, stretch, features)
            assert text.heard is not None
            speech = self.speech.read(speech, text.heard, stretch.chunk)
        return text, speech

    def plan(self, prompts: Sequence[Prompt], rows: int) -> Feed:
        spans = [mrope.resolve(p.segments, self.config.thinker_config) for p in prompts]
        spare = rows - len(prompts)
        return feed([*prompts, *[EMPTY_PROMPT] * spare], [*spans, *[[]] * spare], self.config)

    def reply(self, state: TextState, lines: Sequence[Line]) -> tuple[list[list[int]], TextState]:
        """The token ids of each reply, and the state after them."""
        requests = {i: TextRequest(SamplingParams(), line.max_tokens, line.stop) for i, line in enumerate(lines)}
        state, made = self.text.ask(state, requests, {i: line.prompt.tokens for i, line in enumerate(lines)}), []
        while np.asarray(state.left).any():
            tokens, state = self.text.advance(state)
            made.append(tokens)
        return [row[row != PAD_TOKEN].tolist() for row in np.concatenate(made, axis=1)[: len(lines)]], state

    def speak(
        self, state: SpeechState, heard: Float[Array, "B slots E"], lines: Sequence[Line], replies: Sequence[int]
    ) -> list[list[int]]:
        """The codes of replies of so many tokens, all of which are known."""
        rows, made = heard.shape[0], []
        said = said_all([len(line.prompt) for line in lines], replies, rows)
        new = [i for i, reply in enumerate(replies) if reply > 1]
        requests = {
            i: SpeechRequest(len(lines[i].prompt), len(lines[i].prompt), lines[i].speaker, lines[i].talk) for i in new
        }
        state = self.speech.begin(state, heard, requests, after([line.prompt for line in lines], rows, self.config))
        while self.speech.ready(state, said).any():
            codes, state = self.speech.advance(state, heard, said)
            made.append(codes)
        codes = np.concatenate([np.zeros((rows, 0), np.int32), *made], axis=1)
        return [row[row != PAD_TOKEN].tolist() for row in codes[: len(lines)]]

    def say(self, lines: Sequence[Line]) -> tuple[list[list[int]], list[list[int]]]:
        """The token ids of each reply, and its codes."""
        text, speech = self.read([line.prompt for line in lines])
        replies, text = self.reply(text, lines)
        assert text.heard is not None
        return replies, self.speak(speech, text.heard, lines, [len(r) for r in replies])


def silence_ends(speech: TalkerEngine, config: OmniConfig) -> None:
    """Gives the two ends a score of zero, which is never the highest: greedy speech goes on to its limit."""
    c, head = config.talker_config, speech.params["decoder"]["head"]
    ends = np.array([c.tts_codec_pad_token_id, c.tts_codec_end_token_id])
    head["kernel"] = jax.numpy.asarray(head["kernel"]).at[:, ends].set(0)


def said_all(prompts: Sequence[int], replies: Sequence[int], rows: int) -> Said:
    """Replies that have ended; rows to spare said nothing."""
    spare = [0] * (rows - len(prompts))
    return Said(np.array([*prompts, *spare]), np.array([*replies, *spare]), np.ones(rows, bool))


def after(prompts: Sequence[Prompt], rows: int, config: OmniConfig) -> Spans:
    """Of the two positions that the Talker reads behind each prompt."""
    last = [mrope.resolve((*p.segments, mrope.Text(2)), config.thinker_config)[-1] for p in prompts]
    own = [[dataclasses.replace(span, begin=0)] for span in last]
    return mrope.stack([*own, *[[]] * (rows - len(prompts))], 2, width=1)

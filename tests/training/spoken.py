"""Spoken dialogues as inference makes them, token by token and code by code, and as examples of training."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from omni_jax.checkpoint import store
from omni_jax.config import OmniConfig
from omni_jax.data.examples import make_example
from omni_jax.data.packing import Budget
from omni_jax.data.spoken_examples import SpokenExample
from omni_jax.data.spoken_packing import SpokenBatch, SpokenBudget, SpokenPart, assemble_spoken
from omni_jax.engine.decode_state import jit_method
from omni_jax.engine.request import TalkerParams
from omni_jax.engine.talker_engine import SpeechClip
from omni_jax.engine.talker_programs import TalkerState, TextCounters
from omni_jax.models.talker import Talker
from omni_jax.models.thinker import Thinker
from omni_jax.processing.clip_text import ClipText, read_clip_text
from omni_jax.processing.layout import Prompt
from omni_jax.processing.processor import Processor
from omni_jax.segments import Text
from omni_jax.training.objectives.next_token import NextToken
from omni_jax.training.objectives.talker import NextCode
from omni_jax.training.options import NextTokenOptions, TalkerOptions
from tests.engine.speaking import Dialogue, Parts, finished_text, suppress_ends

MEDIA = Path(__file__).parents[1] / "media"
CONFIG = OmniConfig.tiny()
VOICE_TOKENS = (603, 604)
NUM_TOKENS = 6  # of a reply
NUM_CODES = 9  # more than there are rows of the text, so that its end and the padding are read too
BUDGET = SpokenBudget(Budget(2, 448, 64, blocks=8, canvases=16, windows=8), positions=512, utterances=6)
OPTIONS = TalkerOptions(positions=512, utterances=6, chunk=128)
CLIP_TEXT = "a clip is one"
CLIP_CODES = np.array([7, 64, 0, 31, 12], np.int32)


def load_processor(folder: Path) -> Processor:
    return Processor.load(folder).with_pixels(max_pixels=112 * 112, video_max_pixels=84 * 84)


def ask(text: str, **media: str) -> list[dict[str, Any]]:
    """A question about a medium of the tests."""
    parts = [{"type": kind, kind: str(MEDIA / name)} for kind, name in media.items()]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]


QUESTIONS = {
    "text": ask("What is one?"),
    "image": ask("What is it?", image="picture.jpg"),
    "audio": ask("What is said?", audio="speech.wav"),
    "video": ask("What is seen and said?", video="video.mp4"),
    "clip": ask("What is two?"),
}


@dataclass(frozen=True)
class Spoken:
    """What inference says to a prompt.

    Attributes:
      example: of training on it.
      log_probs: of each code when it was drawn, and of the end after the last of them.
    """

    example: SpokenExample
    log_probs: np.ndarray


class Speaker:
    """A tiny model that speaks one code a call, and never ends by itself."""

    def __init__(self, folder: Path):
        self.parts = Parts(folder)
        self.parts.suppress_ends()
        self.parts.talker.codes_per_call = 1
        self.talker = Talker(CONFIG.talker_config, scan_layers=False)
        self.processor = load_processor(folder)

    def speak(self, kind: str) -> Spoken:
        """Has the model answer a question of this kind and speak the answer, behind a clip if it is "clip"."""
        prompt = self.processor(QUESTIONS[kind])
        # with a repetition penalty, which keeps off one code for ever
        params = TalkerParams().override(
            {"max_tokens": NUM_CODES, "temperature": 0.0, "repetition_penalty": 2.0}, CONFIG
        )
        voice_token = VOICE_TOKENS[len(prompt) % 2]
        dialogue = Dialogue(prompt, NUM_TOKENS, voice_token, params)
        thinker_state, state = self.parts.insert_all([dialogue])
        (reply,), thinker_state = self.parts.answer(thinker_state, 1)
        assert thinker_state.talker_inputs is not None and len(reply) == NUM_TOKENS
        clip = read_clip_text(self.processor, CLIP_TEXT) if kind == "clip" else None
        clip_codes = CLIP_CODES[: 0 if clip is None else None]
        speech_clip = None
        if clip is not None:
            prefix, _ = self.parts.prefill(clip.prompt)
            assert prefix.talker_inputs is not None
            rows = self.parts.talker.take_clip_rows(prefix.talker_inputs, clip.first)
            speech_clip = SpeechClip(rows, clip.num_rows, clip_codes)
            state = self.parts.talker.insert_clip(state, 0, speech_clip)
        state = self.parts.append_all(state, thinker_state.talker_inputs, [len(prompt)], [NUM_TOKENS])
        request = self.parts.request(dialogue)
        if speech_clip is not None:
            request = dataclasses.replace(request, clip=speech_clip, reply_tokens=NUM_TOKENS)
        state = self.parts.talker.begin(state, {0: request})
        codes, log_probs = self.decode(state, NUM_TOKENS)
        example = make_spoken(prompt, reply, codes, voice_token, clip, clip_codes, kind)
        return Spoken(example, log_probs)

    def decode(self, state: TalkerState, num_tokens: int) -> tuple[np.ndarray, np.ndarray]:
        """The codes of a text of so many tokens, and their log-probabilities with that of the end."""
        progress = finished_text([num_tokens], 1)
        none = TextCounters(np.zeros(1, np.int32), np.zeros(1, np.int32))
        codes: list[int] = []
        log_probs = []
        while len(codes) < NUM_CODES:
            before = self.next_log_probs(state)
            state, result = self.parts.talker.decode(state, progress, none)
            codes += result.to_host().at_slot(0).tolist()
            log_probs.append(before[codes[-1]])
        log_probs.append(self.next_log_probs(state)[CONFIG.talker_config.tts_codec_end_token_id])
        return np.array(codes, np.int32), np.array(log_probs)

    def next_log_probs(self, state: TalkerState) -> np.ndarray:
        logits = jit_method(self.talker, "logits", self.parts.talker.params, state.context.hidden)
        return np.asarray(jax.nn.log_softmax(logits, axis=-1))[0]


def append_tokens(prompt: Prompt, tokens: list[int]) -> Prompt:
    """A prompt with a reply behind it."""
    none = np.full(len(tokens), -1, np.int32)
    return dataclasses.replace(
        prompt,
        tokens=np.concatenate([prompt.tokens, np.array(tokens, np.int32)]),
        segments=(*prompt.segments, Text(len(tokens))),
        media_item=np.concatenate([prompt.media_item, none]),
        media_token=np.concatenate([prompt.media_token, none]),
    )


def make_spoken(
    prompt: Prompt,
    reply: list[int],
    codes: np.ndarray,
    voice_token: int,
    clip: ClipText | None = None,
    clip_codes: np.ndarray = CLIP_CODES[:0],
    name: str = "",
) -> SpokenExample:
    """The example of a prompt, the tokens of a reply and its codes."""
    whole = append_tokens(prompt, reply)
    weights = np.arange(len(whole)) >= len(prompt)
    of_clip = None
    if clip is not None:
        of_clip = make_example(clip.prompt, np.zeros(len(clip.prompt)), name, CONFIG)
    return SpokenExample(
        make_example(whole, weights, name, CONFIG),
        of_clip,
        (codes,),
        clip_codes,
        np.zeros(1, np.float32),
        prompt_length=len(prompt),
        num_reply_rows=len(reply) - 1,
        num_clip_rows=0 if clip is None else clip.num_rows,
        voice_token=voice_token,
        name=name,
    )


def pack(examples: list[SpokenExample], budget: SpokenBudget = BUDGET) -> tuple[SpokenBatch, SpokenPart]:
    part = SpokenPart(budget)
    for example in examples:
        budget.check(example)
        assert part.place(example), example.name
    return assemble_spoken([part], budget, CONFIG, first=0, streams=1), part


def make_objective(options: TalkerOptions = OPTIONS) -> NextCode:
    thinker = NextToken(Thinker(CONFIG.thinker_config), CONFIG, NextTokenOptions(chunk=64))
    return NextCode(thinker, Talker(CONFIG.talker_config), CONFIG, options)


def load_params(folder: Path) -> dict[str, Any]:
    """Of training, with the logits of the ends that ``Speaker`` has."""
    params = store.load(folder, ["thinker", "talker"])

    class Engine:
        pass

    engine: Any = Engine()
    engine.params = params["talker"]
    suppress_ends(engine, CONFIG)
    return params

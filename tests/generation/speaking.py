"""Both loops, Thinker's and Talker's, over the parts of a checkpoint: what the tests of speech drive."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np

from omni_jax.batch import bucket
from omni_jax.checkpoint import store
from omni_jax.config import OmniConfig
from omni_jax.generation.sampling import Sampling
from omni_jax.generation.speech import SpeechLoop, SpeechRequest, Talk
from omni_jax.generation.text import NOTHING, TextLoop, TextRequest
from omni_jax.layers.stack import unstack_layers
from omni_jax.models.talker import Talker
from omni_jax.models.thinker import Thinker
from omni_jax.processing.collate import collate
from omni_jax.processing.layout import Prompt, lay_out

LENGTH = 256  # of the Thinker's rows: one for all prompts, so that its loop compiles once

_NOBODY = lay_out([], [], OmniConfig.tiny().thinker_config)


@dataclass(frozen=True)
class Line:
    """One row to be spoken: a prompt, how long the reply is at most, and how it is said."""

    prompt: Prompt
    max_tokens: int
    speaker: int
    talk: Talk
    stop: tuple[int, ...] = ()


class Parts:
    """A model's two loops in float32."""

    def __init__(self, folder: Path):
        self.config = OmniConfig.load(folder)
        held = store.load(folder, ["thinker", "talker"])
        thinker = Thinker(self.config.thinker_config, scan_layers=False)
        talker = Talker(self.config.talker_config, scan_layers=False)
        self.text = TextLoop(thinker, unstack_layers(held["thinker"]))
        self.speech = SpeechLoop(talker, unstack_layers(held["talker"]), self.config, self.text.words)

    def silence_ends(self) -> None:
        """Gives the two ends a score of zero, which is never the highest: greedy speech goes on to its limit."""
        c = self.config.talker_config
        head = self.speech.params["decoder"]["head"]
        ends = np.array([c.tts_codec_pad_token_id, c.tts_codec_end_token_id])
        head["kernel"] = jax.numpy.asarray(head["kernel"]).at[:, ends].set(0)

    def say(self, lines: Sequence[Line]) -> tuple[list[list[int]], list[list[int]]]:
        """The token ids of each reply, and its codes."""
        spare = [_NOBODY] * (bucket(len(lines)) - len(lines))
        batch = collate([*(line.prompt for line in lines), *spare], self.config, length=LENGTH)
        requests = [TextRequest(Sampling(), line.max_tokens, line.stop) for line in lines]
        state = self.text.start(batch, self.text.encode(batch), requests, keep=True)
        made = []
        while np.asarray(state.left).any():
            tokens, state = self.text.advance(state)
            made.append(tokens)
        replies = [row[row != NOTHING].tolist() for row in np.concatenate(made, axis=1)[: len(lines)]]
        assert state.kept is not None
        spoken = self.speech.speak(
            state.kept,
            [
                SpeechRequest(line.prompt, len(reply), line.speaker, line.talk)
                for line, reply in zip(lines, replies, strict=True)
            ],
        )
        return replies, [codes.tolist() for codes in spoken]

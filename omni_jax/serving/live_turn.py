"""What a user says in a realtime session, prefilled while it comes, a chunk between two steps of the scheduler."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Float
from PIL import Image

from omni_jax.engine.outputs import Timings
from omni_jax.engine.prefill import Prefix
from omni_jax.engine.request import INITIAL_REPLY
from omni_jax.generation.options import Options
from omni_jax.processing.live import LivePrompt
from omni_jax.processing.prefill_plan import PromptPiece
from omni_jax.processing.voice_clip import VoiceClip
from omni_jax.serving.engine_thread import EngineThread, ReplyStream


class LiveTurn:
    """A message of the user's on its way to one answer. Its caches are freed when it is answered or dropped."""

    def __init__(self, engine: EngineThread, prompt: LivePrompt, prefix: Prefix, with_talker: bool):
        """Takes what ``begin`` has made."""
        self._engine = engine
        self._prompt = prompt
        self._prefix = prefix
        self._with_talker = with_talker
        # pieces are prefilled in their order, whoever adds them
        self._lock = asyncio.Lock()

    @classmethod
    async def begin(cls, engine: EngineThread, make_prompt: Callable[[], LivePrompt], options: Options) -> LiveTurn:
        """Prefills what came before.

        Args:
          engine: that answers.
          make_prompt: with the dialogue so far; it may take a while, and is called in another thread.
          options: whether the reply is spoken, and by which adapter it is made.

        Raises:
          InputError: if the dialogue cannot be served.
        """
        prompt = await asyncio.to_thread(make_prompt)

        def make_prefix() -> Prefix:
            # room for the beginning of the input; caches grow as more comes
            capacity = len(prompt.head.prompt) + INITIAL_REPLY
            return Prefix(
                engine.model.engines, capacity, Timings(), with_talker=options.speaks, adapter=options.adapter
            )

        turn = cls(engine, prompt, await asyncio.wrap_future(engine.call(make_prefix)), options.speaks)
        async with turn._lock:
            await turn._prefill([prompt.head])
        return turn

    async def push_audio(self, samples: Float[np.ndarray, " n"], rate: int) -> None:
        """Takes more sound; raises as ``LiveSession.audio``."""
        async with self._lock:
            await self._prefill(self._prompt.audio(samples, rate))

    async def push_picture(self, picture: Image.Image, seconds: float) -> None:
        """Takes a picture; raises as ``LiveSession.video``."""
        async with self._lock:
            await self._prefill(self._prompt.video(picture, seconds))

    async def answer(self, options: Options, clip: VoiceClip | None) -> ReplyStream:
        """Ends the message and has it answered; only what came after the last two full seconds remains to be read.

        Raises:
          InputError: if nothing came, or for an option that cannot be served.
        """
        assert options.speaks == self._with_talker
        async with self._lock:
            whole = self._prompt.whole_prompt("")
            pieces = self._prompt.end("")
            return await self._engine.submit_prefilled(self._prefix, pieces, whole, options, clip=clip)

    async def _prefill(self, pieces: Sequence[PromptPiece]) -> None:
        prefix = self._prefix
        prefix.add(pieces)
        # one chunk at a time, so that others' sound does not wait for all of them
        while prefix.pending:
            await asyncio.wrap_future(self._engine.call(prefix.step))

"""OmniModel, the public face: messages in, text out; one by one, as a stream, or many together."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from omni_jax.batch import bucket
from omni_jax.checkpoint import store
from omni_jax.config import OmniConfig
from omni_jax.errors import CheckpointError, InputError
from omni_jax.generation.reply import Event, Options, Reply, ReplyWriter, Timings, stop_ids
from omni_jax.generation.text import TextLoop, TextRequest
from omni_jax.layers.stack import unstack_layers
from omni_jax.models.thinker import Thinker, abstract_params
from omni_jax.processing.collate import collate
from omni_jax.processing.layout import Prompt, Usage
from omni_jax.processing.processor import Processor
from omni_jax.sharding import param_shardings

Messages: TypeAlias = Sequence[dict[str, Any]]

_NOBODY = Prompt(np.zeros(0, np.int32), (), (), np.zeros(0, np.int32), np.zeros(0, np.int32), Usage())


def load(
    folder: str | os.PathLike[str], *, dtype: str | None = None, mesh: Mesh | None = None, allow_urls: bool = False
) -> OmniModel:
    """Loads a checkpoint that ``tools/convert.py to-jax`` wrote.

    Args:
      folder: the checkpoint.
      dtype: "bfloat16" or "float32" for parameters and computation; what the checkpoint holds if None.
      mesh: from ``omni_jax.sharding.make_mesh``, to spread the parameters over several devices.
      allow_urls: whether media may be fetched from the web; a server that does so lends its network to whoever asks.

    Raises:
      CheckpointError: if the folder is not such a checkpoint or lacks a part.
      ConfigError: if its config.json does not describe the model, or the mesh does not divide a parameter.
    """
    folder = Path(folder)
    held = store.components(folder)
    if "thinker" not in held:
        raise CheckpointError(f"{folder} has no thinker, only {', '.join(held)}; convert it with --components thinker")
    config, processor = OmniConfig.load(folder), Processor.load(folder, allow_urls=allow_urls)
    kind = jnp.dtype(dtype or jnp.result_type(*held["thinker"]))
    # slices of stacked layers are copies on a CPU; see omni_jax/layers/stack.py
    scan = mesh is not None or jax.default_backend() != "cpu"
    thinker = Thinker(config.thinker_config, scan_layers=scan, dtype=kind, param_dtype=kind)
    shardings = None
    if mesh is not None:
        shardings = {"thinker": param_shardings(abstract_params(thinker), mesh)}
    params = store.load(folder, ["thinker"], dtype=kind, shardings=shardings)["thinker"]
    return OmniModel(config, processor, thinker, params if scan else unstack_layers(params), mesh)


class OmniModel:
    """A loaded model. It holds parameters and compiled programs, and nothing of any request."""

    def __init__(self, config: OmniConfig, processor: Processor, thinker: Thinker, params: Any, mesh: Mesh | None):
        self.config, self.processor = config, processor
        self._loop = TextLoop(thinker, params, mesh)
        self._row_multiple = 1 if mesh is None else mesh.shape["data"] * mesh.shape["fsdp"]

    def generate(self, messages: Messages, **options: Any) -> Reply:
        """Answers one dialogue.

        Args:
          messages: OpenAI or Hugging Face chat messages; the README lists the parts.
          **options: see ``Options``.

        Raises:
          InputError: if the messages or options cannot be served; names the part, the value and the limit.
        """
        return next(event.reply for event in self.stream(messages, **options) if event.reply is not None)

    def stream(self, messages: Messages, **options: Any) -> Iterator[Event]:
        """Answers one dialogue piece by piece. The last event carries the whole reply; closing the iterator ends it."""
        chosen, begun = Options.create(**options), time.perf_counter()
        prompt = self._prompt(messages, chosen)
        return self._answer([prompt], chosen, Timings(prepare=time.perf_counter() - begun))

    def generate_batch(self, conversations: Sequence[Messages], *, batch_size: int = 8, **options: Any) -> list[Reply]:
        """Answers many dialogues, each as ``generate`` would alone.

        A dialogue that cannot be served gets a reply with its ``error``; the others are answered.

        Args:
          conversations: one list of messages each.
          batch_size: how many are worked on together; those of like length go together.
          **options: see ``Options``; they hold for every row.
        """
        if batch_size < 1:
            raise InputError(f"batch_size is {batch_size}; it must be at least 1")
        chosen = Options.create(**options)
        replies: dict[int, Reply] = {}
        prompts: dict[int, Prompt] = {}
        begun = time.perf_counter()
        for i, messages in enumerate(conversations):
            try:
                prompts[i] = self._prompt(messages, chosen)
            except InputError as e:
                replies[i] = Reply.failed(e)
        prepare = time.perf_counter() - begun
        order = sorted(prompts, key=lambda i: len(prompts[i]))
        for first in range(0, len(order), batch_size):
            rows = order[first : first + batch_size]
            share = Timings(prepare=prepare * len(rows) / len(order))
            events = self._answer([prompts[i] for i in rows], chosen, share)
            replies |= dict(zip(rows, [e.reply for e in events if e.reply is not None], strict=True))
        return [replies[i] for i in range(len(conversations))]

    def _prompt(self, messages: Messages, options: Options) -> Prompt:
        context = self.config.thinker_config.text_config.max_position_embeddings
        return self.processor(messages, assume_fps=options.assume_fps, max_length=context - 1)

    def _answer(self, prompts: Sequence[Prompt], options: Options, timings: Timings) -> Iterator[Event]:
        """Runs one batch. Text comes as it is made if there is one row; at the end each row's reply, in order."""
        rows = -(-bucket(len(prompts)) // self._row_multiple) * self._row_multiple
        batch = collate([*prompts, *[_NOBODY] * (rows - len(prompts))], self.config)
        clock = _Clock()
        features = self._loop.encode(batch)
        timings.encode = clock.lap()
        state = self._loop.start(batch, features, [self._request(p, options) for p in prompts])
        timings.prefill = clock.lap()
        writers = [ReplyWriter(self.processor, options) for _ in prompts]
        for made in self._loop.tokens(state):
            pieces = [writer.push(tokens) for writer, tokens in zip(writers, made, strict=False)]
            if len(writers) == 1 and pieces[0]:
                yield Event(pieces[0])
            if all(writer.finish_reason for writer in writers):
                break
        timings.decode = clock.lap()
        for prompt, writer in zip(prompts, writers, strict=True):
            rest = writer.end()
            assert writer.finish_reason is not None
            reply = Reply(writer.text, tuple(writer.ids), writer.finish_reason, prompt.usage, timings)
            yield Event(rest or None, reply)

    def _request(self, prompt: Prompt, options: Options) -> TextRequest:
        context = self.config.thinker_config.text_config.max_position_embeddings
        room = min(options.max_tokens, context - len(prompt))
        return TextRequest(options.sampling, room, stop_ids(self.processor, options))


class _Clock:
    def __init__(self) -> None:
        self._last = time.perf_counter()

    def lap(self) -> float:
        """Seconds since the last call."""
        last, self._last = self._last, time.perf_counter()
        return self._last - last

"""Answers of a Thinker that is being trained, by the code that serves one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.typing import DTypeLike

from omni_jax.config import OmniConfig
from omni_jax.data.rows import Document, read_row
from omni_jax.generation.components import make_thinker_engines
from omni_jax.generation.model import OmniModel
from omni_jax.layers.quantized import QuantizedKernel
from omni_jax.training.objective import Sample, SampleRequest


def answer_rows(params: Any, dtype: DTypeLike, config: OmniConfig, request: SampleRequest) -> list[Sample]:
    """The last reply of each dialogue among the rows, decoded greedily; documents are passed over.

    Args:
      params: of the Thinker, over the devices of the mesh; a copy in ``dtype`` is held for the time of the call.
      dtype: of computation.
      config: of the whole model.
      request: the rows, and how they are answered.

    Raises:
      InputError: if a row is not what it should be.
    """
    names: list[str] = []
    prompts: list[Sequence[Mapping[str, Any]]] = []
    expected: list[str] = []
    for row in request.rows:
        content = read_row(row, request.data.use_audio_in_video, request.data.media_root)
        if isinstance(content, Document):
            continue
        replies = [i for i, message in enumerate(content.messages) if message["role"] == "assistant"]
        # the first message of all answers nothing
        if not replies or replies[-1] == 0:
            continue
        names.append(row.name)
        prompts.append(content.messages[: replies[-1]])
        expected.append(_text_of(content.messages[replies[-1]]["content"]))
    if not prompts:
        return []

    def cast(leaf: Any) -> Any:
        # whole numbers and their scales stay as they are
        if isinstance(leaf, QuantizedKernel) or leaf.dtype == dtype:
            return leaf
        return leaf.astype(dtype)

    cast_params = jax.tree.map(cast, params, is_leaf=lambda leaf: isinstance(leaf, QuantizedKernel))
    engines = make_thinker_engines(config, cast_params, dtype, request.mesh)
    model = OmniModel(config, request.processor, engines, {})
    replies = model.generate_batch(prompts, max_tokens=request.max_tokens, temperature=0.0)
    samples = []
    for name, text, reply in zip(names, expected, replies, strict=True):
        samples.append(Sample(name, text, reply.text if reply.error is None else f"error: {reply.error}"))
    return samples


def _text_of(content: str | Sequence[Mapping[str, Any]]) -> str:
    """Of a message's parts those that are text."""
    if isinstance(content, str):
        return content
    return "".join(str(part.get("text", "")) for part in content)

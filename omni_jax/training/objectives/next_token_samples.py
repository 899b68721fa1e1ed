"""Answers of a Thinker that is being trained, by the code that serves one."""

from __future__ import annotations

from typing import Any

import jax
from jax.typing import DTypeLike

from omni_jax.config import OmniConfig
from omni_jax.data.replies import find_last_replies
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
    replies = find_last_replies(request.rows, request.data.use_audio_in_video, request.data.media_root)
    if not replies:
        return []

    def cast(leaf: Any) -> Any:
        # whole numbers and their scales stay as they are
        if isinstance(leaf, QuantizedKernel) or leaf.dtype == dtype:
            return leaf
        return leaf.astype(dtype)

    cast_params = jax.tree.map(cast, params, is_leaf=lambda leaf: isinstance(leaf, QuantizedKernel))
    engines = make_thinker_engines(config, cast_params, dtype, request.mesh)
    model = OmniModel(config, request.processor, engines, {})
    prompts = [reply.prompt for reply in replies]
    answers = model.generate_batch(prompts, max_tokens=request.max_tokens, temperature=0.0)
    samples = []
    for reply, answer in zip(replies, answers, strict=True):
        text = answer.text if answer.error is None else f"error: {answer.error}"
        samples.append(Sample(reply.row, reply.text, text))
    return samples

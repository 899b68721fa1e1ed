"""Greedy replies of PyTorch's whole model: their tokens, and the codes of their speech."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch
from transformers import Qwen2_5OmniForConditionalGeneration

from omni_jax.config import OmniConfig
from omni_jax.engine.talker_programs import end_codes, suppressed_codes
from omni_jax.processing.layout import Prompt
from tools.reference_inputs import reference_arguments


class ReferenceReply(NamedTuple):
    """A reply.

    Attributes:
      tokens: its ids, its end among them.
      codes: of its speech, without their end.
      margins: by how much the logit of each code, and of the end, exceeds that of the next one.
    """

    tokens: list[int]
    codes: list[int]
    margins: list[float]


class _SpokenError(Exception):
    """Leaves the reference's ``generate`` before Token2Wav."""


def speak_reference(
    model: Qwen2_5OmniForConditionalGeneration,
    config: OmniConfig,
    prompt: Prompt,
    *,
    voice: str,
    max_tokens: int,
    stop_ids: Sequence[int],
    max_codes: int,
    repetition_penalty: float,
) -> ReferenceReply:
    """What the reference answers and says, greedily.

    Codes that ours never draws are suppressed here too, since Token2Wav has no row for them.

    Args:
      model: of PyTorch, with a Talker.
      config: of the same model.
      prompt: of ours.
      voice: the speaker's name.
      max_tokens: of the reply.
      stop_ids: tokens that end it; none: it has ``max_tokens``.
      max_codes: of the speech.
      repetition_penalty: of the codes.
    """
    generate_text = model.thinker.generate
    generate_codes = model.talker.generate
    replies: list[torch.Tensor] = []
    spoken: list[torch.Tensor] = []
    margins: list[float] = []

    def keep_reply(**arguments: Any) -> Any:
        result: Any = generate_text(**arguments)
        replies.append(result.sequences[0])
        return result

    def stop_behind(**arguments: Any) -> None:
        arguments["suppress_tokens"] = np.flatnonzero(suppressed_codes(config)).tolist()
        result: Any = generate_codes(**arguments, output_scores=True, return_dict_in_generate=True)
        spoken.append(result.sequences[0])
        for scores in result.scores:  # [1, V]
            best, second = scores[0].topk(2).values.tolist()
            margins.append(best - second)
        raise _SpokenError

    ends = end_codes(config.talker_config).tolist()
    with (
        mock.patch.object(model.thinker, "generate", keep_reply),
        mock.patch.object(model.talker, "generate", stop_behind),
        contextlib.suppress(_SpokenError),
        torch.no_grad(),
    ):
        model.generate(
            **reference_arguments(prompt),
            speaker=voice,
            return_audio=True,
            thinker_max_new_tokens=max_tokens,
            thinker_do_sample=False,
            thinker_eos_token_id=list(stop_ids) or None,
            thinker_pad_token_id=config.thinker_config.pad_token_id,
            talker_max_new_tokens=max_codes,
            talker_do_sample=False,
            talker_repetition_penalty=repetition_penalty,
            talker_eos_token_id=ends,
            talker_pad_token_id=ends[0],
        )
    # before them are the prompt's positions, and two: the begin mark and its pad
    codes = spoken[0][len(prompt) + 2 :].tolist()
    length = next((i for i, code in enumerate(codes) if code in ends), len(codes))
    return ReferenceReply(replies[0][len(prompt) :].tolist(), codes[:length], margins)

"""What the Talker is given of a clip that gives a voice: the rows of its text, and its codes.

The Thinker reads the text in a dialogue of its own, once for a clip, so that what it answers to others is the same
whoever speaks it (``processing.clip_text``).
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Int

from omni_jax import mrope
from omni_jax.engine.outputs import Timings
from omni_jax.engine.prefill import Engines, Prefix
from omni_jax.engine.talker_engine import CLIP_ROWS, SpeechClip
from omni_jax.errors import InputError
from omni_jax.processing.clip_text import ClipText
from omni_jax.processing.prefill_plan import PromptPiece


def check_clip_text(text: ClipText) -> None:
    """Checks the length of a clip's text.

    Raises:
      InputError: if it has over ``CLIP_ROWS`` tokens.
    """
    if text.num_rows > CLIP_ROWS:
        raise InputError(f"the text of the clip has {text.num_rows} tokens; at most {CLIP_ROWS} are taken")


def make_speech_clip(
    engines: Engines, text: ClipText, codes: Int[np.ndarray, " J"], adapter: str | None = None
) -> SpeechClip:
    """Has the Thinker read a clip's text.

    Args:
      engines: of a model that speaks.
      text: what is said in the clip.
      codes: of its sound.
      adapter: of the Thinker's, that the request has chosen.

    Raises:
      InputError: if the text has over ``CLIP_ROWS`` tokens, or there are no codes or some that do not exist.
    """
    c = engines.config
    check_clip_text(text)
    num_embeds = c.token2wav_config.dit_config.num_embeds
    if not codes.size or codes.min() < 0 or codes.max() > num_embeds:
        raise InputError(f"the clip has {codes.size} codes; it must have some, each from 0 to {num_embeds}")
    prompt = text.prompt
    prefix = Prefix(engines, len(prompt), Timings(), with_talker=False, adapter=adapter)
    prefix.add([PromptPiece(prompt, mrope.resolve_spans(prompt.segments, c.thinker_config))])
    prefix.run()
    assert engines.talker is not None and prefix.thinker.talker_inputs is not None
    rows = engines.talker.take_clip_rows(prefix.thinker.talker_inputs, text.first)
    return SpeechClip(rows, text.num_rows, codes.astype(np.int32))

"""What the Talker reads at each position: which part of the text, and which code (docs/reference.md, 7.2).

Training lays whole streams out by these functions and the engine builds the same stream as it goes, so that the two
cannot differ. A stream is the prompt, the voice, and then one position for each code:

* the prompt's positions have the Thinker's row of the token and no code;
* the voice's position has the embedding of its token and the padding code;
* the position behind it has the first row of the text and the begin code; each further one has the next row of the text
  and the code before: rows of all tokens but the last, then the end of the text once, then padding without end.

Where a clip gives the voice (zero-shot), its text and its codes come first, both without an end: the rows of the text
are those of the clip's text and then those of the reply, and the codes those of the clip and then those of the reply.
So the reply goes on where the clip stops, and its text is read while the clip's codes are.

Letters: B rows or slots, S positions of the Thinker, P positions of the stream, R rows of the text, J codes of a clip,
K codes of a reply, E width of the Thinker.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int

from omni_jax.batch import Array
from omni_jax.config import TalkerConfig
from omni_jax.models.talker import NO_CODE

# what stands at a position for the text: a row of the Thinker's, or one of three embeddings in this order
TEXT_ROW = -1
TEXT_VOICE = 0
TEXT_END = 1
TEXT_PAD = 2
NUM_SPECIAL = 3


def talker_rows(
    hidden: Float[Array, "B S E"], embeds: Float[Array, "B S E"], is_media: Bool[Array, "B S"] | None = None
) -> Float[jax.Array, "B S E"]:
    """What the Talker is given of tokens: hidden state and embedding; features of media count in the former alone.

    Args:
      hidden: the Thinker's, after its last norm.
      embeds: that it has read, with the features of media in their places.
      is_media: which of them are such features; None: they are all of text.
    """
    if is_media is None:
        return jnp.asarray(hidden) + embeds
    return jnp.asarray(hidden) + jnp.where(jnp.asarray(is_media)[..., None], 0, embeds)


def special_tokens(config: TalkerConfig, voice_token: Int[np.ndarray, " B"]) -> Int[np.ndarray, "B 3"]:
    """Text ids of the voice, of the end of the text, and of what follows it."""
    ids = np.empty((len(voice_token), NUM_SPECIAL), np.int32)
    ids[:, TEXT_VOICE] = voice_token
    ids[:, TEXT_END] = config.tts_text_end_token_id
    ids[:, TEXT_PAD] = config.tts_text_pad_token_id
    return ids


def num_text_rows(num_tokens: Int[Array, " B"]) -> Int[Array, " B"]:
    """R, of a text of so many tokens: its last one is never read back, so it has no row."""
    return num_tokens - 1


def text_part(index: Int[Array, "*shape"], num_rows: Int[Array, "*rows"]) -> Int[Array, "*shape"]:
    """What stands at places of the text, counted from the position of the begin code.

    Args:
      index: of the places.
      num_rows: R, of one shape with ``index`` or to be broadcast to it.
    """
    # of arrays of either kind, so without a function of numpy's or JAX': the host calls it for whole streams
    is_row = index < num_rows
    is_end = index == num_rows
    return is_row * TEXT_ROW + is_end * TEXT_END + ~(is_row | is_end) * TEXT_PAD


def select_text(
    rows: Float[Array, "B P E"], part: Int[Array, "B P"], special_embeds: Float[Array, "B M E"]
) -> Float[jax.Array, "B P E"]:
    """The text's part of positions.

    Args:
      rows: the Thinker's, at each position; anything where another part stands.
      part: ``TEXT_ROW``, or which of ``special_embeds``.
      special_embeds: of ``special_tokens``, of one voice or of several one after the other.
    """
    special = jnp.take_along_axis(jnp.asarray(special_embeds), jnp.maximum(part, 0)[..., None], axis=1)  # [B, P, E]
    return jnp.where((jnp.asarray(part) == TEXT_ROW)[..., None], rows, special)


def gather_rows(rows: Float[Array, "B S E"], places: Int[Array, "B P"]) -> Float[jax.Array, "B P E"]:
    """The rows at these places of each slot; places behind the end give the last row."""
    return jnp.take_along_axis(jnp.asarray(rows), jnp.asarray(places)[..., None], axis=1, mode="clip")


def begin_codes(config: TalkerConfig) -> Int[np.ndarray, " 2"]:
    """The codes that stand with the voice and with the first row of the text."""
    return np.array([config.tts_codec_pad_token_id, config.tts_codec_start_token_id], np.int32)


@dataclass(frozen=True)
class Stream:
    """A whole stream, as it is trained on.

    Attributes:
      part: what stands for the text at each position.
      row: which of the Thinker's rows, where ``part`` is ``TEXT_ROW``; else 0.
      codes: read at each position, or ``NO_CODE``.
      targets: the code after each position; 0 where there is none.
      weights: 1 at positions that predict a code of the reply or its end, else 0.
    """

    part: Int[np.ndarray, " P"]
    row: Int[np.ndarray, " P"]
    codes: Int[np.ndarray, " P"]
    targets: Int[np.ndarray, " P"]
    weights: Float[np.ndarray, " P"]

    def __len__(self) -> int:
        return len(self.codes)


def stream_length(prompt_length: int, num_codes: int) -> int:
    """P, of so many codes, a clip's among them: the voice and the begin code have a position each."""
    return prompt_length + 2 + num_codes


def lay_out_stream(
    config: TalkerConfig,
    prompt_rows: Int[np.ndarray, " L"],
    text_rows: Int[np.ndarray, " R"],
    codes: Int[np.ndarray, " K"],
    clip_codes: Int[np.ndarray, " J"],
) -> Stream:
    """A whole stream: a prompt, a voice, and codes with their end.

    Args:
      config: of the Talker.
      prompt_rows: which of the Thinker's rows are the prompt's.
      text_rows: which are the text's: those of a clip's, then those of the reply.
      codes: of the reply, without an end.
      clip_codes: of the clip; none without one.
    """
    num_prompt = len(prompt_rows)
    length = stream_length(num_prompt, len(clip_codes) + len(codes))
    # from the voice on
    voice = num_prompt
    spoken = np.concatenate([begin_codes(config), clip_codes, codes]).astype(np.int32)  # [P - L]
    stream = Stream(
        part=np.full(length, TEXT_ROW, np.int32),
        row=np.zeros(length, np.int32),
        codes=np.full(length, NO_CODE, np.int32),
        targets=np.zeros(length, np.int32),
        weights=np.zeros(length, np.float32),
    )
    stream.codes[voice:] = spoken
    # a row of the text for each code but the padding code, which stands with the voice
    index = np.arange(length - voice - 1)  # [P - L - 1]
    stream.part[voice] = TEXT_VOICE
    stream.part[voice + 1 :] = text_part(index, np.array(len(text_rows)))
    stream.row[:voice] = prompt_rows
    has_row = index < len(text_rows)
    stream.row[voice + 1 :][has_row] = text_rows[index[has_row]]
    # each code is predicted by the position before it, the last of them by the end
    stream.targets[voice + 1 :] = [*spoken[2:], config.tts_codec_end_token_id]
    stream.weights[voice + 1 + len(clip_codes) :] = 1
    return stream

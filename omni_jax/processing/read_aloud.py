"""The dialogue in which a text is read aloud: that of training rows and that of answers, so that the two agree."""

from __future__ import annotations

from omni_jax.processing.chat import SPEECH_SYSTEM_PROMPT

QUESTION = "Read this aloud: {text}"


def make_dialogue(text: str, question: str = QUESTION) -> list[dict[str, str]]:
    """The messages of a dialogue whose reply is a text, under the system prompt that speech was trained with.

    Args:
      text: it.
      question: what the user asks; ``{text}`` stands for the text.
    """
    return [
        {"role": "system", "content": SPEECH_SYSTEM_PROMPT},
        {"role": "user", "content": question.replace("{text}", text)},
        {"role": "assistant", "content": text},
    ]

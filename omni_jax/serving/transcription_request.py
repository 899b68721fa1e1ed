"""How the model is asked to write down speech."""

from __future__ import annotations

from typing import Any

from omni_jax.errors import InputError
from omni_jax.generation.options import Options
from omni_jax.processing.chat import MediaPart, Message, TextPart
from omni_jax.serving.chat_request import ChatRequest

# as the published evaluation asks (https://github.com/QwenLM/Qwen2.5-Omni, cookbooks)
SYSTEM_PROMPT = "You are a speech recognition model."
DEFAULT_PROMPT = "Transcribe the {language} audio into text without any punctuation marks."
MAX_TOKENS = 2048
# of ISO 639-1, which OpenAI's clients send; another name is taken as it is
_LANGUAGES = {"en": "English", "zh": "Chinese", "fr": "French", "de": "German", "ru": "Russian", "ja": "Japanese"}
_MAX_LANGUAGE = 40


def make_transcription(
    prompt: str, sound: Any, rate: int | None = None, *, language: str = "en", hint: str = "", temperature: float = 0.0
) -> ChatRequest:
    """The request for what is said in a sound.

    Args:
      prompt: that asks for it, {language} in place of the language; the published one if it is empty.
      sound: the bytes of a file, or float samples [n] from -1 to 1.
      rate: of samples, in Hz.
      language: of ISO 639-1, or a name.
      hint: what came before, or how words are spelt; it follows the prompt.
      temperature: 0 is greedy.

    Raises:
      InputError: for a language that is too long.
    """
    if len(language) > _MAX_LANGUAGE:
        raise InputError(f"language has {len(language)} characters; at most {_MAX_LANGUAGE} are taken")
    question = (prompt or DEFAULT_PROMPT).replace("{language}", _LANGUAGES.get(language.lower(), language))
    options = {} if rate is None else {"sampling_rate": rate}
    content = (MediaPart("audio", sound, "file", options), TextPart(f"{question} {hint}" if hint else question))
    messages = (Message("system", SYSTEM_PROMPT), Message("user", content))
    return ChatRequest(messages, Options.create(max_tokens=MAX_TOKENS, temperature=temperature))

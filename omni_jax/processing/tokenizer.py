"""Text to token ids and back: Qwen2's byte-level BPE, where what users type never becomes a special token."""

from __future__ import annotations

import codecs
import contextlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers

from omni_jax.checks import INT32_MAX, shown
from omni_jax.errors import CheckpointError, InputError
from omni_jax.plain_files import read_file


class TextTokenizer:
    """``tokenizer.json`` of a checkpoint."""

    def __init__(self, description: str) -> None:
        """Takes the contents of ``tokenizer.json``."""
        values = json.loads(description)
        _check_added_tokens(values["added_tokens"])
        self._special = {token["content"]: token["id"] for token in values["added_tokens"]}
        # some added tokens, such as <tool_call>, are not special: they stay in the text of a reply
        self._hidden = {token["id"] for token in values["added_tokens"] if token["special"]}
        # without its added tokens the tokenizer reads their names as the letters they are made of; truncation and
        # padding, which a file keeps of the program that wrote it, would cut or fill prompts without a word
        unused = {"added_tokens": [], "post_processor": None, "truncation": None, "padding": None}
        with _library_errors("it cannot be read"):
            self._plain = tokenizers.Tokenizer.from_str(json.dumps({**values, **unused}))
        # the longest first, as an alternative of a pattern wins over those after it; (?!) never matches
        names = sorted(map(re.escape, self._special), key=len, reverse=True)
        self._special_name = re.compile("|".join(names) or r"(?!)")

    @classmethod
    def load(cls, folder: Path) -> TextTokenizer:
        """Reads ``tokenizer.json``.

        Raises:
          CheckpointError: if the file is missing or is not a tokenizer.
        """
        path = folder / "tokenizer.json"
        try:
            return cls(read_file(path).decode())
        except CheckpointError:  # with the right message already
            raise
        except OSError as e:
            raise CheckpointError(f"cannot read {path}: {e.strerror}; a checkpoint folder needs its tokenizer") from e
        except Exception as e:  # the library raises bare Exception
            raise CheckpointError(f"{path} is not a tokenizer: {e}") from e

    def special_id(self, name: str) -> int | None:
        """The id of an added token; None if there is none of this name."""
        return self._special.get(name)

    def has_name(self, token: int) -> bool:
        """Whether a token stands for anything; vocabularies of models have ids to spare."""
        return token in self._names or self._plain.id_to_token(token) is not None

    def encode(self, pieces: Iterable[tuple[str, bool]]) -> list[int]:
        """Token ids of a text made of pieces.

        A piece is trusted if the chat template wrote it: only there the name of a special token means the token. What
        lies between two special tokens is split as one text, so that pieces without such names give the ids of their
        sum.

        Args:
          pieces: each a text and whether it is trusted.

        Raises:
          InputError: if the file's rules make the library fail at this text.
        """
        ids: list[int] = []
        waiting: list[str] = []  # text since the last special token, which is split as one
        for text, trusted in pieces:
            if not trusted:
                waiting.append(text)
                continue
            done = 0
            for match in self._special_name.finditer(text):
                ids += self._encode_plain([*waiting, text[done : match.start()]])
                ids.append(self._special[match.group()])
                waiting = []
                done = match.end()
            waiting.append(text[done:])
        return ids + self._encode_plain(waiting)

    def _encode_plain(self, texts: Sequence[str]) -> list[int]:
        # the library refuses half a surrogate pair, which JSON can hold
        text = replace_surrogates("".join(texts))
        with _library_errors("the tokenizer cannot split this text"):
            return self._plain.encode(text, add_special_tokens=False).ids if text else []

    def decode(self, ids: Iterable[int]) -> str:
        """The text of token ids; special tokens and ids without a name give none, broken characters become U+FFFD."""
        stream = TextStream(self)
        return "".join([stream.push(int(i)) for i in ids]) + stream.flush()

    def token_bytes(self, token: int) -> bytes:
        """What one token adds to a text, in UTF-8; it may be a part of a character."""
        if token in self._hidden:
            return b""
        piece = self._names.get(token) or self._plain.id_to_token(token) or ""
        try:
            return bytes([_BYTE_OF_LETTER[letter] for letter in piece])
        except KeyError:  # an added token is written in plain letters
            return piece.encode()

    @cached_property
    def _names(self) -> dict[int, str]:
        return {token: name for name, token in self._special.items()}


@contextlib.contextmanager
def _library_errors(what: str) -> Iterator[None]:
    """Whatever the library raises within, of which a file from anywhere may be the reason, is an InputError."""
    try:
        yield
    except MemoryError:
        raise
    except BaseException as e:
        # a panic of Rust is no Exception, and its type cannot be imported
        if not isinstance(e, Exception) and type(e).__name__ != "PanicException":
            raise
        raise InputError(f"{what}: {type(e).__name__}: {e}") from e


def _check_added_tokens(tokens: Any) -> None:
    """Raises ValueError unless each has a text, an id and whether it is special; no library looks at them here."""
    for token in tokens:
        text, number, special = (token[name] for name in ("content", "id", "special"))
        is_id = type(number) is int and 0 <= number <= INT32_MAX
        if not isinstance(text, str) or not text or not is_id or not isinstance(special, bool):
            raise ValueError(
                f"added_tokens has {shown(token)}; it must have a content, an id and special: true or false"
            )


def replace_surrogates(text: str) -> str:
    """A text that can be encoded: both halves of a surrogate pair become their character, one alone U+FFFD."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


class TextStream:
    """The text of a reply as its tokens come: complete characters, never a part of one."""

    def __init__(self, tokenizer: TextTokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token: int) -> str:
        """Takes a token and gives the characters that it completes."""
        return self._decoder.decode(self._tokenizer.token_bytes(token))

    def flush(self) -> str:
        """Ends the reply; a character that was left half becomes U+FFFD."""
        return self._decoder.decode(b"", final=True)


def _letters_of_bytes() -> dict[str, int]:
    """Byte-level BPE writes a byte as a letter: itself if it prints, else one from U+0100 on."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    byte_of_letter = {}
    num_others = 0
    for byte in range(256):
        if byte in printable:
            byte_of_letter[chr(byte)] = byte
        else:
            # control characters, spaces and the soft hyphen, in their order
            byte_of_letter[chr(256 + num_others)] = byte
            num_others += 1
    return byte_of_letter


_BYTE_OF_LETTER = _letters_of_bytes()

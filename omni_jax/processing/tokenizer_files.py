"""Writes the tokenizer, preprocessor and generation files of a model that begins from nothing, and of those of tests.

The vocabulary is small: 256 bytes, and the pieces of a few English words or those that training on texts finds. Every
rule is the published one: Qwen2's pre-split, NFC, byte-level pieces, and the 22 added tokens in their published order.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer

from omni_jax.config import OmniConfig, ThinkerConfig
from omni_jax.config_file import GENERATION_CONFIG_FILE
from omni_jax.errors import ConfigError
from omni_jax.processing.chat import BUILT_IN_TEMPLATE
from omni_jax.processing.vision import PixelSettings

# in the order of their ids, from the padding token on; the plain ones stay in the text of a decoded reply
_SPECIAL_NAMES = """endoftext im_start im_end AUDIO audio_bos audio_eos box_end quad_start quad_end vision_bos
vision_eos vision_pad IMAGE VIDEO"""
_PLAIN_NAMES = "fim_prefix fim_middle fim_suffix fim_pad repo_name file_sep"
ADDED_TOKENS = (
    *(f"<|{name}|>" for name in _SPECIAL_NAMES.split()),
    "<tool_call>",
    "</tool_call>",
    *(f"<|{name}|>" for name in _PLAIN_NAMES.split()),
)
PLAIN_TOKENS = frozenset(ADDED_TOKENS[14:])

# how Qwen2 splits a text before its pieces are merged: contractions, words, single digits, punctuation, blanks
PRE_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# words that demonstrations use often; with the bytes they make up the vocabulary, shortest pieces first
_WORDS = """user assistant system You are Qwen virtual human helpful the The and of to in is it this that what What
say describe picture video sound audio hear see read one two three four five hello world"""

# the keys by which the processor of transformers finds the names of media tokens
_TOKEN_ROLES = {
    "image_token": "<|IMAGE|>",
    "audio_token": "<|AUDIO|>",
    "video_token": "<|VIDEO|>",
    "vision_bos_token": "<|vision_bos|>",
    "vision_eos_token": "<|vision_eos|>",
    "audio_bos_token": "<|audio_bos|>",
    "audio_eos_token": "<|audio_eos|>",
}

# the contents of the published preprocessor_config.json
PREPROCESSOR: dict[str, Any] = {
    "chunk_length": 300,
    "dither": 0.0,
    "feature_extractor_type": "WhisperFeatureExtractor",
    "feature_size": 128,
    "hop_length": 160,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_processor_type": "Qwen2VLImageProcessor",
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "max_pixels": 12845056,
    "merge_size": 2,
    "min_pixels": 3136,
    "n_fft": 400,
    "n_samples": 4800000,
    "nb_max_frames": 30000,
    "padding_side": "right",
    "padding_value": 0.0,
    "patch_size": 14,
    "processor_class": "Qwen2_5OmniProcessor",
    "return_attention_mask": True,
    "sampling_rate": 16000,
    "temporal_patch_size": 2,
}


def write_tokenizer(
    folder: Path,
    config: OmniConfig,
    texts: Iterable[str] | None = None,
    pixels: Mapping[str, float] = MappingProxyType({}),
) -> None:
    """Writes tokenizer.json, its companions, chat_template.json and preprocessor_config.json.

    Args:
      folder: where to.
      config: of the model; it has the ids of special tokens.
      texts: that byte-level BPE is trained on; None: the pieces are those of some words of demonstrations.
      pixels: fields of ``PixelSettings`` that are not the published ones. A model must be asked with the sizes that it
        is trained with.

    Raises:
      ConfigError: if the config's special ids do not follow the published order, or leave no room for 256 bytes.
    """
    # every id before the first added token is one of the vocabulary
    first = _first_added_id(config.thinker_config)
    vocab, merges = _make_vocabulary(first) if texts is None else _train_vocabulary(first, texts)
    folder.mkdir(parents=True, exist_ok=True)
    # the slow tokenizer of transformers reads these two, everything else tokenizer.json
    _write_json(folder / "vocab.json", vocab)
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    build_tokenizer(vocab, merges).save(str(folder / "tokenizer.json"))
    _write_json(folder / "added_tokens.json", {token: first + i for i, token in enumerate(ADDED_TOKENS)})
    _write_json(folder / "tokenizer_config.json", _make_tokenizer_config(first))
    _write_json(folder / "chat_template.json", {"chat_template": BUILT_IN_TEMPLATE})
    _write_json(folder / "preprocessor_config.json", PREPROCESSOR | _find_changed(PixelSettings().with_changes(pixels)))


def write_generation_config(
    folder: Path, config: OmniConfig, talker: Mapping[str, float] = MappingProxyType({})
) -> None:
    """Writes generation_config.json: what ends a reply, and how its codes are drawn.

    Args:
      folder: where to.
      config: of the model.
      talker: fields of ``SamplingParams`` that are not the published ones.
    """
    thinker = config.thinker_config
    ids = {"bos_token_id": None, "eos_token_id": thinker.eos_token_id, "pad_token_id": thinker.pad_token_id}
    drawn = {f"talker_{name}": value for name, value in talker.items()}
    _write_json(folder / GENERATION_CONFIG_FILE, ids | drawn)


def _find_changed(pixels: PixelSettings) -> dict[str, Any]:
    """The fields that are not the published ones."""
    published = dataclasses.asdict(PixelSettings())
    return {name: value for name, value in dataclasses.asdict(pixels).items() if value != published[name]}


def build_tokenizer(vocab: dict[str, int], merges: list[tuple[str, str]]) -> Tokenizer:
    """Qwen2's byte-level BPE over a vocabulary; the added tokens take the ids that follow it."""
    tokenizer = _plain_tokenizer(BPE(vocab=vocab, merges=merges))
    for token in ADDED_TOKENS:
        # never normalised, so that a name is found as it is written
        is_special = token not in PLAIN_TOKENS
        added = AddedToken(token, normalized=False, special=is_special)
        if is_special:
            tokenizer.add_special_tokens([added])
        else:
            tokenizer.add_tokens([added])
    return tokenizer


def _plain_tokenizer(model: BPE) -> Tokenizer:
    """Qwen2's rules around a model, without added tokens."""
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.NFC()  # type: ignore[assignment]
    split = pre_tokenizers.Split(Regex(PRE_SPLIT), "isolated")
    in_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, in_bytes])  # type: ignore[assignment]
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)  # type: ignore[assignment]
    return tokenizer


def _first_added_id(thinker: ThinkerConfig) -> int:
    """The id of the first added token, after checking that the others follow it in the published order."""
    first = thinker.pad_token_id
    names = {
        "bos_token_id": "<|im_start|>",
        "eos_token_id": "<|im_end|>",
        "audio_token_index": "<|AUDIO|>",
        "audio_start_token_id": "<|audio_bos|>",
        "audio_end_token_id": "<|audio_eos|>",
        "vision_start_token_id": "<|vision_bos|>",
        "vision_end_token_id": "<|vision_eos|>",
        "image_token_index": "<|IMAGE|>",
        "video_token_index": "<|VIDEO|>",
    }
    for key, token in names.items():
        expected_id = first + ADDED_TOKENS.index(token)
        found_id = getattr(thinker, key)
        if found_id != expected_id:
            raise ConfigError(f"thinker_config.{key} is {found_id}; in the published order it is {expected_id}")
    if first < 256:
        raise ConfigError(f"thinker_config.pad_token_id is {first}; the 256 bytes need the ids before it")
    return first


def _byte_pieces() -> list[str]:
    """The character that stands for each byte in byte-level BPE: printable ones first, as in GPT-2's vocabulary."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = range(256, 256 + 256 - len(printable))
    return [chr(code) for code in (*printable, *others)]


def _train_vocabulary(size: int, texts: Iterable[str]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Bytes, the pieces that BPE finds in texts, and fillers if those are too few, ``size`` in all; and the merges."""
    tokenizer = _plain_tokenizer(BPE())
    trainer = BpeTrainer(vocab_size=size, initial_alphabet=_byte_pieces(), show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    pieces: dict[str, int] = model["vocab"]
    return _fill(pieces, size), [(first, second) for first, second in model["merges"]]


def _make_vocabulary(size: int) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Bytes, prefixes of words, and fillers, ``size`` in all; and the merges that make them."""
    pieces = {piece: i for i, piece in enumerate(_byte_pieces())}
    pairs: set[tuple[str, str]] = set()
    for word in _WORDS.split():
        for form in (word, "Ġ" + word):  # at the beginning of a text, and after a space
            for length in range(1, len(form)):
                pairs.add((form[:length], form[length]))
    # short ones first: a prefix must be a piece before a letter can be merged to it
    merges: list[tuple[str, str]] = []
    for prefix, letter in sorted(pairs, key=lambda pair: (len(pair[0]), pair)):
        if len(pieces) < size and prefix in pieces:
            merges.append((prefix, letter))
            pieces[prefix + letter] = len(pieces)
    return _fill(pieces, size), merges


def _fill(pieces: dict[str, int], size: int) -> dict[str, int]:
    """The pieces, with fillers that no text reaches."""
    return pieces | {f"filler{i}": i for i in range(len(pieces), size)}


def _make_tokenizer_config(first: int) -> dict[str, Any]:
    # blanks around a special token stay what they are
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    decoder = {
        str(first + i): {"content": token, **flags, "special": token not in PLAIN_TOKENS}
        for i, token in enumerate(ADDED_TOKENS)
    }
    return {
        "add_bos_token": False,
        "add_prefix_space": False,
        "added_tokens_decoder": decoder,
        "additional_special_tokens": list(ADDED_TOKENS[1:14]),
        "bos_token": None,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "errors": "replace",
        "extra_special_tokens": _TOKEN_ROLES,
        **_TOKEN_ROLES,
        "model_max_length": 32768,
        "pad_token": "<|endoftext|>",
        "processor_class": "Qwen2_5OmniProcessor",
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

"""How ``config.json`` is read and written.

Reading is strict: each key of the file is a field, or is listed as deliberately ignored with the reason, or is an error
that names it. Both releases of transformers in use are read. They spell the rotary embedding differently; the fields
follow version 4, and ``to_transformers_4`` rewrites a file of version 5 before anything else looks at it.
"""

from __future__ import annotations

import dataclasses
import json
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

from omni_jax.checks import check_float, check_int, shown
from omni_jax.errors import CheckpointError, ConfigError, InputError
from omni_jax.plain_files import has_file, read_object

CONFIG_FILE = "config.json"
# what ends a reply (processing/processor.py), and how codes are drawn (engine/request.py)
GENERATION_CONFIG_FILE = "generation_config.json"

# What every Hugging Face config may carry and, unless a section names it as a field, no part of this model reads:
# bookkeeping of the library that wrote the file, and text-generation defaults, which live in generation_config.json.
_LIBRARY_KEYS = frozenset(
    """
    _attn_implementation _attn_implementation_autoset _name_or_path add_cross_attention architectures
    attn_implementation bad_words_ids begin_suppress_tokens bos_token_id chunk_size_feed_forward
    cross_attention_hidden_size decoder_start_token_id diversity_penalty do_sample dtype early_stopping
    encoder_no_repeat_ngram_size eos_token_id exponential_decay_length_penalty finetuning_task forced_bos_token_id
    forced_eos_token_id id2label is_decoder is_encoder_decoder label2id length_penalty max_length min_length
    model_type no_repeat_ngram_size num_beam_groups num_beams num_return_sequences output_attentions
    output_hidden_states output_scores pad_token_id prefix problem_type pruned_heads remove_invalid_values
    repetition_penalty return_dict return_dict_in_generate sep_token_id suppress_tokens task_specific_params
    temperature tf_legacy_loss tie_encoder_decoder tie_word_embeddings tokenizer_class top_k top_p torch_dtype
    torchscript transformers_version typical_p use_bfloat16 use_cache
    """.split()
)
# of PyTorch's training, which has its own settings here
_TRAINING_KEYS = frozenset({"initializer_range", "init_std", "dropout", "attention_dropout", "activation_dropout"})

# The largest number that a field may have. Memory and time follow from sizes, so a file from a stranger may not ask for
# more than several times the largest model there is; shapes are then compared with those of the tensors.
_MAX_SIZE = 2**14
_MAX_ID = 2**20
_LARGEST = {
    # layers, each of which has names in a table
    **dict.fromkeys(("num_hidden_layers", "depth", "encoder_layers"), 512),
    **dict.fromkeys(("intermediate_size", "encoder_ffn_dim"), 2**17),
    **dict.fromkeys(("vocab_size", "num_embeds", "max_position_embeddings"), 2**20),
    # a patch and a window have the square of these
    **dict.fromkeys(("in_channels", "temporal_patch_size", "spatial_merge_size"), 16),
    "patch_size": 64,
    "window_size": 1024,
    # samples grow by the product of these
    "upsample_rates": 64,
    **dict.fromkeys(("upsample_kernel_sizes", "resblock_kernel_sizes", "resblock_dilation_sizes"), 256),
}
MAX_ITEMS = 64  # of a list

# Sizes, counts and rates are at least 1: what has none of something is divided by it, or has no layers to run. These
# may be 0: numbers of layers, and of frequencies that rotate by an axis; and ids.
_MAY_BE_ZERO = ("fullatt_block_indexes", "look_ahead_layers", "look_backward_layers", "mrope_section")


class ConfigSection:
    """One section of ``config.json``: how its keys become fields and its fields keys. Subclasses are dataclasses."""

    MODEL_TYPE: ClassVar[str | None] = None
    ALIASES: ClassVar[Mapping[str, str]] = {}  # another spelling -> the field
    IGNORED: ClassVar[frozenset[str]] = frozenset()  # read by no part of the model
    FIXED: ClassVar[Mapping[str, Any]] = {}  # the model is only defined for this value

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], where: str = CONFIG_FILE) -> Self:
        """Builds the section from its part of the file, in the spelling of transformers 4.

        Raises:
          ConfigError: for an unknown key, a missing one, two spellings that disagree, or a value that is not supported.
        """
        fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
        types = typing.get_type_hints(cls)
        arguments: dict[str, Any] = {}
        # in this order, for some sections have as a field what is bookkeeping in others, such as eos_token_id
        for key, value in values.items():
            name = cls.ALIASES.get(key, key)
            if key in cls.FIXED:
                if value not in (None, cls.FIXED[key]):
                    raise ConfigError(f"{where}: {key} is {shown(value)}; only {cls.FIXED[key]!r} is supported")
            elif name in fields:
                argument = _decode_value(types[name], value, f"{where}: {key}", _limits(name))
                # a file may have both spellings, as long as they agree
                if name in arguments and arguments[name] != argument:
                    raise ConfigError(f"{where}: {key} is {argument}, but its other spelling gives {arguments[name]}")
                arguments[name] = argument
            elif key not in cls.IGNORED | _LIBRARY_KEYS | _TRAINING_KEYS:
                known = ", ".join(sorted(fields))
                raise ConfigError(f"{where}: unknown key {key!r} (value {shown(value)}); known: {known}")
        missing = [name for name, field in fields.items() if name not in arguments and _is_required(field)]
        if missing:
            raise ConfigError(f"{where}: missing {', '.join(missing)}")
        return cls(**arguments)

    def to_dict(self) -> dict[str, Any]:
        """The section as transformers 4 spells it."""
        values: dict[str, Any] = {"model_type": self.MODEL_TYPE} if self.MODEL_TYPE else {}
        # written too: transformers has other defaults for some of them, such as tied embeddings
        values.update(self.FIXED)
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            values[field.name] = _encode_value(getattr(self, field.name))
        return values


class ComponentConfig(ConfigSection):
    """What a component beside the published model is like, in a file of its own. Subclasses are dataclasses."""

    FILE: ClassVar[str]  # in the folder of a checkpoint that has the component
    NETWORK: ClassVar[str]  # what it is, for errors

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Of a checkpoint.

        Raises:
          CheckpointError: if it has none.
          ConfigError: if the file describes none.
        """
        path = folder / cls.FILE
        if not has_file(path):
            raise CheckpointError(
                f"{folder} has no {cls.FILE}, so no {cls.NETWORK}; train one (docs/speech-training.md)"
            )
        return cls.from_dict(read_object(path), str(path))

    def to_json(self) -> str:
        """The text of the file."""
        return json.dumps(self.to_dict(), indent=2) + "\n"


def check_divides(where: str, part: str, part_size: int, total: str, total_size: int) -> None:
    """Checks that one size divides another.

    Raises:
      ConfigError: naming both, unless ``part_size`` is positive and divides ``total_size``.
    """
    if part_size <= 0 or total_size % part_size:
        raise ConfigError(f"{where}: {part} {part_size} does not divide {total} {total_size}")


def check_lengths(where: str, lists: Mapping[str, Sequence[Any]], least: int = 1) -> None:
    """Checks that lists go together item by item.

    Raises:
      ConfigError: naming them, unless they are equally long and have ``least`` items or more.
    """
    lengths = {name: len(items) for name, items in lists.items()}
    if len(set(lengths.values())) > 1 or min(lengths.values()) < least:
        found = ", ".join(f"{name} has {length}" for name, length in lengths.items())
        raise ConfigError(f"{where}: lists must be equally long and have {least} items at least; {found}")


def read_config_file(folder: Path) -> dict[str, Any]:
    """The contents of ``config.json`` of a checkpoint folder, in the spelling of transformers 4.

    Raises:
      ConfigError: if the file cannot be read or holds no JSON object.
    """
    path = folder / CONFIG_FILE
    return to_transformers_4(read_object(path, ConfigError), str(path))


def write_config_file(folder: Path, values: Mapping[str, Any]) -> None:
    """Writes ``config.json`` into a checkpoint folder."""
    (folder / CONFIG_FILE).write_text(json.dumps(values, indent=2), encoding="utf-8")


def to_transformers_4(values: Mapping[str, Any], where: str = CONFIG_FILE) -> dict[str, Any]:
    """Rewrites a configuration of transformers 5 in the spelling of version 4; one of version 4 comes back equal.

    Version 5 has ``rope_parameters`` where version 4 has ``rope_theta`` and ``rope_scaling`` beside each other, and
    also writes it for encoders whose rotary embedding version 4 takes for granted.

    Raises:
      ConfigError: if both spellings are there and disagree, or the rotary embedding is of an unknown kind.
    """
    section: dict[str, Any] = {}
    for key, value in values.items():
        is_section = isinstance(value, Mapping) and key != "rope_parameters"
        section[key] = to_transformers_4(value, f"{where}: {key}") if is_section else value
    rope = section.pop("rope_parameters", None)
    if rope is None:
        return section
    # a file may have both spellings; one that is null says nothing
    for key, value in _split_rope_parameters(rope, f"{where}: rope_parameters").items():
        if section.get(key) not in (None, value):
            raise ConfigError(f"{where}: {key} is {shown(section[key])}, but rope_parameters gives {shown(value)}")
        section[key] = value
    return section


def _split_rope_parameters(rope: Any, where: str) -> dict[str, Any]:
    if not isinstance(rope, Mapping):
        raise ConfigError(f"{where} must be a section, got {shown(rope)}")
    scaling = dict(rope)  # a copy, from which what is known is taken
    split: dict[str, Any] = {}
    if "rope_theta" in scaling:
        split["rope_theta"] = scaling.pop("rope_theta")
    if "mrope_section" in scaling:
        split["rope_scaling"] = scaling
        return split
    # without sections there is nothing to scale: the DiT's plain embedding ("default"), the vision encoder's ("axial")
    kinds = {key: scaling.pop(key) for key in ("type", "rope_type") if key in scaling}
    for key, kind in kinds.items():
        if kind not in ("default", "axial"):
            raise ConfigError(f"{where}: {key} is {shown(kind)}; only 'default' and 'axial' are supported here")
    if scaling:
        raise ConfigError(f"{where}: unknown key {next(iter(scaling))!r}; known: rope_theta, rope_type, mrope_section")
    return split


def _is_required(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _limits(name: str) -> tuple[int, int]:
    """The least and the largest whole number that the field of this name may have."""
    if name.endswith(("_token_id", "_token_index")):
        return 0, _MAX_ID
    return int(name not in _MAY_BE_ZERO), _LARGEST.get(name, _MAX_SIZE)


def _decode_value(kind: Any, value: Any, where: str, limits: tuple[int, int]) -> Any:
    """A value of the file as the field of type ``kind`` holds it; a whole number is within ``limits``."""
    # a section within this one
    if isinstance(kind, type) and issubclass(kind, ConfigSection):
        if not isinstance(value, Mapping):
            raise ConfigError(f"{where} must be a section, got {shown(value)}")
        return kind.from_dict(value, where)
    if typing.get_origin(kind) is tuple:
        if not isinstance(value, list | tuple):
            raise ConfigError(f"{where} must be a list, got {shown(value)}")
        if len(value) > MAX_ITEMS:
            raise ConfigError(f"{where} has {len(value)} items; it may have {MAX_ITEMS}")
        item_kind = typing.get_args(kind)[0]
        return tuple(_decode_value(item_kind, item, where, limits) for item in value)
    # Python takes false for 0 and true for 1; a file that mixes them up is wrong
    if kind is bool:
        if not isinstance(value, bool):
            raise ConfigError(f"{where} must be true or false, got {shown(value)}")
        return value
    try:
        if kind is float:
            return check_float(where, value, 0, 1e30, above=True)
        # JSON written by other languages may hold 25.0 for 25
        is_whole_float = isinstance(value, float) and value.is_integer()
        return check_int(where, int(value) if is_whole_float else value, *limits)
    # the same words under another name: it is a file that is wrong here, and no request
    except InputError as e:
        raise ConfigError(str(e)) from None


def _encode_value(value: Any) -> Any:
    if isinstance(value, ConfigSection):
        return value.to_dict()
    return [_encode_value(item) for item in value] if isinstance(value, tuple) else value

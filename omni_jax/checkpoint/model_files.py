"""The small files that belong to a model beside its parameters: configuration, tokenizer, chat template.

A conversion copies them as they are. Those that transformers 5 wrote are put into the form of version 4 on the way,
so that the rest of this package knows one form and both releases read what is exported.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omni_jax.checks import shown
from omni_jax.config import THINKER_CLASS, ThinkerConfig
from omni_jax.config_file import CONFIG_FILE, GENERATION_CONFIG_FILE, read_config_file, write_config_file
from omni_jax.errors import CheckpointError
from omni_jax.plain_files import copy_file, has_file, read_object, resolve_file

# tensors of the source that are no parameters (name_map.optional_constants); without them PyTorch misses something
CONSTANTS_FILE = "constants.safetensors"
# how the flow of Token2Wav is integrated (models/ode_solver.py), where its DiT was distilled
TOKEN2WAV_FILE = "token2wav.json"

CONSENT_FILE = "voices.consent.json"

# transformers 4 keeps the preprocessors in the first two files, version 5 in sections of the third
_PREPROCESSOR_FILE = "preprocessor_config.json"
_VIDEO_PREPROCESSOR_FILE = "video_preprocessor_config.json"
_PROCESSOR_FILE = "processor_config.json"
_TOKENIZER_CONFIG_FILE = "tokenizer_config.json"

# without these nothing can be loaded; a preprocessor's file has to be there as well, under either name
TOKENIZER_FILE = "tokenizer.json"
REQUIRED_FILES = (CONFIG_FILE, TOKENIZER_FILE)
# copied where they are there, since PyTorch reads them or a licence asks for it
OTHER_FILES = (
    _PREPROCESSOR_FILE,
    _VIDEO_PREPROCESSOR_FILE,
    _PROCESSOR_FILE,
    _TOKENIZER_CONFIG_FILE,
    "chat_template.json",
    "chat_template.jinja",
    GENERATION_CONFIG_FILE,
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    # what the people have agreed to whose voices were added (checkpoint/voice_edits.py)
    CONSENT_FILE,
    "LICENSE",
    "README.md",
)

# Transformers 5 repeats the keys of every preprocessor in every section of processor_config.json. These are read from
# the image processor's, all others from the feature extractor's.
_IMAGE_KEYS = frozenset(
    """
    do_convert_rgb do_normalize do_rescale do_resize image_mean image_processor_type image_std merge_size patch_size
    resample rescale_factor temporal_patch_size
    """.split()
)
# keys of tokenizer_config.json that say how version 5 loaded the tokenizer
_TOKENIZER_LOADING_KEYS = ("backend", "is_local", "local_files_only")


def side_files(source: Path) -> list[Path]:
    """The model's small files in a folder, a published one or one of ours.

    Raises:
      CheckpointError: if one that must be there is missing, or one is no plain file of the folder.
    """
    missing: list[str] = []
    for name in REQUIRED_FILES:
        if not has_file(source / name):
            missing.append(name)
    # either release's file of the preprocessors will do
    if not _find_files(source, (_PREPROCESSOR_FILE, _PROCESSOR_FILE)):
        missing.append(_PREPROCESSOR_FILE)
    if missing:
        raise CheckpointError(
            f"{source} has no {' and no '.join(missing)}; fetch all files of the model into it. (What PyTorch's "
            "save_pretrained leaves out, AutoProcessor.from_pretrained(MODEL).save_pretrained(FOLDER) writes)"
        )
    return _find_files(source, REQUIRED_FILES + OTHER_FILES)


def _find_files(folder: Path, names: Sequence[str]) -> list[Path]:
    """Those of the named files that a folder has."""
    found = []
    for name in names:
        path = folder / name
        if has_file(path):
            resolve_file(path)  # what is no plain file of the folder is told before anything is written
            found.append(path)
    return found


def copy_published_files(source: Path, target: Path) -> None:
    """Copies the model's small files out of a published folder, in the form of transformers 4.

    Files that have this form already come over byte by byte.

    Raises:
      CheckpointError: if a file that must be there is missing, or one is no JSON object.
      ConfigError: if config.json cannot be put into that form.
    """
    for file in side_files(source):
        copy_file(file, target / file.name)
    # written again only where the form changed, so that a file of version 4 keeps its bytes
    values = read_config_file(source)
    if values != read_object(source / CONFIG_FILE):
        write_config_file(target, values)
    _split_processor_config(target)
    _rename_special_tokens(target)


def write_thinker_config(folder: Path) -> None:
    """Makes of a whole model's ``config.json`` in ``folder`` that of its Thinker alone, unless it is one already."""
    values = read_config_file(folder)
    if values.get("model_type") == ThinkerConfig.MODEL_TYPE:
        return
    thinker = {"architectures": [THINKER_CLASS], "model_type": ThinkerConfig.MODEL_TYPE, **values["thinker_config"]}
    write_config_file(folder, thinker)


def _split_processor_config(folder: Path) -> None:
    """``processor_config.json`` of transformers 5 holds what version 4 has in a file for each preprocessor."""
    path = folder / _PROCESSOR_FILE
    if not path.is_file():
        return
    # the sections that version 5 writes, each of which must be an object
    values = read_object(path)
    sections = {}
    for name in ("feature_extractor", "image_processor", "video_processor"):
        section = values.get(name)
        if section is None:
            continue
        if not isinstance(section, Mapping):
            raise CheckpointError(f"{path}: {name} must be an object, got a {type(section).__name__}")
        sections[name] = dict(section)
    if "feature_extractor" not in sections or "image_processor" not in sections:
        return  # of version 4, where it names a class

    # version 4 has one file for sound and pictures; a key of both sections comes from the one that it belongs to
    image = sections["image_processor"]
    preprocessor = {**image, **sections["feature_extractor"]}
    for key in _IMAGE_KEYS:
        if key in image:
            preprocessor[key] = image[key]
    # version 5 keeps the limits of a picture in ``size``, where a copy of version 4's keys may stand beside it
    size = preprocessor.pop("size", None) or {}
    if not isinstance(size, Mapping):
        raise CheckpointError(f"{path}: size must be an object, got {shown(size)}")
    for key, edge in (("min_pixels", "shortest_edge"), ("max_pixels", "longest_edge")):
        if edge in size:
            preprocessor[key] = size[edge]
    if "processor_class" in values:
        preprocessor["processor_class"] = values["processor_class"]
    _write_object(folder / _PREPROCESSOR_FILE, preprocessor)
    if "video_processor" in sections:
        _write_object(folder / _VIDEO_PREPROCESSOR_FILE, sections["video_processor"])
    # one form of each preprocessor stays, not two that might disagree
    path.unlink()


def _rename_special_tokens(folder: Path) -> None:
    """``extra_special_tokens`` of version 5 is a list, of version 4 a dictionary, for which 5 has another name."""
    path = folder / _TOKENIZER_CONFIG_FILE
    if not path.is_file():
        return
    # nothing to do for a file of version 4, which then keeps its bytes
    values = read_object(path)
    if not isinstance(values.get("extra_special_tokens"), list) and "backend" not in values:
        return
    for key in _TOKENIZER_LOADING_KEYS:
        values.pop(key, None)
    # popped first, since version 5's dictionary then takes the key
    extra = values.pop("extra_special_tokens", None)
    if isinstance(extra, list):
        values["additional_special_tokens"] = extra
    if "model_specific_special_tokens" in values:
        values["extra_special_tokens"] = values.pop("model_specific_special_tokens")
    values["tokenizer_class"] = "Qwen2Tokenizer"  # version 5 may name a class of its own
    _write_object(path, values)


def _write_object(path: Path, values: Mapping[str, Any]) -> None:
    text = json.dumps(values, indent=2, ensure_ascii=False) + "\n"
    # half a surrogate pair, which JSON may hold and UTF-8 not, becomes JSON's own escape for it
    path.write_text(text, encoding="utf-8", errors="backslashreplace")

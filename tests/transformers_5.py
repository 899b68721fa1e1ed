"""Folders in the form that transformers 5.24 saves, made of folders in the form of 4.57."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors.numpy import load_file, save_file

from omni_jax.config import VisionEncoderConfig

CASES = Path(__file__).parent / "cases"


def as_transformers_5(values: Any) -> Any:
    """A configuration in the spelling of version 5, as tests/cases/config_transformers_5.24.json has it."""
    if not isinstance(values, dict):
        return values
    section = {key: as_transformers_5(value) for key, value in values.items()}
    scaling = section.pop("rope_scaling", {})
    if "rope_theta" in section:
        section["rope_parameters"] = {"rope_theta": section.pop("rope_theta"), "rope_type": "default", **scaling}
    if section.get("model_type") == VisionEncoderConfig.MODEL_TYPE:
        section["rope_parameters"] = {"rope_theta": 10_000.0, "rope_type": "axial"}
    return section


def rewrite_as_transformers_5(folder: Path) -> None:
    """Makes of a folder what ``save_pretrained`` writes in version 5; its tensors have version 4's names there too."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(as_transformers_5(config)))
    (folder / "processor_config.json").write_bytes((CASES / "processor_config_transformers_5.24.json").read_bytes())
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
    tokenizer["model_specific_special_tokens"] = tokenizer.pop("extra_special_tokens")
    tokenizer["extra_special_tokens"] = tokenizer.pop("additional_special_tokens")
    tokenizer |= {"backend": "tokenizers", "is_local": True, "local_files_only": False}
    del tokenizer["added_tokens_decoder"], tokenizer["add_bos_token"]
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    template = json.loads((folder / "chat_template.json").read_text())["chat_template"]
    (folder / "chat_template.jinja").write_text(template)
    for name in ("preprocessor_config.json", "chat_template.json", "vocab.json", "merges.txt", "added_tokens.json"):
        (folder / name).unlink()
    tensors = load_file(folder / "model.safetensors")
    del tensors["token2wav.code2wav_dit_model.rotary_embed.inv_freq"]  # a buffer that version 5 does not save
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

"""Numbers of strangers' configurations, from which sizes of arrays follow."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from omni_jax.checkpoint import store
from omni_jax.config import OmniConfig
from omni_jax.engine.request import TalkerParams
from omni_jax.errors import CheckpointError, ConfigError
from omni_jax.processing.processor import Processor
from omni_jax.processing.processor_config import ProcessorConfig
from tests.security.folders import edit_json

TINY = OmniConfig.tiny()


def number_places(values: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where whole numbers stand in a configuration."""
    items = values.items() if isinstance(values, dict) else enumerate(values)
    for key, value in items:
        if isinstance(value, dict | list):
            yield from number_places(value, (*path, key))
        elif type(value) is int:
            yield (*path, key)


def replaced(values: Any, path: tuple[Any, ...], value: Any) -> Any:
    changed = json.loads(json.dumps(values))
    where = changed
    for key in path[:-1]:
        where = where[key]
    where[path[-1]] = value
    return changed


class TestConfigs:
    """Numbers of configurations, from which sizes of arrays follow."""

    @pytest.mark.parametrize("path", list(number_places(TINY.to_dict())), ids=lambda path: ".".join(map(str, path)))
    def test_every_number_has_a_ceiling(self, path: tuple[Any, ...]) -> None:
        with pytest.raises(ConfigError, match=r"it must be|is supported"):
            OmniConfig.from_dict(replaced(TINY.to_dict(), path, 2**21))

    @pytest.mark.parametrize("value", [0, -1])
    @pytest.mark.parametrize("path", list(number_places(TINY.to_dict())), ids=lambda path: ".".join(map(str, path)))
    def test_every_number_has_a_floor(self, path: tuple[Any, ...], value: int) -> None:
        values = replaced(TINY.to_dict(), path, value)
        name = [key for key in path if isinstance(key, str)][-1]
        is_id = name.endswith(("_token_id", "_token_index"))
        # what counts from 0, and the share of an axis in a rotation
        counts = name in ("fullatt_block_indexes", "look_ahead_layers", "look_backward_layers", "mrope_section")
        if not value and (is_id or counts):
            with contextlib.suppress(ConfigError):  # those shares must add up
                OmniConfig.from_dict(values)
            return
        low = int(not is_id and not counts)
        with pytest.raises(ConfigError, match=rf"{name} is {value}; it must be from {low} to \d+"):
            OmniConfig.from_dict(values)

    @pytest.mark.parametrize("value", [0, -1])
    @pytest.mark.parametrize("name", ["rms_norm_eps", "rope_theta"])
    def test_real_numbers_have_one_too(self, name: str, value: float) -> None:
        with pytest.raises(ConfigError, match=rf"{name} is {value}; it must be above 0"):
            OmniConfig.from_dict(replaced(TINY.to_dict(), ("thinker_config", "text_config", name), value))

    def test_fields_of_every_section_are_among_them(self) -> None:
        """A field that ``to_dict`` left out would be tried by nothing above."""

        def names(kind: Any) -> set[str]:
            found = set()
            for field in dataclasses.fields(kind):
                section = typing.get_type_hints(kind)[field.name]
                if dataclasses.is_dataclass(section):
                    found |= names(section)
                elif "int" in str(section):
                    found.add(field.name)
            return found

        tried = {[key for key in path if isinstance(key, str)][-1] for path in number_places(TINY.to_dict())}
        assert names(OmniConfig) == tried

    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("enc_channels", []),
            ("enc_channels", [16, 16, 16, 16]),
            ("enc_channels", [16, 16, 8, 16, 40]),
            ("enc_channels", [16, 16, 16, 16, 47]),
            ("enc_kernel_sizes", [5]),
            ("enc_dilations", []),
            ("enc_res2net_scale", 3),
            ("upsample_rates", [16]),
            ("upsample_kernel_sizes", [32, 31, 31]),
            ("upsample_initial_channel", 3),
            ("resblock_kernel_sizes", []),
            ("resblock_dilation_sizes", [[1, 3, 5], [1, 3, 5]]),
            ("resblock_dilation_sizes", [[]]),
        ],
    )
    def test_lists_that_do_not_go_together(self, name: str, value: Any) -> None:
        section = "dit_config" if name.startswith("enc_") else "bigvgan_config"
        with pytest.raises(ConfigError, match=rf"{section}: .*{name}"):
            OmniConfig.from_dict(replaced(TINY.to_dict(), ("token2wav_config", section, name), value))

    def test_a_vocoder_of_too_many_convolutions(self) -> None:
        section = ("token2wav_config", "bigvgan_config")
        values = replaced(TINY.to_dict(), (*section, "resblock_kernel_sizes"), [3, 3])
        with pytest.raises(ConfigError, match="resblock_dilation_sizes has 128 items; it may have 64"):
            OmniConfig.from_dict(replaced(values, (*section, "resblock_dilation_sizes"), [[1] * 64] * 2))

    def test_a_checkpoint_that_says_so_is_refused(self, model: Path) -> None:
        values = json.loads((model / "config.json").read_text())
        for path in (("thinker_config", "text_config", "num_attention_heads"), ("thinker_config", "seconds_per_chunk")):
            (model / "config.json").write_text(json.dumps(replaced(values, path, 0)))
            with pytest.raises(CheckpointError, match=rf"{path[-1]} is 0; it must be from 1 to"):
                store.abstract(model)

    @pytest.mark.parametrize("config", [OmniConfig.qwen2_5_omni_7b(), OmniConfig.qwen2_5_omni_3b(), TINY])
    def test_the_published_ones_are_under_it(self, config: OmniConfig) -> None:
        assert OmniConfig.from_dict(config.to_dict()) == config

    def test_a_list_has_a_length(self) -> None:
        path = ("token2wav_config", "bigvgan_config", "upsample_rates")
        with pytest.raises(ConfigError, match="upsample_rates has 100000 items; it may have 64"):
            OmniConfig.from_dict(replaced(TINY.to_dict(), path, [1] * 100_000))

    @pytest.mark.parametrize(
        "values",
        [
            {"n_fft": 2**31},
            {"n_fft": "400"},
            {"n_fft": 0},
            {"hop_length": 0},
            {"feature_size": 1e400},
            {"patch_size": 2**20},
            {"max_pixels": 10**400},
            {"min_pixels": [1]},
            {"image_mean": [0.1] * 10**6},
            {"image_std": [0, 0, 0]},
            {"image_std": None, "image_mean": "abc"},
            {"max_seconds": float("nan")},
            {"size": [1]},
            {"size": {"longest_edge": 2**40}},
        ],
    )
    def test_the_preprocessors(self, values: dict[str, Any]) -> None:
        with pytest.raises(ConfigError, match=r"preprocessor_config\.json"):
            ProcessorConfig.from_dict(values)

    @pytest.mark.parametrize("stop", [-1, 10**30, True, 1.5, "a", [1] * 10**6, {"a": 1}, [[1]]])
    def test_the_tokens_that_end_a_reply(self, published: Path, stop: Any) -> None:
        edit_json(published / "generation_config.json", eos_token_id=stop)
        with pytest.raises(CheckpointError, match="eos_token_id must be a token"):
            Processor.load(published)

    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("talker_temperature", float("nan")),
            ("talker_temperature", 10**30),
            ("talker_top_k", -1),
            ("talker_top_k", 10**30),
            ("talker_top_k", [40]),
            ("talker_top_p", 0),
            ("talker_repetition_penalty", "1.05"),
        ],
    )
    def test_how_codes_are_drawn(self, published: Path, name: str, value: Any) -> None:
        edit_json(published / "generation_config.json", **{name: value})
        with pytest.raises(CheckpointError, match=rf"generation_config\.json: {name} is .*it must be"):
            TalkerParams.load(published)

"""What 8 and 4 bits cost in error, part by part, and keys and values in 8 bits.

    python tools/quantization_error.py [--layers 2]

The linear maps of one part of Thinker or Talker are quantised, with the widths of the published 7B and random weights,
all else is float32; what is printed is the RMS of the output's difference over that of the output. Layers add up: of
more layers the error is larger, by about the root of their number. Weights of a trained model have larger outliers.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import tyro
from flax.traverse_util import flatten_dict, unflatten_dict
from rich.console import Console
from rich.progress import track
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it also runs as a file

from omni_jax.batch import AudioBlocks, VisionFrames
from omni_jax.config import DecoderConfig, OmniConfig, TalkerConfig, ThinkerConfig
from omni_jax.generation.quantization import count_inputs, quantize_linear_maps
from omni_jax.layers.attention import Mask
from omni_jax.models import talker, thinker
from omni_jax.models.decoder import KVCache
from tools.precision import relative_error

POSITIONS = 64  # of text
WINDOWS = 4  # of a picture


@dataclass(frozen=True)
class Options:
    """Prints a table of errors of 8 and of 4 bits."""

    layers: int = 2
    """Of each tower."""


@dataclass(frozen=True)
class Part:
    """A part of a model whose linear maps are quantised.

    Attributes:
      label: what a reader calls it.
      prefix: of the paths of its linear maps.
      run: parameters -> its output.
    """

    label: str
    prefix: tuple[str, ...]
    run: Callable[[Any], jax.Array]


def draw_params(linear_maps: Mapping[tuple[str, ...], int], abstract: Any) -> Any:
    """Random numbers that keep signals about as large as they come in."""
    rng = np.random.default_rng(0)
    drawn = {}
    shapes: dict[Any, Any] = flatten_dict(nn.unbox(abstract))
    for path, leaf in shapes.items():
        num_inputs = linear_maps.get(path[:-1])
        is_stacked = "layers" in path
        values = rng.standard_normal(leaf.shape, np.float32)
        if path[-1] == "kernel" and num_inputs is not None:
            values /= np.sqrt(np.prod(leaf.shape[is_stacked : is_stacked + num_inputs]))
        elif path[-1] == "kernel":
            values /= np.sqrt(np.prod(leaf.shape[:-1]))
        else:
            # around 1 for norms; biases and embeddings are small
            values = values * 0.1 + (1.0 if path[-1] == "scale" else 0.0)
        drawn[path] = values
    return unflatten_dict(drawn)


def thinker_parts(model: thinker.Thinker) -> list[Part]:
    """Its encoders, the layers of its decoder, and the head."""
    c = model.config
    rng = np.random.default_rng(1)
    x = rng.standard_normal((1, POSITIONS, c.text_config.hidden_size), np.float32)
    audio = c.audio_config
    mel = rng.standard_normal((1, audio.block_frames, audio.num_mel_bins), np.float32)
    sound = AudioBlocks(mel, np.array([audio.block_frames], np.int32))
    vision = c.vision_config
    patches = (vision.window_cells * vision.spatial_merge_size) ** 2
    place = np.tile(np.arange(patches, dtype=np.int32), (1, WINDOWS, 1))
    pixels = rng.standard_normal((1, WINDOWS, patches, vision.patch_dim), np.float32)
    picture = VisionFrames(pixels, place, place, place >= 0)
    return [
        Part("audio encoder", ("audio_encoder",), lambda params: _call(model, "encode_audio", params, sound)),
        Part("vision encoder", ("vision_encoder",), lambda params: _call(model, "encode_vision", params, picture)),
        Part("Thinker, decoder", ("decoder", "layers"), lambda params: _decode(model, params, x)),
        Part("Thinker, head", ("decoder", "head"), lambda params: _call(model, "logits", params, x[0])),
    ]


def talker_parts(model: talker.Talker) -> list[Part]:
    """The layers of its decoder, and the head."""
    x = np.random.default_rng(1).standard_normal((1, POSITIONS, model.config.hidden_size), np.float32)
    return [
        Part("Talker, decoder", ("decoder", "layers"), lambda params: _decode(model, params, x)),
        Part("Talker, head", ("decoder", "head"), lambda params: _call(model, "logits", params, x[0])),
    ]


def _call(model: nn.Module, method: str | Callable[..., Any], params: Any, *arguments: Any) -> jax.Array:
    output = jax.jit(lambda p, a: model.apply({"params": p}, *a, method=method))(params, arguments)
    assert isinstance(output, jax.Array)
    return output


def _decode(model: thinker.Thinker | talker.Talker, params: Any, x: np.ndarray) -> jax.Array:
    ids = np.broadcast_to(np.arange(POSITIONS, dtype=np.int32), (3, 1, POSITIONS))
    mask = Mask(np.ones((1, POSITIONS), np.int32), causal=True)
    return _call(model, _apply_decoder, params, x, ids, mask)


def _apply_decoder(module: Any, *arguments: Any) -> jax.Array:
    return module.decoder(*arguments)


def cache_error(model: thinker.Thinker | talker.Talker, config: DecoderConfig, params: Any) -> float:
    """The error of a decoder's output where its keys and values are in 8 bits, and nothing else."""
    x = np.random.default_rng(1).standard_normal((1, POSITIONS, config.hidden_size), np.float32)
    ids = np.broadcast_to(np.arange(POSITIONS, dtype=np.int32), (3, 1, POSITIONS))
    valid = np.ones((1, POSITIONS), bool)
    outputs = []
    for dtype in (jnp.float32, jnp.int8):
        cache = KVCache.init(config, 1, POSITIONS, model.scan_layers, dtype)
        outputs.append(np.asarray(_call(model, _extend_decoder, params, x, ids, valid, cache)))
    return relative_error(outputs[1], outputs[0])


def _extend_decoder(module: Any, *arguments: Any) -> jax.Array:
    return module.decoder.extend(*arguments)[0]


def small_config(layers: int) -> OmniConfig:
    """The widths of the 7B, with so many layers in each tower."""
    c = OmniConfig.qwen2_5_omni_7b()
    t = c.thinker_config
    smaller = dict(
        text_config=dataclasses.replace(t.text_config, num_hidden_layers=layers, vocab_size=8192),
        audio_config=dataclasses.replace(t.audio_config, encoder_layers=layers),
        vision_config=dataclasses.replace(t.vision_config, depth=layers),
    )
    thinker_config: ThinkerConfig = dataclasses.replace(t, **smaller)
    talker_config: TalkerConfig = dataclasses.replace(c.talker_config, num_hidden_layers=layers)
    return dataclasses.replace(c, thinker_config=thinker_config, talker_config=talker_config)


def main() -> None:
    options = tyro.cli(Options, description=__doc__)
    config = small_config(options.layers)
    table = Table("part", "8 bits", "4 bits", box=None)
    thinker_model = thinker.Thinker(config.thinker_config)
    talker_model = talker.Talker(config.talker_config)
    models: list[tuple[str, Any, DecoderConfig, Any, list[Part]]] = [
        (
            "Thinker",
            thinker_model,
            config.thinker_config.text_config,
            thinker.abstract_params(thinker_model),
            thinker_parts(thinker_model),
        ),
        (
            "Talker",
            talker_model,
            config.talker_config,
            talker.abstract_params(talker_model),
            talker_parts(talker_model),
        ),
    ]
    for name, model, decoder_config, abstract, parts in models:
        linear_maps = count_inputs(config, name.lower())
        params = draw_params(linear_maps, abstract)
        for part in track(parts, description="computing", console=Console(stderr=True)):
            expected = np.asarray(part.run(params))
            cells = []
            for bits in (8, 4):
                chosen = quantize_linear_maps(
                    linear_maps, params, lambda path, p=part, b=bits: b if path[: len(p.prefix)] == p.prefix else None
                )
                cells.append(f"{relative_error(np.asarray(part.run(chosen)), expected):.1e}")
            table.add_row(part.label, *cells)
        table.add_row(f"{name}, keys and values", f"{cache_error(model, decoder_config, params):.1e}", "")
    Console().print(table)


if __name__ == "__main__":
    main()

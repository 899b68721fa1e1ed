"""Times omni_jax beside the PyTorch reference, in one run, on random weights.

Both do the same work on the same inputs in float32 with all cores, in turns; a figure is the median of several. Quote
the ratios: the seconds belong to the machine.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import tyro
from rich.console import Console
from rich.progress import track
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it also runs as a file

from omni_jax.batch import OmniBatch
from omni_jax.config import (
    AudioEncoderConfig,
    OmniConfig,
    RopeScaling,
    TalkerConfig,
    TextConfig,
    ThinkerConfig,
    VisionEncoderConfig,
)
from omni_jax.generation.sampling import Sampling
from omni_jax.generation.text import TextLoop, TextRequest
from omni_jax.models.thinker import Thinker, abstract_params
from omni_jax.processing.collate import collate
from omni_jax.processing.layout import AudioInput, Prompt, VisionInput, lay_out

try:
    import torch
    from transformers import DynamicCache, Qwen2_5OmniConfig, Qwen2_5OmniThinkerForConditionalGeneration
except ImportError:
    sys.exit("the benchmark runs beside PyTorch: pip install -e '.[test]'")

PROMPT_TOKENS = 1024
DECODED_TOKENS = 32
AUDIO_FRAMES = 3000  # 30 seconds
PICTURE_GRID = (1, 34, 46)  # a picture of 480 x 640, 391 tokens


@dataclass(frozen=True)
class Case:
    """One row of the table: the same work on both sides. Each side does it once and returns the seconds it took."""

    name: str
    ours: Callable[[], float]
    theirs: Callable[[], float]
    nbytes: int = 0  # of weights that the work has to read, where it waits for memory


def middle_config() -> OmniConfig:
    """The Thinker at 12 layers of 1024, both encoders at 4 layers of their published widths."""
    text = TextConfig(1024, 4096, 12, 16, 4, 32_000, rope_scaling=RopeScaling(mrope_section=(8, 12, 12)))
    thinker = dataclasses.replace(
        ThinkerConfig.tiny(),
        text_config=text,
        audio_config=AudioEncoderConfig(encoder_layers=4, output_dim=1024),
        vision_config=VisionEncoderConfig(depth=4, fullatt_block_indexes=(3,), out_hidden_size=1024),
    )
    return OmniConfig.tiny(thinker_config=thinker, talker_config=TalkerConfig.tiny(embedding_size=1024))


class Ours:
    """The Thinker of omni_jax with random weights."""

    def __init__(self, config: OmniConfig):
        self.config = config.thinker_config
        self._whole = config
        model = Thinker(self.config, scan_layers=False)
        rng = np.random.default_rng(0)
        shapes = nn.unbox(abstract_params(model))
        self.params = jax.tree.map(lambda s: jnp.asarray(0.02 * rng.standard_normal(s.shape, np.float32)), shapes)
        self.loop = TextLoop(model, self.params, steps=DECODED_TOKENS)

    def batch(self, *prompts: Prompt) -> OmniBatch:
        """On the device already, so that no copy is timed."""
        return jax.tree.map(jnp.asarray, collate(prompts, self._whole, length=len(prompts[0])))

    def encode(self, item: AudioInput | VisionInput, token: int) -> Callable[[], float]:
        batch = self.batch(lay_out([token], [item], self.config))
        return lambda: seconds(lambda: self.loop.encode(batch))

    def text(self, ids: np.ndarray) -> tuple[Callable[[], float], Callable[[], float]]:
        """Reading the prompts [B, S], and saying DECODED_TOKENS tokens in each row, in seconds a token."""
        batch = self.batch(*(lay_out(row.tolist(), [], self.config) for row in ids))
        requests = [TextRequest(Sampling(), DECODED_TOKENS, ())] * len(ids)

        def read() -> Any:
            return self.loop.start(batch, [], requests)

        prefilled = functools.cache(read)

        def say() -> float:
            state = jax.block_until_ready(jax.tree.map(jnp.copy, prefilled()))  # the loop uses its state up
            return seconds(lambda: list(self.loop.tokens(state))) / DECODED_TOKENS

        return lambda: seconds(read), say

    def decoding_bytes(self) -> int:
        """What a step reads of the weights: the layers and the head."""
        decoder = {k: v for k, v in self.params["decoder"].items() if k != "embed"}
        return sum(leaf.nbytes for leaf in jax.tree.leaves(decoder))


class Theirs:
    """transformers' Thinker with random weights, float32, its fused attention, without the loop around it."""

    def __init__(self, config: OmniConfig):
        reference = Qwen2_5OmniConfig(**config.to_dict()).thinker_config
        self.model = Qwen2_5OmniThinkerForConditionalGeneration._from_config(reference, attn_implementation="sdpa")
        self.model.float().eval()

    def hear(self, sound: AudioInput) -> Callable[[], float]:
        mel, lengths = torch.tensor(sound.mel.T.copy()), torch.tensor([len(sound.mel)])
        after = (lengths - 1) // 2 + 1
        return lambda: seconds(lambda: self.model.audio_tower(mel, feature_lens=lengths, aftercnn_lens=after))

    def see(self, picture: VisionInput) -> Callable[[], float]:
        patches, grid = torch.tensor(picture.patches), torch.tensor([picture.grid])
        return lambda: seconds(lambda: self.model.visual(patches, grid))

    def text(self, ids: np.ndarray) -> tuple[Callable[[], float], Callable[[], float]]:
        """As ``Ours.text``."""
        prompts = torch.tensor(ids)

        def forward(tokens: Any, begin: int, cache: Any) -> Any:
            """The next tokens [B, 1]; only the last position's scores are made, as generation does."""
            positions = torch.arange(begin, begin + tokens.shape[1]).expand(3, len(tokens), -1)
            inputs = dict(input_ids=tokens, position_ids=positions, past_key_values=cache, use_cache=True)
            with torch.inference_mode():
                hidden = self.model.model(**inputs).last_hidden_state
                return self.model.lm_head(hidden[:, -1:]).argmax(-1)

        @functools.cache
        def prefilled() -> tuple[Any, Any]:
            cache = DynamicCache()
            return forward(prompts, 0, cache), cache

        def say() -> float:
            first, cache = prefilled()
            took = seconds(lambda: self._loop(forward, first, prompts.shape[1], cache)) / DECODED_TOKENS
            cache.crop(prompts.shape[1])
            return took

        return lambda: seconds(lambda: forward(prompts, 0, DynamicCache())), say

    @staticmethod
    def _loop(forward: Callable[..., Any], tokens: Any, begin: int, cache: Any) -> None:
        for step in range(DECODED_TOKENS):
            tokens = forward(tokens, begin + step, cache)


def seconds(work: Callable[[], Any]) -> float:
    """Wall-clock time of one call; every function of ours that is timed waits for its result."""
    begun = time.perf_counter()
    with torch.inference_mode():
        jax.block_until_ready(work())
    return time.perf_counter() - begun


def cases() -> list[Case]:
    """30 seconds of sound, a picture, a prompt, and replies to one and to eight."""
    config = middle_config()
    ours, theirs = Ours(config), Theirs(config)
    rng, c = np.random.default_rng(1), config.thinker_config
    sound = AudioInput(rng.standard_normal((AUDIO_FRAMES, 128), np.float32))
    patches = rng.standard_normal((np.prod(PICTURE_GRID), c.vision_config.patch_dim), np.float32)
    picture = VisionInput(patches, PICTURE_GRID)
    prompts = rng.integers(0, 500, (8, PROMPT_TOKENS))
    read, say = ours.text(prompts[:1])
    read_theirs, say_theirs = theirs.text(prompts[:1])
    nbytes = ours.decoding_bytes()
    return [
        Case("audio encoder, 30 s", ours.encode(sound, c.audio_token_index), theirs.hear(sound)),
        Case("vision encoder, 480 x 640", ours.encode(picture, c.image_token_index), theirs.see(picture)),
        Case(f"prefill, {PROMPT_TOKENS} tokens", read, read_theirs),
        Case("decoding a token, batch 1", say, say_theirs, nbytes),
        Case("decoding a token, batch 8", ours.text(prompts)[1], theirs.text(prompts)[1], nbytes),
    ]


def measure(case: Case, repeats: int) -> dict[str, Any]:
    """Both sides in turns, after one round that compiles and warms up."""
    rounds = [(case.ours(), case.theirs()) for _ in range(repeats + 1)][1:]
    ours, theirs = (statistics.median(side) for side in zip(*rounds, strict=True))
    ratio = statistics.median(b / a for a, b in rounds)
    out = dict(case=case.name, ours_seconds=ours, theirs_seconds=theirs, ratio=ratio)
    if case.nbytes:
        out |= dict(
            ours_gigabytes_a_second=case.nbytes / ours / 1e9, theirs_gigabytes_a_second=case.nbytes / theirs / 1e9
        )
    return out


def show(results: Sequence[dict[str, Any]]) -> None:
    table = Table("", "omni_jax", "PyTorch", "PyTorch / omni_jax", "weights read, GB/s")
    for r in results:
        speeds = [r.get(f"{side}_gigabytes_a_second") for side in ("ours", "theirs")]
        rate = f"{speeds[0]:.1f} : {speeds[1]:.1f}" if all(speeds) else ""
        times = (f"{1000 * r[f'{side}_seconds']:.1f} ms" for side in ("ours", "theirs"))
        table.add_row(r["case"], *times, f"{r['ratio']:.2f}", rate)
    Console(width=110).print(table)


def understand(json_out: Path | None = None, repeats: int = 5) -> None:
    """Encoders, prefill and decoding at a middle width: Thinker 12 layers x 1024, encoders 4 layers as published.

    Example: python tools/bench.py understand --json-out out/understand.json

    Args:
      json_out: write the figures here as well.
      repeats: counted rounds of each case, after one that is not.
    """
    results = [measure(case, repeats) for case in track(cases(), "timing", console=Console(stderr=True))]
    show(results)
    if json_out is not None:
        json_out.parent.mkdir(parents=True, exist_ok=True)
        json_out.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    tyro.extras.subcommand_cli_from_dict({"understand": understand}, description=__doc__)

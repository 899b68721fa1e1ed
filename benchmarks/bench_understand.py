"""``bench.py understand``: the encoders, reading a prompt and saying tokens."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from transformers import DynamicCache, Qwen2_5OmniConfig, Qwen2_5OmniThinkerForConditionalGeneration

from benchmarks.bench_sizes import middle_config
from benchmarks.bench_timing import Case, measure, seconds, show, write
from omni_jax import mrope
from omni_jax.config import OmniConfig
from omni_jax.engine.sampling import SamplingParams
from omni_jax.engine.thinker_engine import TextRequest, ThinkerEngine
from omni_jax.models.thinker import Thinker, abstract_params
from omni_jax.processing.layout import AudioInput, Prompt, VisionInput, lay_out
from omni_jax.processing.prefill_plan import Feed, feed

PROMPT_TOKENS = 1024
DECODED_TOKENS = 32
AUDIO_FRAMES = 3000  # 30 seconds
PICTURE_GRID = (1, 34, 46)  # a picture of 480 x 640, 391 tokens


class Ours:
    """The Thinker of omni_jax with random weights."""

    def __init__(self, config: OmniConfig):
        self.config = config.thinker_config
        self._whole = config
        model = Thinker(self.config, scan_layers=False)
        rng = np.random.default_rng(0)
        shapes = nn.unbox(abstract_params(model))
        self.params = jax.tree.map(lambda s: jnp.asarray(0.02 * rng.standard_normal(s.shape, np.float32)), shapes)
        self.loop = ThinkerEngine(model, self.params, steps=DECODED_TOKENS)

    def plan(self, *prompts: Prompt) -> Feed:
        """On the device already, so that no copy is timed."""
        plan = feed(prompts, [mrope.resolve(p.segments, self.config) for p in prompts], self._whole)
        return dataclasses.replace(plan, calls=tuple(jax.tree.map(jnp.asarray, call) for call in plan.calls))

    def encode(self, item: AudioInput | VisionInput, token: int) -> Callable[[], float]:
        calls = self.plan(lay_out([token], [item], self.config)).calls
        return lambda: seconds(lambda: jax.block_until_ready([self.loop.encode(call) for call in calls]))

    def text(self, ids: np.ndarray) -> tuple[Callable[[], float], Callable[[], float]]:
        """Reading the prompts [B, S], and saying DECODED_TOKENS tokens in each row, in seconds a token."""
        plan, every = self.plan(*(lay_out(row.tolist(), [], self.config) for row in ids)), range(len(ids))
        requests = dict.fromkeys(every, TextRequest(SamplingParams(), DECODED_TOKENS, ()))

        def read() -> Any:
            state = self.loop.empty(len(ids), ids.shape[1] + DECODED_TOKENS)
            for stretch in plan.stretches:
                state = self.loop.read(state, stretch, [])
            return jax.block_until_ready(state)

        prefilled = functools.cache(read)

        def say() -> float:
            state = self.loop.ask(prefilled(), requests, dict(zip(every, ids, strict=True)))
            state = jax.block_until_ready(jax.tree.map(jnp.copy, state))  # the loop uses its state up
            return seconds(lambda: self.loop.advance(state)) / DECODED_TOKENS

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
        tower = torch.inference_mode()(self.model.audio_tower)
        return lambda: seconds(lambda: tower(mel, feature_lens=lengths, aftercnn_lens=after))

    def see(self, picture: VisionInput) -> Callable[[], float]:
        patches, grid = torch.tensor(picture.patches), torch.tensor([picture.grid])
        tower = torch.inference_mode()(self.model.visual)
        return lambda: seconds(lambda: tower(patches, grid))

    def text(self, ids: np.ndarray) -> tuple[Callable[[], float], Callable[[], float]]:
        """As ``Ours.text``."""
        prompts = torch.tensor(ids)

        @torch.inference_mode()
        def forward(tokens: Any, begin: int, cache: Any) -> Any:
            """The next tokens [B, 1]; only the last position's scores are made, as generation does."""
            positions = torch.arange(begin, begin + tokens.shape[1]).expand(3, len(tokens), -1)
            inputs = dict(input_ids=tokens, position_ids=positions, past_key_values=cache, use_cache=True)
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
    read_a_step = (ours.decoding_bytes() / 1e9, "GB/s of weights")
    return [
        Case("audio encoder, 30 s", ours.encode(sound, c.audio_token_index), theirs.hear(sound)),
        Case("vision encoder, 480 x 640", ours.encode(picture, c.image_token_index), theirs.see(picture)),
        Case(f"prefill, {PROMPT_TOKENS} tokens", read, read_theirs),
        Case("decoding a token, batch 1", say, say_theirs, *read_a_step),
        Case("decoding a token, batch 8", ours.text(prompts)[1], theirs.text(prompts)[1], *read_a_step),
    ]


def understand(json_out: Path | None = None, repeats: int = 5) -> None:
    """Encoders, prefill and decoding at a middle width: Thinker 12 layers x 1024, encoders 4 layers as published.

    Example: python tools/bench.py understand --json-out out/understand.json

    Args:
      json_out: write the figures here as well.
      repeats: counted rounds of each case, after one that is not.
    """
    results = [measure(case, repeats) for case in track(cases(), "timing", console=Console(stderr=True))]
    show(results)
    write(json_out, results)

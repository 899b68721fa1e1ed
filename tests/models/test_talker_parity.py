"""The Talker against PyTorch, float32, random weights, several widths and seeds."""

from __future__ import annotations

import functools
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import torch

from omni_jax import mrope
from omni_jax.models.decoder import KVCache
from omni_jax.models.talker import NO_CODE, abstract_params
from omni_jax.processing.layout import AudioInput, Prompt, VisionInput, lay_out
from omni_jax.segments import Text
from tests.pairs import Whole, relative_error

# float32 sums in another order: some 1e-6 a layer at these depths, with room for the condition of random weights
TOLERANCE = 1e-4

STEPS = 8
LENGTH = 128  # of our rows, padded at the end
CAPACITY = 160  # of the cache
CHUNK = 48  # positions that the cache is extended by at a time


def make_prompt(whole: Whole, rng: np.random.Generator) -> Prompt:
    """Text, a sound, a picture and a silent video; only their sizes matter here."""
    c = whole.config.thinker_config
    dim = c.vision_config.patch_dim
    sound = AudioInput(np.zeros((57, c.audio_config.num_mel_bins), np.float32))
    picture = VisionInput(np.zeros((6 * 22, dim), np.float32), (1, 6, 22))
    video = VisionInput(np.zeros((3 * 4 * 6, dim), np.float32), (3, 4, 6), "video")
    text = rng.integers(0, 500, 9).tolist()
    ids = [*text[:4], c.audio_start_token_id, c.audio_token_index, c.audio_end_token_id, text[4]]
    for token in (c.image_token_index, c.video_token_index):
        ids += [c.vision_start_token_id, token, c.vision_end_token_id]
    return lay_out([*ids, *text[5:]], [sound, picture, video], c)


class Case:
    """A prompt, the Thinker's part of its positions and of some steps, and the codes of these steps."""

    def __init__(self, whole: Whole, seed: int):
        rng = np.random.default_rng(seed)
        c = whole.config.talker_config
        self.prompt = make_prompt(whole, rng)
        self.text = rng.standard_normal((1, len(self.prompt) + 2, c.embedding_size)).astype(np.float32)
        self.reply_embeds = rng.standard_normal((1, STEPS, c.embedding_size)).astype(np.float32)
        self.codes = rng.integers(0, c.vocab_size, STEPS)
        self.first = (c.tts_codec_pad_token_id, c.tts_codec_start_token_id)

    def reference(self, talker: Any) -> tuple[np.ndarray, np.ndarray]:
        """Logits at every position of the prompt, [T, V], and after each step, [STEPS, V]."""
        length = self.text.shape[1]
        sound, picture, video = self.prompt.media
        tokens = torch.tensor(self.prompt.tokens[None].astype(np.int64))
        with torch.no_grad():
            out = talker(
                inputs_embeds=torch.tensor(self.text),
                input_text_ids=torch.nn.functional.pad(tokens, (0, 2), value=1),
                attention_mask=torch.ones(1, length, dtype=torch.long),
                cache_position=torch.arange(length),
                audio_feature_lengths=torch.tensor([len(sound.mel)]),
                image_grid_thw=torch.tensor([picture.grid]),
                video_grid_thw=torch.tensor([video.grid]),
                video_second_per_grid=torch.tensor([video.seconds_per_grid]),
                use_cache=True,
            )
            prompt = out.logits[0].numpy()
            steps = []
            for i, code in enumerate(self.codes.tolist()):
                out = talker(
                    input_ids=torch.tensor([[code]]),
                    thinker_reply_part=torch.tensor(self.reply_embeds[:, i:]),
                    attention_mask=torch.ones(1, length + i + 1, dtype=torch.long),
                    cache_position=torch.tensor([length + i]),
                    past_key_values=out.past_key_values,
                    use_cache=True,
                )
                steps.append(out.logits[0, -1].numpy())
        return prompt, np.stack(steps)

    def ours(self, whole: Whole) -> tuple[Any, ...]:
        """The arguments of the Talker: a row with padding at its end."""
        length = self.text.shape[1]
        segments = (*self.prompt.segments, Text(2))
        spans = mrope.stack_spans([mrope.resolve_spans(segments, whole.config.thinker_config)], LENGTH)
        text = np.pad(self.text, ((0, 0), (0, LENGTH - length), (0, 0)), constant_values=np.float32(3))
        codes = np.full((1, LENGTH), NO_CODE, np.int32)
        codes[0, length - 2 : length] = self.first
        return text, codes, spans, (np.arange(LENGTH) < length)[None].astype(np.int32)


def test_logits_of_prefill_and_steps(whole: Whole) -> None:
    case = Case(whole, 0)
    prompt, steps = case.reference(whole.torch.talker)
    text, codes, spans, segment_ids = case.ours(whole)
    ids, delta = mrope.position_ids(spans, segment_ids, whole.config.talker_config.position_id_per_seconds)
    length = len(prompt)
    for model, params in whole.talkers():

        def apply(params: Any, method: str | None, *args: Any, model: Any = model) -> Any:
            return model.apply({"params": params}, *args, method=method)

        call = functools.partial(jax.jit(apply, static_argnums=1), params)
        logits = call(None, text, codes, spans, segment_ids)[0, :length]
        assert relative_error(logits, prompt) < TOLERANCE
        cache = KVCache.init(model.config, 1, CAPACITY, model.scan_layers, np.float32)
        chunks = []
        for begin in range(0, LENGTH, CHUNK):  # the last chunk is half empty
            part = slice(begin, begin + CHUNK)
            valid = segment_ids[:, part] == 1
            hidden, cache = call("extend", text[:, part], codes[:, part], ids[:, :, part], valid, cache)
            chunks.append(call("logits", hidden)[0])
        assert relative_error(np.concatenate(chunks)[:length], prompt) < TOLERANCE
        for i in range(STEPS):
            position = np.full((3, 1, 1), length + int(delta[0]) + i)
            reply_embeds = case.reply_embeds[:, i : i + 1]
            code = case.codes[None, i : i + 1]
            hidden, cache = call("extend", reply_embeds, code, position, np.ones((1, 1), bool), cache)
            assert relative_error(call("logits", hidden)[0, 0], steps[i]) < TOLERANCE


def test_every_weight_matters(whole: Whole) -> None:
    """So that parity over random weights says something of each of them: none is constant, none is unused."""
    model, params = whole.talkers()[0]
    shapes = jax.tree.map(lambda leaf: leaf.shape, nn.unbox(abstract_params(model)))
    assert shapes == jax.tree.map(lambda leaf: leaf.shape, params)
    rows = Case(whole, 0).ours(whole)

    def total(params: Any) -> jax.Array:
        logits = model.apply({"params": params}, *rows)[0, rows[-1].sum() - 1]
        return (logits * np.arange(len(logits))).sum()

    for path, gradient in jax.tree_util.tree_leaves_with_path(jax.jit(jax.grad(total))(params)):
        assert np.any(gradient), jax.tree_util.keystr(path)

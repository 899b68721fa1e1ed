"""The PyTorch reference as a side: transformers' Qwen2.5-Omni in float32, with its fused attention.

Letters: B requests, S tokens, K codes, F mel frames, M mel bins, N patches, P values of a patch.
"""

from __future__ import annotations

import tests.torchvision_stub  # noqa: F401, first: transformers looks for torchvision once, when it is imported

# isort: split
import functools
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from safetensors import safe_open
from transformers import (
    DynamicCache,
    Qwen2_5OmniConfig,
    Qwen2_5OmniForConditionalGeneration,
    Qwen2_5OmniTalkerForConditionalGeneration,
    Qwen2_5OmniThinkerForConditionalGeneration,
    Qwen2_5OmniToken2WavModel,
)

from benchmarks.budget import AUDIBLE, SAMPLE_RATE
from benchmarks.side import (
    CODES_PER_SECOND,
    PUBLISHED,
    VOICE,
    CompileCount,
    PromptInputs,
    ReplyRequest,
    Side,
    StreamedReply,
    Throughput,
    VoiceArrays,
)

ATTENTION = "sdpa"  # PyTorch's fused one, the fastest that needs no other library
# of a reply that is spoken before any is timed
WARM_UP_TOKENS = 4
WARM_UP_CODES = 8


def time_call(work: Callable[[], object]) -> float:
    """Wall-clock seconds of one call, and of what it left to be done on an accelerator."""
    started = time.perf_counter()
    work()
    synchronize()
    return time.perf_counter() - started


def synchronize() -> None:
    """Waits for the accelerator, where there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


class PyTorchSide(Side):
    """transformers at work on a folder in the published layout."""

    @functools.cached_property
    def _config(self) -> Any:
        return Qwen2_5OmniConfig.from_pretrained(self._published)

    @property
    def _published(self) -> Path:
        return self.folder / PUBLISHED

    def _load_component(self, name: str, kind: Any) -> Any:
        """One component of the checkpoint, so that the memory of this process is that component's."""
        model = kind._from_config(getattr(self._config, f"{name}_config"), attn_implementation=ATTENTION)
        # the files one after the other; of each only this component's tensors
        tensors = {}
        for file in sorted(self._published.glob("*.safetensors")):
            with safe_open(file, framework="pt") as opened:
                for key in opened.keys():  # noqa: SIM118, no dict
                    if key.startswith(f"{name}."):
                        tensors[key.removeprefix(f"{name}.")] = opened.get_tensor(key)
        model.float().load_state_dict(tensors)
        return model.eval()

    @functools.cached_property
    def _thinker(self) -> Any:
        return self._load_component("thinker", Qwen2_5OmniThinkerForConditionalGeneration)

    @functools.cached_property
    def _talker(self) -> Any:
        return self._load_component("talker", Qwen2_5OmniTalkerForConditionalGeneration)

    @functools.cached_property
    def _token2wav(self) -> Any:
        """Both networks, warm: their cases run once, without a round before them that does not count."""
        model = self._load_component("token2wav", Qwen2_5OmniToken2WavModel)
        dit = model.config.dit_config
        model(torch.zeros(1, 1, dtype=torch.long), torch.zeros(1, dit.enc_emb_dim), torch.zeros(1, 30, dit.mel_dim))
        return model

    @functools.cached_property
    def _model(self) -> Any:
        model = Qwen2_5OmniForConditionalGeneration.from_pretrained(
            self._published, dtype=torch.float32, attn_implementation=ATTENTION
        )
        return model.eval()

    @torch.inference_mode()
    def encode_audio(self, mel: Float[np.ndarray, "F M"]) -> float:
        features = torch.tensor(mel.T.copy())  # [M, F]
        lengths = torch.tensor([len(mel)])  # [1]
        # the lengths that the reference works out before it calls the tower
        after_conv = (lengths - 1) // 2 + 1
        tower = self._thinker.audio_tower
        return time_call(lambda: tower(features, feature_lens=lengths, aftercnn_lens=after_conv))

    @torch.inference_mode()
    def encode_image(self, patches: Float[np.ndarray, "N P"], grid: tuple[int, int, int]) -> float:
        values = torch.tensor(patches)  # [N, P]
        grids = torch.tensor([grid])  # [1, 3]
        tower = self._thinker.visual
        return time_call(lambda: tower(values, grids))

    @torch.inference_mode()
    def prefill(self, tokens: Int[np.ndarray, " S"]) -> float:
        prompt = torch.tensor(tokens[None])  # [1, S]
        thinker = self._thinker
        return time_call(lambda: _step_thinker(thinker, prompt, 0, DynamicCache()))

    @torch.inference_mode()
    def decode_text(self, tokens: Int[np.ndarray, " S"], batch: int, num_tokens: int) -> float:
        thinker = self._thinker
        # the cache is shared by all rounds, and cut back to the prompt after each
        cache, token = self._prefilled_text(tuple(tokens.tolist()), batch)
        started = time.perf_counter()
        for i in range(num_tokens):
            token = _step_thinker(thinker, token, len(tokens) + i, cache)
        synchronize()
        seconds = time.perf_counter() - started
        cache.crop(len(tokens))  # for the next round
        return seconds / num_tokens

    @functools.cache  # noqa: B019, a side lives as long as its process
    def _prefilled_text(self, tokens: tuple[int, ...], batch: int) -> tuple[DynamicCache, torch.Tensor]:
        """The cache after a prompt, and the next token [B, 1]."""
        cache = DynamicCache()
        prompts = torch.tensor([tokens] * batch)
        return cache, _step_thinker(self._thinker, prompts, 0, cache)

    @torch.inference_mode()
    def decode_codes(self, batch: int, prompt_length: int, num_codes: int) -> float:
        talker = self._talker
        cache = self._prefilled_codes(batch, prompt_length)
        # random text, and of each slot's logits the largest: drawing codes is no part of PyTorch's time
        text = torch.randn(num_codes, batch, 1, talker.config.embedding_size)  # [K, B, 1, E]
        codes = torch.zeros(batch, 1, dtype=torch.long)  # [B, 1]
        started = time.perf_counter()
        for i, embeds in enumerate(text):
            inputs = talker.get_input_embeddings()(codes) + embeds
            codes = _step_talker(talker, inputs, prompt_length + i, cache)
        synchronize()
        seconds = time.perf_counter() - started
        cache.crop(prompt_length)  # for the next round
        return seconds / num_codes

    @functools.cache  # noqa: B019
    def _prefilled_codes(self, batch: int, prompt_length: int) -> DynamicCache:
        cache = DynamicCache()
        # [B, S, E], in the width of the Thinker
        inputs = torch.randn(batch, prompt_length, self._talker.config.embedding_size)
        _step_talker(self._talker, inputs, 0, cache)
        return cache

    @torch.inference_mode()
    def solve_mel(self, codes: Int[np.ndarray, "B K"], voice: VoiceArrays) -> float:
        # 36 evaluations from fresh noise, as the reference does it
        cond = torch.tensor(voice.cond)
        mel = torch.tensor(voice.mel)
        ids = torch.tensor(codes)
        dit = self._token2wav.code2wav_dit_model
        return time_call(lambda: dit.sample(cond, mel, ids))

    @torch.inference_mode()
    def vocode(self, mel: Float[np.ndarray, "B F M"]) -> float:
        spectrogram = torch.tensor(mel).transpose(1, 2)  # [B, M, F]
        vocoder = self._token2wav.code2wav_bigvgan_model
        return time_call(lambda: vocoder(spectrogram))

    def load(self) -> float:
        return time_call(lambda: self._model)

    def warm_up(self, requests: Sequence[ReplyRequest], num_slots: int | None = None) -> CompileCount:
        """Speaks a few codes."""
        self._generate(_inputs(requests[0]), WARM_UP_TOKENS, WARM_UP_CODES)
        return CompileCount()

    def stream_reply(self, request: ReplyRequest, *, first_packet_only: bool = False) -> StreamedReply:
        """PyTorch has no sound before its reply is whole: one packet. Making the inputs does not count."""
        inputs = _inputs(request)
        started = time.perf_counter()
        num_tokens, audio = self._generate(inputs, request.num_tokens, request.num_codes)
        seconds = time.perf_counter() - started
        # codes are not returned; each has become 480 samples
        request.check_reply(num_tokens, CODES_PER_SECOND * len(audio) // SAMPLE_RATE)
        audible = np.flatnonzero(np.abs(audio) >= AUDIBLE)
        first = int(audible[0]) if len(audible) else None
        return StreamedReply(None, (seconds,), (len(audio),), (first,))

    def answer_all(self, requests: Sequence[ReplyRequest], num_slots: int, *, spoken: bool) -> Throughput:
        """Spoken replies one by one, whatever ``num_slots``: transformers speaks no batches. Text alone in batches."""
        self.warm_up(requests)
        return Throughput(self._speak_all(requests) if spoken else self._write_all(requests, num_slots))

    def _speak_all(self, requests: Sequence[ReplyRequest]) -> float:
        replies = [self.stream_reply(request) for request in requests]
        return sum(reply.arrivals[-1] for reply in replies)

    @torch.inference_mode()
    def _write_all(self, requests: Sequence[ReplyRequest], batch: int) -> float:
        """Text alone, in batches of like lengths; a batch is as long as its longest reply."""
        thinker = self._model.thinker
        pad = self._config.thinker_config.pad_token_id
        # sorted, so that little is padded and few rows wait for the longest of their batch
        ordered = sorted(requests, key=lambda request: (request.num_tokens, len(_inputs(request).tokens)))
        started = time.perf_counter()
        for first in range(0, len(ordered), batch):
            together = ordered[first : first + batch]
            prompts = [_inputs(request).tokens for request in together]
            num_tokens = max(request.num_tokens for request in together)
            thinker.generate(**_pad_left(prompts, pad), max_new_tokens=num_tokens, do_sample=False, pad_token_id=pad)
        return time.perf_counter() - started

    @torch.inference_mode()
    def _generate(self, inputs: PromptInputs, num_tokens: int, num_codes: int) -> tuple[int, np.ndarray]:
        """Tokens of a spoken reply, and its samples: greedy text, and codes sampled in the published way."""
        # equal draws in each round
        torch.manual_seed(0)
        arrays = _pad_left([inputs.tokens], 0)
        if inputs.mel is not None:
            arrays["input_features"] = torch.tensor(inputs.mel.T[None].copy())  # [1, M, F]
            arrays["feature_attention_mask"] = torch.ones(1, len(inputs.mel), dtype=torch.bool)
        ids, audio = self._model.generate(
            **arrays,
            speaker=VOICE,
            return_audio=True,
            thinker_do_sample=False,
            thinker_max_new_tokens=num_tokens,
            talker_max_new_tokens=num_codes + 1,  # the last code is taken for the end mark and left out
            thinker_pad_token_id=self._config.thinker_config.pad_token_id,
            talker_pad_token_id=self._config.talker_config.tts_codec_pad_token_id,
        )
        # the reference returns the prompt before the reply
        return ids.shape[1] - len(inputs.tokens), audio.flatten().numpy()

    def prepare_files(self, files: Sequence[Path], packed: bool) -> float:
        """The processor of transformers with the published settings, which packs nothing."""
        from benchmarks import reference_inputs  # it imports omni_jax, which the other cases do without

        processor = reference_inputs.load_processor(self._published)
        return time_call(lambda: [reference_inputs.prepare_file(processor, file) for file in files])


def _step_thinker(thinker: Any, tokens: torch.Tensor, start: int, cache: DynamicCache) -> torch.Tensor:
    """The next tokens [B, 1] after tokens [B, S]; only the last position's logits are computed, as generation does."""
    positions = torch.arange(start, start + tokens.shape[1]).expand(3, len(tokens), -1)  # [3, B, S]
    output = thinker.model(input_ids=tokens, position_ids=positions, past_key_values=cache, use_cache=True)
    return thinker.lm_head(output.last_hidden_state[:, -1:]).argmax(-1)


def _step_talker(talker: Any, inputs: torch.Tensor, start: int, cache: DynamicCache) -> torch.Tensor:
    """The next codes [B, 1] after embeddings [B, S, E]; only the last position's logits are computed."""
    positions = torch.arange(start, start + inputs.shape[1]).expand(3, len(inputs), -1)  # [3, B, S]
    projected = talker.thinker_to_talker_proj(inputs)  # [B, S, width of the Talker]
    output = talker.model(inputs_embeds=projected, position_ids=positions, past_key_values=cache, use_cache=True)
    return talker.codec_head(output[0][:, -1:]).argmax(-1)


def _inputs(request: ReplyRequest) -> PromptInputs:
    if request.inputs is None:
        raise ValueError(f"{request.question!r} has no inputs; the PyTorch side is given those of ours")
    return request.inputs


def _pad_left(prompts: Sequence[np.ndarray], pad: int) -> dict[str, torch.Tensor]:
    """Prompts of one length, with padding before them."""
    # before and not behind, since generation goes on at the right edge of every row
    longest = max(map(len, prompts))
    ids = torch.full((len(prompts), longest), pad)  # [B, S]
    mask = torch.zeros_like(ids)  # [B, S]
    for i, prompt in enumerate(prompts):
        ids[i, longest - len(prompt) :] = torch.tensor(prompt)
        mask[i, longest - len(prompt) :] = 1
    return {"input_ids": ids, "attention_mask": mask}

"""``bench.py accelerator``: a published size on one accelerator, with random parameters that are made there."""

from __future__ import annotations

import enum
import functools
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from benchmarks.budget import LINES, REST, ReplyLength, median_round, summarize_reply
from benchmarks.latency import SOUND, make_request
from benchmarks.models import (
    find_excluded_codes,
    find_text_tokens,
    make_params,
    make_voice,
    write_processor,
)
from benchmarks.ours import OmniJaxSide
from benchmarks.report import check_at_least_one, check_seconds, format_seconds, print_tables, write_json
from benchmarks.side import CODES_PER_SECOND, PUBLISHED, VOICE, Side
from omni_jax.checkpoint.voices import Voice
from omni_jax.config import OmniConfig
from omni_jax.engine.request import ChunkSizes
from omni_jax.generation.components import make_engines
from omni_jax.generation.model import OmniModel
from omni_jax.models import talker, thinker, token2wav
from omni_jax.processing.processor import Processor
from tools.make_checkpoint import make_config

PROMPT_TOKENS = 512
DECODED_TOKENS = 64
TALKER_PROMPT = 512
VOICE_FRAMES = 300
SPOKEN_SECONDS = 10

Dtype = Literal["bfloat16", "float32"]


class AcceleratorPart(enum.StrEnum):
    """What ``accelerator`` can time."""

    STEPS = "steps"
    PYTORCH = "pytorch"
    FIRST_PACKETS = "first-packets"


def accelerator(
    size: Literal["7b", "3b", "small"] = "7b",
    dtype: Dtype = "bfloat16",
    batches: tuple[int, ...] = (1, 8, 32),
    seconds: tuple[int, ...] = (2, 10, 30),
    repeats: int = 3,
    parts: Annotated[tuple[AcceleratorPart, ...], tyro.conf.EnumChoicesFromValues] = tuple(AcceleratorPart),
    json_out: Path | None = None,
) -> None:
    """Decoding, Token2Wav and the first packet of a published size on one accelerator, beside PyTorch on the same one.

    Parameters are random and made on the device, so that no checkpoint is needed. Thinker and Talker compute in
    ``dtype``, Token2Wav in float32, as the reference does. A step's time is the median of several rounds; the first
    packet is that of a warm model, with three seconds of speech and a written question before it.

    Example: python tools/bench.py accelerator --json-out out/accelerator.json

    Args:
      size: of the model.
      dtype: of Thinker and Talker.
      batches: that are decoded together.
      seconds: of the replies whose first packet is timed, shortest first.
      repeats: rounds.
      parts: what to time. PyTorch decodes and voices the same; it needs a build for the accelerator.
      json_out: write the figures here as well.
    """
    check_seconds(seconds)
    check_at_least_one(repeats=repeats)
    device = jax.devices()[0]
    results: dict[str, Any] = {"device": device.device_kind, "size": size, "dtype": dtype}
    config = make_config(size)
    steps = StepTimes(batches, repeats)
    with tempfile.TemporaryDirectory() as name, Progress(console=Console(stderr=True)) as progress:
        folder = Path(name)
        write_processor(folder, config)
        bar = progress.add_task("", total=len(parts))
        ours = RandomSide(folder, config, jnp.dtype(dtype))
        for part in parts:
            progress.update(bar, description=part)
            if part == AcceleratorPart.STEPS:
                results[part] = steps.measure(ours, config)
            elif part == AcceleratorPart.FIRST_PACKETS:
                results[part] = time_first_packets(ours, seconds, repeats)
            else:
                # imported here: omni_jax needs no PyTorch
                from benchmarks.pytorch_accelerator import RandomPyTorchSide

                results[part] = steps.measure(RandomPyTorchSide(folder, config, dtype), config)
            write_json(json_out, results)
            progress.advance(bar)
    print_results(results)


@dataclass(frozen=True)
class StepTimes:
    """What is timed of a side: a step of either decoder over some batches, and Token2Wav."""

    batches: tuple[int, ...]
    repeats: int

    def measure(self, side: Side, config: OmniConfig) -> dict[str, float]:
        """Median seconds of each."""
        rng = np.random.default_rng(0)
        tokens = rng.integers(0, 500, PROMPT_TOKENS)  # below the special tokens of every size
        times = {f"prefill of {PROMPT_TOKENS} tokens": self._time(lambda: side.prefill(tokens))}
        for batch in self.batches:
            decode_text = functools.partial(side.decode_text, tokens, batch, DECODED_TOKENS)
            times[f"Thinker step, batch {batch}"] = self._time(decode_text)
            decode_codes = functools.partial(side.decode_codes, batch, TALKER_PROMPT, DECODED_TOKENS)
            times[f"Talker step, batch {batch}"] = self._time(decode_codes)
        dit = config.token2wav_config.dit_config
        codes = rng.integers(0, dit.num_embeds - 1, (1, CODES_PER_SECOND * SPOKEN_SECONDS))
        mel = rng.standard_normal((1, codes.shape[1] * dit.repeats, dit.mel_dim), np.float32)
        voice = make_voice(config, VOICE_FRAMES)
        times[f"DiT, {SPOKEN_SECONDS} s of speech"] = self._time(lambda: side.solve_mel(codes, voice))
        times[f"vocoder, {SPOKEN_SECONDS} s of speech"] = self._time(lambda: side.vocode(mel))
        return times

    def _time(self, work: Callable[[], float]) -> float:
        work()  # compiles
        return float(np.median([work() for _ in range(self.repeats)]))


def time_first_packets(side: Side, seconds: tuple[int, ...], repeats: int) -> dict[str, Any]:
    """The budgets of the first packet of replies of several lengths, after a warm-up."""
    requests = [make_request(SOUND, ReplyLength(length)) for length in seconds]
    warmed = side.warm_up(requests)
    side.stream_reply(requests[0])
    replies = []
    for length, request in zip(seconds, requests, strict=True):
        rounds = [summarize_reply(side.stream_reply(request)) for _ in range(repeats)]
        replies.append({"seconds": length, **median_round(rounds, "audio_ttfp")})
    return {"warmup": {"programs": warmed.count, "seconds": warmed.seconds}, "replies": replies}


class RandomSide(OmniJaxSide):
    """omni_jax with random parameters on the device. The ends of text and of speech are never drawn."""

    def __init__(self, folder: Path, config: OmniConfig, dtype: Any):
        super().__init__(folder)
        self._sizes = config
        self._dtype = dtype

    @functools.cached_property
    def _config(self) -> OmniConfig:
        return self._sizes

    @functools.cached_property
    def _model(self) -> OmniModel:
        config = self._config
        kw = dict(dtype=self._dtype, param_dtype=self._dtype)
        models: dict[str, Any] = {
            "thinker": thinker.Thinker(config.thinker_config, **kw),
            "talker": talker.Talker(config.talker_config, **kw),
            "token2wav": token2wav.Token2Wav(config.token2wav_config),
        }
        modules = {"thinker": thinker, "talker": talker, "token2wav": token2wav}
        params = {name: make_params(modules[name].abstract_params(models[name])) for name in models}
        processor = Processor.load(self.folder / PUBLISHED)
        self._exclude_ends(params, processor)
        arrays = make_voice(config, VOICE_FRAMES)
        bos_token = config.talker_config.tts_text_pad_token_id + 1
        voice = Voice(VOICE, bos_token, arrays.cond, arrays.mel)
        engines = make_engines(config, models, params, None, ChunkSizes())
        return OmniModel(config, processor, engines, {VOICE: voice})

    @property
    def _thinker_model(self) -> OmniModel:
        return self._model

    @property
    def _talker_engine(self) -> Any:
        return self._model.engines.talker

    @property
    def _token2wav_engine(self) -> Any:
        return self._model.engines.token2wav

    def _exclude_ends(self, params: dict[str, Any], processor: Processor) -> None:
        """Sets the logits of what must not be drawn to zero, as ``models.write_model`` does."""
        is_text = find_text_tokens(processor, self._config)
        is_code = ~find_excluded_codes(self._config)
        for head, keep in (
            (params["thinker"]["decoder"]["head"], is_text),
            (params["talker"]["decoder"]["head"], is_code),
        ):
            head["kernel"] = jnp.where(keep, head["kernel"], 0).astype(head["kernel"].dtype)  # [hidden, vocabulary]


def print_results(results: dict[str, Any]) -> None:
    """A table of the steps, and one of the first packets."""
    tables = []
    ours = results.get(AcceleratorPart.STEPS, {})
    pytorch = results.get(AcceleratorPart.PYTORCH, {})
    if ours or pytorch:
        steps = Table(f"{results['size']}, {results['dtype']}, {results['device']}", "omni_jax", "PyTorch", "ratio")
        for name in ours or pytorch:
            cells = [f"{1000 * side[name]:.1f} ms" if name in side else "" for side in (ours, pytorch)]
            ratio = f"{pytorch[name] / ours[name]:.2f}" if name in ours and name in pytorch else ""
            steps.add_row(name, *cells, ratio)
        tables.append(steps)
    if AcceleratorPart.FIRST_PACKETS in results:
        replies = results[AcceleratorPart.FIRST_PACKETS]["replies"]
        table = Table("to the first packet", *(f"{reply['seconds']} s" for reply in replies))
        for name in [*LINES, REST]:
            table.add_row(name, *(format_seconds(reply["budget"][name]) for reply in replies))
        for name in ("audio_ttfp", "ttft", "audio_rtf"):
            table.add_row(name, *(f"{reply[name]:.3f}" for reply in replies))
        table.add_row("compilations", *(str(reply["compilations"]) for reply in replies))
        tables.append(table)
    print_tables(*tables)

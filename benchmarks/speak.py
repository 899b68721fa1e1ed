"""``bench.py speak``: Token2Wav, the Talker, and spoken replies one by one and together."""

from __future__ import annotations

import enum
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.models import (
    count_token2wav_flops,
    make_middle_config,
    make_voice,
    with_published_token2wav,
    write_model,
)
from benchmarks.ours import STAGES, OmniJaxSide
from benchmarks.pytorch_side import PyTorchSide
from benchmarks.report import (
    case_records,
    check_at_least_one,
    check_seconds,
    format_seconds,
    print_cases,
    print_tables,
    write_json,
)
from benchmarks.runner import Case, CaseResult, run_cases
from benchmarks.side import CODES_PER_SECOND, ReplyRequest, Side, SideProcess
from omni_jax.config import OmniConfig

VOICE_FRAMES = 300  # of the voice's clip, three seconds
# ten seconds of sound in the prompt, and somewhat over one of speech in the reply
TALKER_PROMPT = 250  # positions
TALKER_CODES = 64
# eight, of 40 and of 60 codes in turns, so that slots do not all end together
REPLIES = tuple(ReplyRequest("What do you hear and see?", 16, (40, 60)[i % 2]) for i in range(8))


class SpeechPart(enum.Enum):
    """What ``speak`` can time."""

    TOKEN2WAV = "token2wav"
    TALKER = "talker"
    REPLIES = "replies"


@dataclass(frozen=True)
class StageResult:
    """Seconds of a stage of some replies, one by one and together, and its share of all stages together."""

    stage: str
    single_seconds: float
    batch_seconds: float
    ratio: float
    share: float


def speak(
    json_out: Path | None = None,
    seconds: tuple[int, ...] = (2, 10, 30),
    reference_seconds: tuple[int, ...] = (2, 10),
    batches: tuple[int, ...] = (1, 4, 8),
    parts: Annotated[tuple[SpeechPart, ...], tyro.conf.EnumChoicesFromValues] = tuple(SpeechPart),
    repeats: int = 5,
) -> None:
    """Token2Wav at published size, the Talker at 6 layers of 512, and eight replies at the middle size.

    Token2Wav's figures are seconds for one second of speech (of all requests together); below 1 it keeps up with the
    voice. Each side has a process of its own, and "memory" is the most that process held in a case, with libraries,
    parameters and what was compiled. The time of compiling is left out.

    On two cores Token2Wav takes some 15 seconds a second of speech, PyTorch's 20 to 30: all of it, about 25 minutes.

    Example, in 10 minutes: python tools/bench.py speak --seconds 2 10 --batches 1 --json-out out/speak.json

    Example, in 4 minutes: python tools/bench.py speak --parts talker replies

    Example, ours alone: python tools/bench.py speak --parts token2wav --seconds 30 --reference-seconds --batches 1

    Args:
      json_out: write the figures here as well.
      seconds: of speech that Token2Wav makes in one go, shortest first.
      reference_seconds: those of them that PyTorch makes too; a run each, after a warm-up of one code.
      batches: requests at once: of the Talker, and of Token2Wav with each as long as the shortest of ``seconds``.
      parts: what to time.
      repeats: counted rounds of the Talker, after one that is not; the longer cases run once.
    """
    check_seconds(seconds, reference_seconds)
    check_at_least_one(batches=batches, repeats=repeats)
    results: dict[str, Any] = {}
    # a model and two processes for each part, so that none holds what another has loaded
    for part in parts:
        config = make_middle_config()
        if part is SpeechPart.TOKEN2WAV:
            # Thinker and Talker stay tiny: only Token2Wav runs
            config = with_published_token2wav(OmniConfig.tiny())
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            write_model(folder, config)
            with SideProcess(OmniJaxSide, folder) as ours, SideProcess(PyTorchSide, folder) as pytorch:
                if part is SpeechPart.REPLIES:
                    results[part.value] = _report_replies(ours)
                elif part is SpeechPart.TALKER:
                    cases = make_talker_cases(batches)
                    results[part.value] = _report_cases(run_cases(cases, ours, pytorch, repeats))
                else:
                    cases = make_token2wav_cases(config, seconds, reference_seconds, batches)
                    results[part.value] = _report_cases(run_cases(cases, ours, pytorch, 1, warm_up=False))
        write_json(json_out, results)  # each part as it is done: a long run may be broken off


def _report_cases(results: Sequence[CaseResult]) -> list[dict[str, Any]]:
    print_cases(results)
    return case_records(results)


def _report_replies(ours: SideProcess[OmniJaxSide]) -> list[dict[str, Any]]:
    stages = time_replies(ours, REPLIES)
    print_replies(stages, len(REPLIES))
    return [asdict(stage) for stage in stages]


def make_token2wav_cases(
    config: OmniConfig, seconds: Sequence[int], reference_seconds: Sequence[int], batches: Sequence[int]
) -> list[Case]:
    """Both networks over the lengths, one request each; then over batches of the shortest. In seconds a second."""
    # a rate of operations, which shows how much of the machine a network uses, whatever its size
    rng = np.random.default_rng(2)
    flops = count_token2wav_flops(config)
    dit = config.token2wav_config.dit_config
    voice = make_voice(config, VOICE_FRAMES)
    # seconds, and requests at once
    shapes = [(length, 1) for length in seconds]
    shapes += [(min(seconds), batch) for batch in sorted(batches) if batch > 1]
    cases = []
    for length, batch in shapes:
        num_codes = CODES_PER_SECOND * length
        codes = rng.integers(0, dit.num_embeds, (batch, num_codes))  # [B, K]
        mel = rng.standard_normal((batch, dit.repeats * num_codes, dit.mel_dim), np.float32)  # [B, F, M]
        title = f"{length} s of speech" if batch == 1 else f"{batch} x {length} s of speech"
        networks: dict[str, tuple[Callable[..., float], tuple[Any, ...]]] = {
            "DiT": (Side.solve_mel, (codes, voice)),
            "vocoder": (Side.vocode, (mel,)),
        }
        for network, (method, args) in networks.items():
            case = Case(
                f"{network}, {title}",
                method,
                args,
                with_pytorch=batch == 1 and length in reference_seconds,  # the reference takes one request at a time
                divisor=batch * length,
                work=flops[network] / 1e9,
                unit="GFLOP/s",
            )
            cases.append(case)
    return cases


def make_talker_cases(
    batches: Sequence[int], prompt_length: int = TALKER_PROMPT, num_codes: int = TALKER_CODES
) -> list[Case]:
    """Steps after a prompt, over batches. In seconds a step."""
    cases = []
    for batch in sorted(batches):
        args = (batch, prompt_length, num_codes)
        cases.append(Case(f"Talker, a step of batch {batch}", Side.decode_codes, args, work=1, unit="steps/s"))
    return cases


def time_replies(ours: SideProcess[OmniJaxSide], requests: Sequence[ReplyRequest]) -> list[StageResult]:
    """Each request answered alone, then all together: the seconds of every stage, the singles' added up."""
    # seconds by stage
    singles = []
    for request in track(requests, "replies one by one", console=Console(stderr=True)):
        singles.append(ours.run(OmniJaxSide.time_stages, [request]))
    together = ours.run(OmniJaxSide.time_stages, list(requests))
    single_seconds = {}
    for stage in STAGES:
        single_seconds[stage] = sum(single[stage] for single in singles)
    single_seconds["all"] = sum(single_seconds.values())
    total = sum(together.values())
    results = []
    for stage, batch_seconds in {**together, "all": total}.items():
        single = single_seconds[stage]
        results.append(StageResult(stage, single, batch_seconds, batch_seconds / single, batch_seconds / total))
    return results


def print_replies(results: Sequence[StageResult], num_replies: int) -> None:
    """A row for each stage."""
    heads = ("one by one", "together", "together / one by one", "share of together")
    table = Table(f"{num_replies} spoken replies", *heads)
    for result in results:
        table.add_row(
            result.stage,
            format_seconds(result.single_seconds),
            format_seconds(result.batch_seconds),
            f"{result.ratio:.2f}",
            f"{result.share:.0%}",
        )
    print_tables(table)

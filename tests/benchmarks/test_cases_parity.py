"""Both sides run every case of understanding, speaking and data at a tiny size. No times are looked at."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import av
import pytest
import torch
from PIL import Image
from transformers import Qwen2_5OmniConfig, Qwen2_5OmniToken2WavModel

from benchmarks import data, speak, understand
from benchmarks.media import FILES, SAMPLE_RATE, WITH_SOUND, write_media
from benchmarks.models import count_token2wav_flops
from benchmarks.ours import STAGES, OmniJaxSide
from benchmarks.pytorch_side import PyTorchSide
from benchmarks.report import case_records, print_cases
from benchmarks.runner import run_cases
from benchmarks.side import ReplyRequest
from tests.benchmarks.conftest import CONFIG, InProcess


@pytest.fixture(scope="module")
def sides(folder: Path) -> tuple[InProcess, InProcess]:
    return InProcess(OmniJaxSide, folder), InProcess(PyTorchSide, folder)


@pytest.fixture(scope="module")
def media(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("media")
    write_media(path, sound_seconds=1, video_seconds=1, size=(320, 240))
    return path


def check_cases(cases: list[Any], sides: tuple[InProcess, InProcess]) -> None:
    for result in run_cases(cases, *sides, 1, warm_up=False):
        assert result.ours.seconds > 0
        assert result.pytorch is not None and result.pytorch.seconds > 0


def test_understanding(sides: tuple[InProcess, InProcess], capsys: pytest.CaptureFixture[str]) -> None:
    cases = understand.make_cases(CONFIG, num_tokens=20)
    assert len(cases) == 5
    results = run_cases([cases[i] for i in (0, 2, 3)], *sides, 1, warm_up=False)
    print_cases(results)
    text = capsys.readouterr().out
    assert "prefill, 20 tokens" in text and "GB/s of weights" in text
    for record in case_records(results):
        assert record["ours"]["seconds"] > 0 and record["pytorch"]["seconds"] > 0


def test_token2wav(sides: tuple[InProcess, InProcess]) -> None:
    cases = speak.make_token2wav_cases(CONFIG, [1, 2], [1], [1, 2])
    names = [f"{name}, {of} s of speech" for of in ("1", "2", "2 x 1") for name in ("DiT", "vocoder")]
    assert [case.name for case in cases] == names
    assert [case.with_pytorch for case in cases] == [True, True, False, False, False, False]
    assert [case.divisor for case in cases] == [1, 1, 2, 2, 2, 2]
    check_cases(cases[:2], sides)


def test_talker(sides: tuple[InProcess, InProcess]) -> None:
    check_cases(speak.make_talker_cases([2], prompt_length=20, num_codes=6), sides)


@pytest.mark.long
def test_replies_one_by_one_and_together(
    sides: tuple[InProcess, InProcess], capsys: pytest.CaptureFixture[str]
) -> None:
    requests = [ReplyRequest("what do you hear", 4, 6 + i) for i in range(2)]
    results = speak.time_replies(sides[0], requests)
    assert [result.stage for result in results] == [*STAGES, "all"]
    assert all(result.batch_seconds > 0 and result.single_seconds > 0 for result in results)
    assert results[-1].share == 1
    speak.print_replies(results, 2)
    assert "2 spoken replies" in capsys.readouterr().out


def test_the_media_are_what_they_are_called(media: Path) -> None:
    with av.open(media / "sound.wav") as file:
        assert sum(frame.samples for frame in file.decode(audio=0)) == SAMPLE_RATE
    assert Image.open(media / "picture.jpg").size == (320, 240)
    for name in ("silent.mp4", WITH_SOUND):
        with av.open(media / name) as file:
            assert len(file.streams.audio) == (name == WITH_SOUND)
            assert len(list(file.decode(video=0))) == 25


def test_both_sides_read_every_kind_of_file(sides: tuple[InProcess, InProcess], media: Path) -> None:
    cases = data.make_cases(media)
    assert [case.name for case in cases] == [*FILES, "one of each, ours packed too"]
    check_cases(cases, sides)


def test_flops_are_those_that_pytorch_counts() -> None:
    """Against the shapes that go through PyTorch's layers in one evaluation and in the vocoder."""
    sizes = Qwen2_5OmniConfig(**CONFIG.to_dict()).token2wav_config
    model = Qwen2_5OmniToken2WavModel._from_config(sizes).float().eval()
    counted = []

    def count(layer: Any, inputs: Any, output: torch.Tensor) -> None:
        places = inputs[0].shape[-1] if isinstance(layer, torch.nn.ConvTranspose1d) else output.shape[-1]
        counted.append(2 * places * layer.weight.numel())

    for layer in model.code2wav_bigvgan_model.modules():
        if isinstance(layer, torch.nn.Conv1d | torch.nn.ConvTranspose1d):
            layer.register_forward_hook(count)
    model.code2wav_bigvgan_model(torch.zeros(1, 80, 10))  # a tenth of a second
    flops = count_token2wav_flops(CONFIG)
    assert 10 * sum(counted) == flops["vocoder"]
    layers = model.code2wav_dit_model.transformer_blocks
    weights = [w for name, w in layers.named_parameters() if w.ndim == 2 and "attn_norm" not in name]
    assert flops["DiT"] == 2 * 100 * 2 * 36 * sum(w.numel() for w in weights)

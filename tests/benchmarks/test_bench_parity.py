"""The benchmark of speech: that its command line is read and that both sides run. No times are looked at."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest
import torch

from benchmarks import bench_speak, speaking_ours, speaking_theirs
from benchmarks.bench_timing import Case, Side, measure
from omni_jax.config import OmniConfig
from tests.test_serve import ROOT
from tools import bench

CONFIG = OmniConfig.tiny()
TEXT = json.dumps(CONFIG.to_dict())
CLIP = 12


class InProcess(Side):
    """Works here: a process for each test would take longer than the work."""

    def __init__(self) -> None:
        self.memory = 10**9

    def __call__(self, work: Any, *args: Any) -> Any:
        return work(*args)


def test_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as done:
        bench.main(["speak", "--help"])
    assert done.value.code == 0
    text = capsys.readouterr().out
    assert all(option in text for option in ("--seconds", "--reference-seconds", "--batches", "--repeats", "Example"))


def test_one_benchmark_leaves_the_processes_of_another_alone() -> None:
    """A process takes the folders to import from of the one that starts it; torchvision's is for the data alone."""
    see = "print([path for path in sys.path if 'torchvision' in path])"
    code = f"import sys\nfrom tools import bench\ntry:\n    bench.main(['batch', '--help'])\nfinally:\n    {see}"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == "[]", done.stderr


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--seconds", "0"], "--seconds 0: give lengths of 1 to 327"),
        (["--seconds", "2", "--reference-seconds", "10"], "each must be one of --seconds"),
        (["--batches", "0"], "--batches and --repeats must be at least 1"),
    ],
)
def test_wrong_options(given: list[str], message: str) -> None:
    with pytest.raises(SystemExit, match=message):
        bench.main(["speak", *given])


def test_a_side_is_a_process_whose_memory_is_seen() -> None:
    side = Side()
    assert side(divmod, 7, 2) == (3, 1)
    assert 1e6 < side.memory < 1e9
    side.close()


def test_token2wav_on_both_sides(capsys: pytest.CaptureFixture[str]) -> None:
    side = InProcess()
    cases = bench_speak.token2wav_cases(side, side, CONFIG, [1, 2], [1], [1, 2])
    names = [case.name for case in cases]
    assert names == [f"{n}, {of} s of speech" for of in ("1", "2", "2 x 1") for n in ("DiT", "vocoder")]
    assert [case.theirs is not None for case in cases] == [True, True, False, False, False, False]
    results = [measure(case, 1, warm_up=False) for case in cases[:2]]
    assert all(r["ours_seconds"] > 0 and r["theirs_seconds"] > 0 and r["ours_rate"] > 0 for r in results)


def test_both_talkers() -> None:
    assert speaking_ours.talker(CONFIG, 2, 20, 6) > 0
    assert speaking_theirs.talker(TEXT, 2, 20, 6) > 0


def test_replies_one_by_one_and_together() -> None:
    few = [speaking_ours.Dialogue(i, prompt=9, words=4, codes=6 + i) for i in range(2)]
    results = bench_speak.replies(InProcess(), CONFIG, few)
    assert [r["stage"] for r in results] == [*speaking_ours.STAGES, "all"]
    assert all(r["batch_seconds"] > 0 for r in results)
    assert results[-1]["share"] == 1


def test_a_round_that_is_not_counted() -> None:
    times = iter([100.0, 1.0, 3.0])
    assert measure(Case("a", lambda: next(times), None, 6.0, "steps/s"), 2)["ours_rate"] == 3.0


def test_products_are_those_that_pytorch_counts() -> None:
    """Against the shapes that go through PyTorch's layers in one evaluation and in the vocoder."""
    from transformers import Qwen2_5OmniConfig, Qwen2_5OmniToken2WavModel

    sizes = Qwen2_5OmniConfig(**CONFIG.to_dict()).token2wav_config
    model = Qwen2_5OmniToken2WavModel._from_config(sizes).float().eval()
    counted = []

    def count(layer: Any, inputs: Any, output: torch.Tensor) -> None:
        places = inputs[0].shape[-1] if isinstance(layer, torch.nn.ConvTranspose1d) else output.shape[-1]
        counted.append(2 * places * layer.weight.numel())

    convs = (torch.nn.Conv1d, torch.nn.ConvTranspose1d)
    for layer in model.code2wav_bigvgan_model.modules():
        if isinstance(layer, convs):
            layer.register_forward_hook(count)
    model.code2wav_bigvgan_model(torch.zeros(1, 80, 10))  # a tenth of a second
    assert 10 * sum(counted) == speaking_ours.products(CONFIG)["vocoder"]
    layers = model.code2wav_dit_model.transformer_blocks
    weights = [w for name, w in layers.named_parameters() if w.ndim == 2 and "attn_norm" not in name]
    assert speaking_ours.products(CONFIG)["DiT"] == 2 * 100 * 2 * 36 * sum(w.numel() for w in weights)

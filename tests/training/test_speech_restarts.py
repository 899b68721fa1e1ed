"""Every stage of speech, killed at random, goes on to the same losses."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from omni_jax.training.metrics_log import METRICS_FILE, read_metrics
from omni_jax.training.recipe import Recipe
from tests.processes import finish, start
from tests.training.test_flow_matching import speech_rows  # noqa: F401, a fixture
from tests.training.test_talker import spoken_rows  # noqa: F401, a fixture
from tests.training.test_talker_dpo import make_dpo_recipe, pairs, scored  # noqa: F401, fixtures
from tests.training.test_vocoder import sound_rows  # noqa: F401, a fixture

pytestmark = pytest.mark.long  # five processes a stage that each load a model and compile a step

NUM_STEPS = 10
NUM_KILLS = 3
KILLED = -signal.SIGKILL


@pytest.fixture(scope="module")
def options(
    tiny_model: Path,
    tone_rows: Path,
    speech_rows: Path,  # noqa: F811
    sound_rows: Path,  # noqa: F811
    spoken_rows: Path,  # noqa: F811
    scored: Path,  # noqa: F811
    make_dpo_recipe: Callable[..., Recipe],  # noqa: F811
) -> dict[str, list[str]]:
    """The options of each recipe, by its name."""
    from_model = ["--init", str(tiny_model)]
    in_two = ["--data.rows", "2", "--data.streams", "2"]
    without_media = ["--data.rows", "2", "--data.audio-blocks", "0", "--data.canvases", "0", "--remat", "none"]
    of_codes = [*from_model, *in_two, "--data.tokens", "72", "--data.train", str(speech_rows)]
    of_dialogues = [*from_model, *without_media, "--data.train"]
    phases = ["--phases.0.steps", "5"]
    return {
        "speech-tokenizer": [
            *("--init", "random", "--model", "tiny", "--data.train", str(tone_rows), *in_two, "--data.tokens", "120"),
            *("--optimizer.ema", "0.9", *phases),
        ],
        "token2wav-dit": of_codes,
        "token2wav-distill": of_codes,
        "vocoder": [*from_model, *in_two, *phases, "--data.train", str(sound_rows)],
        "talker-pretrain": [*of_dialogues, str(spoken_rows), "--objective.voices", "Ada", "620"],
        "talker-dpo": [*of_dialogues, str(scored)],
        "talker-voices": [*of_dialogues, str(spoken_rows), "--objective.voices", "Ada", "620"],
    }


STAGES = (
    "speech-tokenizer",
    "token2wav-dit",
    "token2wav-distill",
    "vocoder",
    "talker-pretrain",
    "talker-dpo",
    "talker-voices",
)


@pytest.mark.parametrize("stage", STAGES)
def test_killed_at_random(stage: str, options: dict[str, list[str]], tmp_path: Path) -> None:
    """Before the first step, behind some, and while a checkpoint is written."""
    rng = np.random.default_rng(STAGES.index(stage))
    points = ["start", "saving"]
    while len(points) < NUM_KILLS:
        points.append(f"step {rng.integers(1, 4)}")
    stops = [("SIGKILL", point) for point in rng.permutation(points).tolist()]
    every = [f"{stage}-tiny", *options[stage], "--steps", str(NUM_STEPS), "--checkpoint.every", "2"]
    cases = []
    for name in ("unbroken", "killed"):
        cases.append({"workdir": str(tmp_path / name), "stops": stops if name == "killed" else [], "options": every})
    codes = json.loads(finish(start("-m", "tests.training.killed", json.dumps(cases))).splitlines()[-1])
    assert codes == [[0], [KILLED] * NUM_KILLS + [0]]
    unbroken = read_metrics(tmp_path / "unbroken" / METRICS_FILE)
    killed = read_metrics(tmp_path / "killed" / METRICS_FILE)
    assert [values["step"] for values in unbroken] == list(range(1, NUM_STEPS + 1))
    for name in ("step", "loss", "grad_norm", "tokens", "learning_rate"):
        assert [values[name] for values in killed] == [values[name] for values in unbroken], name

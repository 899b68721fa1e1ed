"""What cheaper solvers of Token2Wav's flow do to the mel: a table of errors and times.

    python tools/solver_error.py --model out/model --distilled runs/distill

Each solver makes the mel of the same random codes from the same noise; errors are against the mel of the published one,
RMS over RMS. So do checkpoints whose DiT was distilled from that of --model, each with the solver that it was trained
for. Without --model the parameters are random numbers. They show that a solver works, and little of the size of its
errors: those follow from how the velocity changes along the flow, which training decides.
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import tyro
from rich.console import Console
from rich.progress import track
from rich.table import Table

from omni_jax.checkpoint import store
from omni_jax.checkpoint.train_checkpoints import resolve_checkpoint
from omni_jax.checkpoint.voices import Voice, load_voices
from omni_jax.config import BigVGANConfig, DiTConfig, OmniConfig, Token2WavConfig
from omni_jax.engine.token2wav_engine import Token2WavEngine
from omni_jax.models.ode_solver import Solver
from omni_jax.models.token2wav import Token2Wav
from tools.precision import make_params, relative_error

SOLVERS = (
    Solver(),
    Solver("rk4", 5),
    Solver("rk4", 3),
    Solver("midpoint", 9),
    Solver("midpoint", 5),
    Solver("adams", 18),
    Solver("adams", 9),
    Solver("euler", 18),
    Solver("euler", 9),
)


@dataclass(frozen=True)
class Options:
    """What is solved."""

    model: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """Folder that tools/convert.py to-jax wrote; without it, random parameters of the published width."""
    distilled: Annotated[tuple[Path, ...], tyro.conf.arg(metavar="DIR")] = ()
    """Checkpoints of runs of token2wav-guidance or token2wav-distill, or the folders of such runs."""
    layers: int = 4
    """Of the random DiT; the published one has 22."""
    seconds: float = 2.0
    """Of sound."""


def load_speech(options: Options) -> tuple[Token2WavConfig, object, Voice]:
    """The configuration and parameters of Token2Wav, and a voice."""
    if options.model is not None:
        config = OmniConfig.load(options.model).token2wav_config
        params = store.load(options.model, ("token2wav",))["token2wav"]
        return config, params, next(iter(load_voices(options.model).values()))
    config = Token2WavConfig(dit_config=DiTConfig(num_hidden_layers=options.layers), bigvgan_config=BigVGANConfig())
    c = config.dit_config
    rng = np.random.default_rng(0)
    clip = rng.normal(-5.0, 2.0, (1, 300, c.mel_dim)).astype(np.float32)
    voice = Voice("random", 0, rng.standard_normal((1, c.enc_emb_dim)).astype(np.float32), clip)
    return config, make_params(config), voice


def main() -> None:
    options = tyro.cli(Options, description=__doc__)
    config, params, voice = load_speech(options)
    # what each row of the table is made with
    rows: list[tuple[str, Solver, object]] = []
    for solver in SOLVERS:
        rows.append((solver.method, solver, params))
    for folder in map(resolve_checkpoint, options.distilled):
        solver = Solver.load(folder)
        rows.append((f"{solver.method}, {folder}", solver, store.load(folder, ("token2wav",))["token2wav"]))
    codes = np.random.default_rng(0).integers(0, config.dit_config.num_embeds, round(50 * options.seconds))
    expected = None
    first_seconds = 0.0
    heading = ("solver", "steps", "velocities", "of the network", "error of the mel", "time over the published one's")
    table = Table(*heading, box=None)
    for name, solver, own_params in track(rows, description="solving", console=Console(stderr=True)):
        engine = Token2WavEngine(Token2Wav(config), own_params, solver=solver)
        (mel,) = engine.make_mels([codes], [voice], [None], [0])
        # again, for the first call compiles
        started = time.perf_counter()
        engine.make_mels([codes], [voice], [None], [0])
        seconds = time.perf_counter() - started
        if expected is None:
            expected = mel
            first_seconds = seconds
        error = relative_error(mel, expected)
        evaluations = (solver.num_evaluations, solver.num_evaluations * solver.num_halves)
        row = (name, str(solver.steps), *map(str, evaluations), f"{error:.1e}")
        table.add_row(*row, f"{seconds / first_seconds:.2f}")
    Console().print(table)


if __name__ == "__main__":
    main()

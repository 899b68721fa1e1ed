"""Speech solved by blocks beside speech solved as a whole: how far the mel differs, where, and what it costs.

With random weights it shows how errors lie along blocks and seams, and times that are those of trained weights.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import flax.linen as nn
import jax
import numpy as np
import tyro
from flax.traverse_util import flatten_dict, unflatten_dict

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it also runs as a file

from benchmarks.bench_sizes import middle_config
from omni_jax.config import BigVGANConfig, DiTConfig, Token2WavConfig
from omni_jax.layers.stack import unstack_layers
from omni_jax.layers.streaming import Block
from omni_jax.models.dit import DiT, pack
from omni_jax.models.dit_streaming import CODE_SECONDS, CarriedDiT, NoisyCodes, Speaker
from omni_jax.models.flow_matching import draw_noise, solve
from omni_jax.models.token2wav import Token2Wav, abstract_params

try:
    from matplotlib import pyplot
except ImportError:
    sys.exit("pictures need matplotlib: pip install -e '.[plots]'")

MODES = {"carried": CarriedDiT}


def make_config(size: Literal["few-layers", "middle", "published"]) -> DiTConfig:
    """The DiT's sizes."""
    if size == "middle":
        return middle_config().token2wav_config.dit_config
    few = DiTConfig(num_hidden_layers=4, look_backward_layers=(0, 3), look_ahead_layers=(2,))
    return DiTConfig() if size == "published" else few


def random_params(config: DiTConfig, seed: int) -> Any:
    """Kernels that keep the variance of what they multiply, all else around zero; layers apart.

    Queries and keys are twice as large, so that attention has peaks and what a block sees of its neighbours matters.
    """
    boxed = abstract_params(Token2Wav(Token2WavConfig(dit_config=config, bigvgan_config=BigVGANConfig.tiny())))
    rng = np.random.default_rng(seed)
    shapes: dict[tuple[str, ...], Any] = flatten_dict(nn.unbox(boxed)["dit"])  # type: ignore[assignment]

    def draw(path: tuple[str, ...], shape: tuple[int, ...]) -> np.ndarray:
        if path[-1] != "kernel":
            scale = 1.0 if path[-1] == "embedding" else 0.1
        else:
            one = shape[1:] if path[0] == "layers" else shape
            spread = path[-2] in ("query", "key", "value")  # the others multiply all axes but their last
            scale = (2 if path[-2] in ("query", "key") else 1) / math.sqrt(one[0] if spread else math.prod(one[:-1]))
        return np.float32(scale) * rng.standard_normal(shape, np.float32)

    return unstack_layers(unflatten_dict({path: draw(path, a.shape) for path, a in shapes.items()}))


def request(config: DiTConfig, blocks: int, seed: int) -> Block:
    """Random codes in a random voice, with the noise that a stream and an offline call both draw."""
    rng, codes = np.random.default_rng([seed, 1]), blocks * config.block_size // config.repeats
    noise = draw_noise(np.full(blocks, seed, np.uint32), np.arange(blocks), (config.block_size, config.mel_dim))
    noise = np.asarray(noise).reshape(1, codes, config.repeats, config.mel_dim)
    rows, cond = (rng.standard_normal((1, *s), np.float32) for s in ((2, config.enc_dim), (config.enc_emb_dim,)))
    ids = rng.integers(0, config.num_embeds, (1, codes))
    return Block(NoisyCodes(ids, noise), np.ones((1, codes), bool), Speaker(rows, cond))


def solve_offline(dit: DiT, x: Block) -> Callable[[Any], Any]:
    """The whole solve as a function of the parameters: mel [blocks, 24, mel]."""
    c = dit.config
    count = x.valid.shape[1] * c.repeats // c.block_size
    blocks, _ = pack([count * c.block_size], c.block_size, count)
    codes = np.repeat(x.values.codes[0], c.repeats).reshape(count, c.block_size)
    noise = x.values.noise.reshape(count, c.block_size, c.mel_dim)
    voices = [np.repeat(a, count, axis=0) for a in (x.row.rows, x.row.cond)]

    def run(params: Any) -> Any:
        conditions: Any = dit.apply({"params": params}, codes, *voices, method="conditions")
        return solve(dit, params, noise, conditions, blocks)[0]

    return jax.jit(run)


def steps(
    mode: str, dit: DiT, params: Any, x: Block, chunk: int, clock: Callable[[], float]
) -> Iterator[tuple[np.ndarray, float]]:
    """Step by step ``chunk`` blocks: the frames that come out, [frames, mel], and the seconds."""
    part = MODES[mode](dit)
    step, state = jax.jit(part.step, donate_argnums=1), part.init_state(1)
    codes = chunk * part.streaming.block
    spare = -(x.valid.shape[1] + part.streaming.look_ahead) % codes + part.streaming.look_ahead
    padded = jax.tree.map(lambda a: np.pad(a, ((0, 0), (0, spare), *[(0, 0)] * (a.ndim - 2))), (x.values, x.valid))
    for at in range(0, padded[1].shape[1], codes):
        values, valid = jax.tree.map(lambda a, at=at: a[:, at : at + codes], padded)
        started = clock()
        made, state = jax.block_until_ready(step(params, state, Block(values, valid, x.row)))
        yield np.asarray(made.values)[np.asarray(made.valid)], clock() - started


def solve_all(
    dit: DiT, params: Any, x: Block, chunk: int, clock: Callable[[], float]
) -> dict[str, tuple[np.ndarray, float]]:
    """Of each way the mel [blocks, 24, mel] and seconds a block: medians over turns, so that all see the same machine.

    The first turn compiles and does not count.
    """
    whole, mel = solve_offline(dit, x), np.zeros(0)
    pieces: dict[str, list[np.ndarray]] = {mode: [] for mode in MODES}
    seconds: dict[str, list[float]] = {name: [] for name in ("offline", *MODES)}
    for turn in zip(*(steps(mode, dit, params, x, chunk, clock) for mode in MODES), strict=True):
        for mode, (piece, took) in zip(MODES, turn, strict=True):
            pieces[mode].append(piece)
            seconds[mode].append(took / chunk)
        started = clock()
        mel = np.asarray(whole(params))
        seconds["offline"].append((clock() - started) / len(mel))
    mels = {"offline": mel, **{mode: np.concatenate(pieces[mode]).reshape(mel.shape) for mode in MODES}}
    return {name: (mels[name], statistics.median(seconds[name][1:])) for name in mels}


def compared(mel: np.ndarray, wanted: np.ndarray, seconds: float) -> dict[str, Any]:
    """Errors against the offline solve, relative to its size, and how rough the seams are."""
    size = float(np.sqrt(np.mean(np.square(wanted))))

    def rms(x: np.ndarray, axes: tuple[int, ...]) -> list[float]:
        return (np.sqrt(np.mean(np.square(x), axis=axes)) / size).tolist()

    steps = np.diff(mel.reshape(-1, mel.shape[2]), axis=0)
    seams = np.arange(1, len(steps) + 1) % mel.shape[1] == 0
    rough = [float(np.sqrt(np.mean(np.square(steps[which])))) for which in (seams, ~seams)]
    return {
        "seconds_a_second": seconds,
        "error": float(np.sqrt(np.mean(np.square(mel - wanted)))) / size,
        "largest_error": float(np.abs(mel - wanted).max()) / size,
        "error_by_frame_of_block": rms(mel - wanted, (0, 2)),
        "error_by_block": rms(mel - wanted, (1, 2)),
        "seam_step": rough[0] / rough[1],  # from frame to frame over a seam, by that within a block
    }


def draw(results: dict[str, Any], picture: Path) -> None:
    """Errors within a block and along the request, and the times."""
    figure, (inside, along, times) = pyplot.subplots(1, 3, figsize=(14, 4), layout="constrained")
    for mode in MODES:
        inside.plot(results[mode]["error_by_frame_of_block"], marker=".", label=mode)
        along.plot(results[mode]["error_by_block"], marker=".", label=mode)
    inside.set(xlabel="frame of the block", ylabel="mel error / mel, RMS", title="within a block")
    along.set(xlabel="block of the request", title="along the request")
    for axes in (inside, along):
        axes.set_ylim(bottom=0)
        axes.legend()
    names = ["offline", *MODES]
    bars = times.bar(names, [results[name]["seconds_a_second"] for name in names])
    times.bar_label(bars, fmt="%.2f")
    times.set(
        ylabel=f"DiT {results['unit']} a second of speech",
        title=f"{results['size']}, chunks of {results['chunk_codes']}",
    )
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, dpi=110)


def main(
    out: Path = Path("out/streaming"),
    size: Literal["few-layers", "middle", "published"] = "few-layers",
    blocks: int = 6,
    chunk: int = 2,
    seed: int = 0,
    processor_time: bool = False,
) -> None:
    """Solves one random request as a whole and by blocks, from equal noise, and compares the mel and the times.

    Writes OUT.json and OUT.png: the error by frame of a block, the error by block of the request, how rough the seams
    are, and the DiT's time for a second of speech; for the streams that is the time of a step.

    A step of CHUNK blocks solves 4 CHUNK of them where windowed and 2 CHUNK where carried; the offline solve each
    block once. What the times add to that is what is done once a step and not once a block.

    Args:
      out: of both files, without an ending.
      size: few-layers has the published widths and 4 of 22 layers, and takes two minutes on two cores; middle is that
        of the benchmarks; published takes a quarter of an hour there.
      blocks: of 24 frames, 0.24 seconds each, in the request.
      chunk: blocks a step.
      seed: of the weights, the codes, the voice and the noise.
      processor_time: counts what all cores spend and not what passes: for a CPU that has other work as well.
    """
    if chunk < 1 or blocks < chunk:
        sys.exit(f"error: {blocks} blocks in chunks of {chunk}; give at least one block a chunk, and one chunk")
    config = make_config(size)
    dit, params, x = DiT(config, scan_layers=False), random_params(config, seed), request(config, blocks, seed)
    codes = config.block_size // config.repeats
    solved = solve_all(dit, params, x, chunk, time.process_time if processor_time else time.perf_counter)
    unit = "processor seconds" if processor_time else "seconds"
    results: dict[str, Any] = {"size": size, "blocks": blocks, "chunk_codes": chunk * codes, "unit": unit}
    for name, (mel, seconds) in solved.items():
        about = results[name] = compared(mel, solved["offline"][0], seconds / (CODE_SECONDS * codes))
        print(f"{name:9} {about['seconds_a_second']:7.2f} s a second   error {about['error']:.5f}", end="   ")
        print(f"largest {about['largest_error']:.5f}   seam {about['seam_step']:.4f}")
    out.parent.mkdir(parents=True, exist_ok=True)
    out.with_suffix(".json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    draw(results, out.with_suffix(".png"))


if __name__ == "__main__":
    tyro.cli(main)

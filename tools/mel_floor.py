"""How far the log-mel of a live sound is from that of the same sound read as a file.

    python tools/mel_floor.py [--model FOLDER]

The log-mel has a floor that depends on its maximum, and live that is the maximum so far
(``omni_jax.processing.audio.MelStream``). With a model, the greedy replies to both are compared too.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it also runs as a file

import omni_jax
from omni_jax.generation.model import OmniModel
from omni_jax.processing.audio import MelSettings, MelStream, log_mel
from omni_jax.processing.media import read_audio

MEDIA = Path(__file__).parents[1] / "tests" / "media"
RATE = 16_000  # Hz
BLOCK = 200  # mel frames
PROMPTS = ("What was that?", "Write down what you hear.", "Who speaks?", "Answer briefly.", "Translate it.")


def make_sounds() -> dict[str, np.ndarray]:
    """The real sounds of the tests, and what may come before somebody speaks: three seconds of it."""
    files = {}
    for name in ("speech.wav", "speech2.mp3", "video.mp4"):
        files[name] = read_audio(str(MEDIA / name), MelSettings())
    speech = files["speech.wav"]
    rng = np.random.default_rng(0)
    noise = rng.standard_normal(3 * RATE).astype(np.float32)
    loudness = float(np.sqrt(np.mean(speech**2)))
    repeated = np.resize(speech, 3 * RATE)
    # the quieter the beginning, the lower its floor while nothing louder has come
    before = {}
    for decibels in (-20, -40):
        before[f"the same speech, {decibels} dB"] = 10 ** (decibels / 20) * repeated
    for decibels in (-30, -60):
        before[f"noise, {decibels} dB under the speech"] = loudness * 10 ** (decibels / 20) * noise
    before["digital silence"] = 0 * noise
    sounds = dict(files)
    for name, samples in before.items():
        sounds[f"{name}, then speech.wav"] = np.concatenate([samples, speech])
    return sounds


def live_log_mel(samples: np.ndarray) -> np.ndarray:
    """The log-mel as ``MelStream`` makes it, float32 [T, mel bins]."""
    mel = MelStream(MelSettings(), BLOCK)
    return np.concatenate([*mel.push(samples), mel.finish()])


def count_changed_replies(model: OmniModel, samples: np.ndarray) -> int:
    """How many of the prompts get another reply than to the sound as a file."""
    count = 0
    for prompt in PROMPTS:
        # the same question twice: after the live sound, and after the same samples as a file
        listener = model.listen(max_tokens=32)
        listener.audio(samples, RATE)
        *_, last = listener.answer(prompt)
        sound = {"type": "audio", "audio": samples, "sampling_rate": RATE}
        message = {"role": "user", "content": [sound, {"type": "text", "text": prompt}]}
        assert last.reply is not None
        count += last.reply.token_ids != model.generate([message], max_tokens=32).token_ids
    return count


def main(model: Path | None = None) -> None:
    """Prints a table of how far the log-mel of live sounds is from that of the same sounds read as files.

    Args:
      model: a converted checkpoint whose replies are compared, too.
    """
    omni_model = None if model is None else omni_jax.load(model, components=("thinker",))
    print("| sound | frames touched | bins touched | mean change of these | largest | replies changed |")
    print("|---|---|---|---|---|---|")
    for name, samples in make_sounds().items():
        difference = np.abs(live_log_mel(samples) - log_mel(samples, MelSettings()))  # [T, mel bins]
        touched = difference > 0
        mean = difference[touched].mean() if touched.any() else 0.0
        replies = "" if omni_model is None else f"{count_changed_replies(omni_model, samples)} of {len(PROMPTS)}"
        frames = f"{touched.any(axis=1).mean():.1%}"
        bins = f"{touched.mean():.1%}"
        print(f"| {name} | {frames} | {bins} | {mean:.3f} | {difference.max():.3f} | {replies} |", flush=True)


if __name__ == "__main__":
    tyro.cli(main)

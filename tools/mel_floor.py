"""How far the log-mel of a sound that is heard live is from that of the same sound as a whole.

Only the floor differs (``omni_jax.processing.audio.MelStream``). With a model, the greedy replies are compared too:

    python tools/mel_floor.py [--model FOLDER]
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

import omni_jax
from omni_jax.generation.model import OmniModel
from omni_jax.processing.audio import MelSettings, MelStream, log_mel
from omni_jax.processing.media import read_audio

MEDIA = Path(__file__).parents[1] / "tests" / "media"
RATE, BLOCK = 16_000, 200
PROMPTS = ("What was that?", "Write down what you hear.", "Who speaks?", "Answer briefly.", "Translate it.")


def sounds() -> dict[str, np.ndarray]:
    """The real sounds of the tests, and what may come before somebody speaks: three seconds of it."""
    files = {name: read_audio(str(MEDIA / name), MelSettings()) for name in ("speech.wav", "speech2.mp3", "video.mp4")}
    speech = files["speech.wav"]
    noise = np.random.default_rng(0).standard_normal(3 * RATE).astype(np.float32)
    loudness = float(np.sqrt(np.mean(speech**2)))
    quiet = np.resize(speech, 3 * RATE)
    before = {f"the same speech, {db} dB": 10 ** (db / 20) * quiet for db in (-20, -40)}
    before |= {f"noise, {db} dB under the speech": loudness * 10 ** (db / 20) * noise for db in (-30, -60)}
    before["digital silence"] = 0 * noise
    return files | {f"{name}, then speech.wav": np.concatenate([x, speech]) for name, x in before.items()}


def live(samples: np.ndarray) -> np.ndarray:
    """What ``MelStream`` makes of it."""
    mel = MelStream(MelSettings(), BLOCK)
    return np.concatenate([*mel.push(samples), mel.finish()])


def changed(model: OmniModel, samples: np.ndarray) -> int:
    """How many of the prompts get another reply."""
    count = 0
    for prompt in PROMPTS:
        listener = model.listen(max_tokens=32)
        listener.audio(samples, RATE)
        *_, last = listener.answer(prompt)
        sound = {"type": "audio", "audio": samples, "sampling_rate": RATE}
        message = {"role": "user", "content": [sound, {"type": "text", "text": prompt}]}
        assert last.reply is not None
        count += last.reply.token_ids != model.generate([message], max_tokens=32).token_ids
    return count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a converted checkpoint whose replies are compared")
    folder = parser.parse_args().model
    model = omni_jax.load(folder, components=("thinker",)) if folder else None
    print("| sound | frames touched | bins touched | mean change of these | largest | replies changed |")
    print("|---|---|---|---|---|---|")
    for name, samples in sounds().items():
        difference = np.abs(live(samples) - log_mel(samples, MelSettings()))
        touched = difference > 0
        mean = difference[touched].mean() if touched.any() else 0.0
        replies = "" if model is None else f"{changed(model, samples)} of {len(PROMPTS)}"
        frames, bins = f"{touched.any(axis=1).mean():.1%}", f"{touched.mean():.1%}"
        print(f"| {name} | {frames} | {bins} | {mean:.3f} | {difference.max():.3f} | {replies} |", flush=True)


if __name__ == "__main__":
    main()

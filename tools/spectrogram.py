"""Draws the log-mel spectrogram of a sound file, to look at what was spoken.

python tools/spectrogram.py reply.wav reply.png
"""

from __future__ import annotations

import sys
from pathlib import Path

import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it also runs as a file

from omni_jax.processing.audio import MelSettings, log_mel
from omni_jax.processing.layout import FRAMES_PER_SECOND
from omni_jax.processing.media import read_audio
from tools.command_errors import exit_on_error

# an optional dependency; without it there is nothing to do here
try:
    from matplotlib import pyplot
except ImportError:
    sys.exit("pictures need matplotlib: pip install -e '.[plots]'")


def main(sound: tyro.conf.Positional[Path], picture: tyro.conf.Positional[Path]) -> None:
    """Draws the log-mel spectrogram of SOUND, as the audio encoder gets it, into PICTURE.

    Args:
      sound: any file with sound that ffmpeg reads, a video too.
      picture: where to; its ending (.png, .svg or .pdf) is the format.
    """
    settings = MelSettings()
    mel = log_mel(read_audio(sound, settings), settings)
    seconds = len(mel) / FRAMES_PER_SECOND
    figure, axes = pyplot.subplots(figsize=(10, 4), layout="constrained")
    # [mel bins, frames], low bands at the bottom
    image = axes.imshow(mel.T, origin="lower", aspect="auto", extent=(0, seconds, 0, mel.shape[1]))
    axes.set(xlabel="seconds", ylabel="mel band (0 to 8 kHz)", title=f"{sound.name}, {seconds:.2f} s")
    figure.colorbar(image, label="log power, as the audio encoder gets it")
    figure.savefig(picture, dpi=120)


if __name__ == "__main__":
    with exit_on_error():
        tyro.cli(main)

"""Measures the speech of a model on held-out rows: word errors, whose voice it is, and the error of the mel.

    python tools/measure_speech.py runs/talker3 test_codes.jsonl --voice-rows valid.jsonl --out out/measured

A row is ``{"audio": ..., "text": ..., "voice": ..., "codec_ids": [...]}``, a text that is read aloud; or a dialogue of
``tools/make_world.py --spoken 1``, whose last answer is spoken where it stands, after its media. Up to four kinds of
sound are measured: the recording (source), what Token2Wav makes of the codes of the recording (copy), what the model
speaks of the text in the row's voice (spoken), and the same in the voice of a clip that it was not trained on (cloned).
Word errors are those of Whisper base, and of pocketsphinx with a closed grammar of the rows' words; a voice is told by
Resemblyzer (docs on teaching speech). DNSMOS rates how clean each kind sounds. Times of words are compared with a
forced alignment by pocketsphinx: of all sentences, and of those alone in which Whisper finds all words. Sounds, their
spectrograms and report.json are in OUT.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import time
import wave
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import tyro
from jaxtyping import Float
from rich.console import Console
from rich.progress import track

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it also runs as a file

import omni_jax
from omni_jax.checkpoint import store
from omni_jax.checkpoint.train_checkpoints import resolve_checkpoint
from omni_jax.checkpoint.voices import load_voices
from omni_jax.checks import check_int
from omni_jax.config import OmniConfig
from omni_jax.data.rows import row_values
from omni_jax.data.sounds import read_sound
from omni_jax.data.sources import open_rows
from omni_jax.engine.token2wav_engine import Token2WavEngine
from omni_jax.errors import InputError, JudgeError
from omni_jax.evaluation.recognizers import CheckedRecognizer, make_recognizer
from omni_jax.evaluation.speaker_similarity import SpeakerJudge, cosine
from omni_jax.evaluation.speech_quality import QualityJudge
from omni_jax.evaluation.sphinx_recognizer import SphinxRecognizer, split_words
from omni_jax.evaluation.spoken_answers import SpokenText, make_seed, read_spoken_text, speak_texts
from omni_jax.evaluation.transcripts import Recognizer
from omni_jax.evaluation.word_errors import count_word_errors
from omni_jax.evaluation.word_time_errors import measure_word_times
from omni_jax.generation.model import OmniModel
from omni_jax.generation.options import Options as Request
from omni_jax.models.ode_solver import Solver
from omni_jax.models.token2wav import SAMPLE_RATE, Token2Wav
from omni_jax.plain_files import replace_file
from omni_jax.processing.audio import resample
from omni_jax.processing.chat import SPEECH_SYSTEM_PROMPT
from omni_jax.processing.fetch import NO_ACCESS
from omni_jax.processing.speech_mel import RATE, speech_log_mel
from omni_jax.processing.voice_clip import read_clip
from tools.command_errors import exit_on_error

Kind = Literal["source", "copy", "spoken", "cloned"]
_NUM_PICTURES = 3  # sentences that are drawn
_NUM_BLOCKS = (16, 32)  # of the DiT, that the codes of a sentence are rounded up to
_TEXTS_PER_CALL = 8  # that are spoken at once


@dataclass(frozen=True)
class Options:
    """What is measured."""

    model: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]
    """A checkpoint, or the folder of a training run."""
    rows: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="ROWS.jsonl")]
    out: Path
    """Folder for sounds, pictures and report.json; it must not exist yet."""
    voice_rows: str
    """Other rows of the same voices: a voice is the mean of their speaker vectors."""
    kinds: tuple[Kind, ...] = ("source", "copy", "spoken")
    """Of source, copy, spoken and cloned."""
    sentences: int = 12
    """Of each voice, the first ones."""
    clip: str | None = None
    """For cloned: sound of a voice that the model was not trained on."""
    clip_text: str | None = None
    """For cloned: what the clip says."""
    max_codes: int = 400
    """Of what is spoken, 50 a second."""
    temperature: float | None = None
    """Of the Talker; without it, as the checkpoint says."""
    seed: int = 0


@dataclass(frozen=True, eq=False)
class Sentence:
    """A text that is to be spoken.

    Attributes:
      text: its words.
      voice: name of the speaker's.
      samples: of the recording, at ``RATE``.
      codes: of the recording; None if the row has none.
      spoken: the row as a text to speak.
    """

    text: str
    voice: str
    samples: Float[np.ndarray, " n"]
    codes: np.ndarray | None
    spoken: SpokenText


@dataclass(frozen=True, eq=False)
class Sounds:
    """The sounds of one kind.

    Attributes:
      samples: of each sentence; empty where nothing was spoken.
      rate: Hz.
      seconds: that the second half of them took to make, by part; None where nobody looked.
      num_unended: how many were cut off at the limit of codes.
    """

    samples: Sequence[Float[np.ndarray, " n"]]
    rate: int
    seconds: Mapping[str, float] | None = None
    num_unended: int = 0


def read_sentences(rows: str, out: Path, limit: int) -> list[Sentence]:
    """The first rows of each voice.

    Raises:
      InputError: naming the row, if it lacks something.
    """
    counts: dict[str, int] = {}
    sentences = []
    for row in open_rows(rows):
        try:
            values = row_values(row)
            # of a dialogue, its voice is that of the user
            recording = values.get("reply") if "messages" in values else values
            if not isinstance(recording, Mapping) or not isinstance(recording.get("voice"), str):
                raise InputError("it has no voice, or no reply that is spoken")
            voice = recording["voice"]
            counts[voice] = counts.get(voice, 0) + 1
            if counts[voice] > limit:
                continue
            samples = read_sound(row, recording, "audio", RATE, NO_ACCESS, None)
        except InputError as e:
            raise InputError(f"{row.name}: {e}") from e
        codes = recording.get("codec_ids")
        codes = None if codes is None else np.array(codes, np.int32)
        spoken = read_spoken_text(row, out / "report.json")
        if spoken.prompt[0]["role"] != "system":
            prompt = [{"role": "system", "content": SPEECH_SYSTEM_PROMPT}, *spoken.prompt]
            spoken = dataclasses.replace(spoken, prompt=prompt)
        sentences.append(Sentence(spoken.text, voice, samples, codes, spoken))
    if not sentences:
        raise InputError(f"{rows} has no rows")
    return sentences


def make_copies(folder: Path, sentences: Sequence[Sentence], seed: int) -> Sounds:
    """What a checkpoint's Token2Wav makes of the codes of recordings, in their voices.

    Raises:
      CheckpointError: if it has no Token2Wav, or no voices.
      InputError: if a row has no codes, or the checkpoint not its voice.
    """
    voices = load_voices(folder)
    missing = {sentence.voice for sentence in sentences} - set(voices)
    if missing:
        raise InputError(f"{folder} has no voice {', '.join(sorted(missing))}; it has {', '.join(voices)}")
    params = store.load(folder, ["token2wav"])["token2wav"]
    config = OmniConfig.load(folder).token2wav_config
    engine = Token2WavEngine(Token2Wav(config), params, solver=Solver.load(folder))
    samples = []
    seconds = {"DiT": 0.0, "vocoder": 0.0}
    for number, sentence in enumerate(track(sentences, description="copying", console=Console(stderr=True))):
        if sentence.codes is None:
            raise InputError(f"{sentence.spoken.name} has no codec_ids; tools/make_codes.py adds them")
        voice = voices[sentence.voice]
        started = time.perf_counter()
        # rounded up to few lengths, so that few programs are compiled
        (mel,) = engine.make_mels([sentence.codes], [voice], [None], [make_seed(seed, number, 0)], _NUM_BLOCKS)
        solved = time.perf_counter()
        (sound,) = engine.vocode([mel])
        # the first sentences compile, so they are not timed
        if number >= len(sentences) // 2:
            seconds["DiT"] += solved - started
            seconds["vocoder"] += time.perf_counter() - solved
        samples.append(sound)
    return Sounds(samples, SAMPLE_RATE, seconds)


def speak(model: OmniModel, sentences: Sequence[Sentence], options: Options, voice: Any = None) -> Sounds:
    """What the model speaks; in the sentences' voices, or all in one."""
    samples: list[np.ndarray] = []
    num_unended = 0
    starts = range(0, len(sentences), _TEXTS_PER_CALL)
    for start in track(starts, description="speaking", console=Console(stderr=True)):
        batch = sentences[start : start + _TEXTS_PER_CALL]
        requests = []
        for number, sentence in enumerate(batch, start):
            seed = make_seed(options.seed, number, 1)
            talker: dict[str, Any] = {"max_tokens": options.max_codes, "seed": seed}
            if options.temperature is not None:
                talker["temperature"] = options.temperature
            requests.append(
                Request.create(
                    modalities=("text", "audio"),
                    reply_text=sentence.text,
                    voice=voice or sentence.voice,
                    talker=talker,
                    noise_seed=seed,
                )
            )
        for reply in speak_texts(model, [sentence.spoken for sentence in batch], requests):
            num_unended += len(reply.codec_ids) >= options.max_codes
            samples.append(np.zeros(0, np.float32) if reply.audio is None else reply.audio)
    return Sounds(samples, SAMPLE_RATE, num_unended=num_unended)


class Judges:
    """What tells words and voices.

    Attributes:
      names: of the judges, with versions and hashes.
    """

    def __init__(self, sentences: Sequence[Sentence], voice_rows: str, limit: int) -> None:
        """Loads them, and takes the vector of each voice.

        Raises:
          InputError, JudgeError: if one is not installed, or cannot be used with these words.
        """
        words: set[str] = set()
        for sentence in sentences:
            words.update(split_words(sentence.text))
        self._recognizers: dict[str, Recognizer] = {
            "whisper": make_recognizer("whisper"),
            "pocketsphinx_closed": CheckedRecognizer(SphinxRecognizer(words=sorted(words))),
        }
        self._speakers = SpeakerJudge()
        self._quality = QualityJudge()
        self.names = [judge.name for judge in (*self._recognizers.values(), self._speakers, self._quality)]
        vectors: dict[str, list[np.ndarray]] = {}
        for sentence in read_sentences(voice_rows, Path(voice_rows), limit):
            vectors.setdefault(sentence.voice, []).append(self._speakers.embed(sentence.samples, RATE))
        self.voices = {voice: np.mean(of_voice, axis=0) for voice, of_voice in vectors.items()}

    def embed(self, samples: np.ndarray, rate: int) -> np.ndarray:
        return self._speakers.embed(samples, rate)

    def judge(self, sentences: Sequence[Sentence], sounds: Sounds, kind: Kind) -> dict[str, Any]:
        """Word errors, how clean the sounds are, and how many are nearer to their own voice than to any other."""
        report: dict[str, Any] = {"sentences": len(sentences)}
        texts: dict[str, list[str]] = {name: [] for name in self._recognizers}
        for samples in track(sounds.samples, description=f"judging {kind}", console=Console(stderr=True)):
            for name, recognizer in self._recognizers.items():
                # of what was not spoken nothing is recognised
                texts[name].append(recognizer.transcribe(samples, sounds.rate).text if len(samples) else "")
        expected = [sentence.text for sentence in sentences]
        for name, found in texts.items():
            errors = count_word_errors(expected, found)
            report[name] = {"word_errors": errors.rate, "interval": errors.interval, "words": errors.words}
        report["recognized"] = texts["whisper"]
        report["word_times"] = _time_words(expected, texts["whisper"], sounds)
        scores = [self._quality.rate(samples, sounds.rate).overall for samples in sounds.samples if len(samples)]
        # of none there is no mean
        report["dnsmos"] = float(np.mean(scores)) if scores else None
        if kind != "cloned":
            report |= self._count_own_voices(sentences, sounds)
        return report

    def _count_own_voices(self, sentences: Sequence[Sentence], sounds: Sounds) -> dict[str, Any]:
        count = 0
        own: list[float] = []
        for sentence, samples in zip(sentences, sounds.samples, strict=True):
            try:
                vector = self.embed(samples, sounds.rate)
            except JudgeError:
                continue  # too little speech in it; it is nobody's voice
            similarities = {voice: cosine(vector, other) for voice, other in self.voices.items()}
            count += max(similarities, key=lambda voice: similarities[voice]) == sentence.voice
            own.append(similarities[sentence.voice])
        return {"own_voice": count / len(sentences), "similarity": float(np.mean(own)) if own else None}

    def compare_clip(self, sounds: Sounds, clip: np.ndarray) -> dict[str, float]:
        """Mean similarity of sounds to the voice of a clip, and to each voice of the rows."""
        voices = {"clip": self.embed(clip, RATE), **self.voices}
        found: dict[str, list[float]] = {name: [] for name in voices}
        for samples in sounds.samples:
            try:
                vector = self.embed(samples, sounds.rate)
            except JudgeError:
                continue  # too little speech in it
            for name, other in voices.items():
                found[name].append(cosine(vector, other))
        return {name: float(np.mean(values)) for name, values in found.items() if values}


def _time_words(expected: Sequence[str], recognized: Sequence[str], sounds: Sounds) -> dict[str, Any]:
    """Errors of times of words: of all sentences, and of those that are recognised as they should be."""
    spoken = [number for number, samples in enumerate(sounds.samples) if len(samples)]
    right = [number for number in spoken if not count_word_errors([expected[number]], [recognized[number]]).rate]
    report: dict[str, Any] = {}
    for name, numbers in (("all", spoken), ("right", right)):
        of_part = [sounds.samples[number] for number in numbers]
        errors = measure_word_times([expected[number] for number in numbers], of_part, sounds.rate)
        report[name] = None if errors is None else dataclasses.asdict(errors)
    return report


def mel_error(sentences: Sequence[Sentence], sounds: Sounds) -> float:
    """Mean absolute difference of the log-mel of Token2Wav from that of the recordings, in nats."""
    errors = []
    for sentence, samples in zip(sentences, sounds.samples, strict=True):
        wanted = speech_log_mel(sentence.samples)
        found = speech_log_mel(resample(samples, sounds.rate, RATE))
        length = min(len(wanted), len(found))
        errors.append(np.abs(wanted[:length] - found[:length]).mean())
    return float(np.mean(errors))


def write_sounds(folder: Path, sounds: Sounds) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for number, samples in enumerate(sounds.samples):
        with wave.open(str(folder / f"{number:04d}.wav"), "wb") as file:
            file.setparams((1, 2, sounds.rate, 0, "NONE", ""))
            file.writeframes((32767 * np.clip(samples, -1, 1)).astype("<i2").tobytes())


def draw(path: Path, sentences: Sequence[Sentence], found: Mapping[str, Sounds]) -> None:
    """Spectrograms of some sentences, a column each, a row for each kind."""
    from matplotlib import pyplot

    # one of each voice, as far as they go
    firsts: dict[str, int] = {}
    for number, sentence in enumerate(sentences):
        firsts.setdefault(sentence.voice, number)
    numbers = list(firsts.values())[:_NUM_PICTURES]
    figure, axes = pyplot.subplots(
        len(found), len(numbers), figsize=(5 * len(numbers), 2.2 * len(found)), layout="constrained", squeeze=False
    )
    for line, (kind, sounds) in zip(axes, found.items(), strict=True):
        for place, number in zip(line, numbers, strict=True):
            samples = resample(sounds.samples[number], sounds.rate, RATE)
            place.set(title=f"{kind}: {sentences[number].voice}", ylabel="mel bin")
            if len(samples) < RATE // 10:
                continue
            mel = speech_log_mel(samples)
            extent = (0, len(mel) / 100, 0, mel.shape[1])
            place.imshow(mel.T, origin="lower", aspect="auto", extent=extent, vmin=-10, vmax=2)
    for place in axes[-1]:
        place.set_xlabel("seconds")
    figure.savefig(path, dpi=80)
    pyplot.close(figure)


def measure(options: Options) -> dict[str, Any]:
    """Makes the sounds and judges them.

    Raises:
      CheckpointError, ConfigError, InputError: if something that was named cannot be used.
      JudgeError: if a judge fails.
    """
    check_int("--sentences", options.sentences, 1)
    if options.out.exists():
        raise InputError(f"{options.out} exists already; name another folder")
    if "cloned" in options.kinds and (options.clip is None or options.clip_text is None):
        raise InputError("cloned needs --clip and --clip-text")
    sentences = read_sentences(options.rows, options.out, options.sentences)
    judges = Judges(sentences, options.voice_rows, options.sentences)
    folder = resolve_checkpoint(options.model)
    model = omni_jax.load(folder) if {"spoken", "cloned"} & set(options.kinds) else None
    report: dict[str, Any] = {"model": str(options.model), "judges": judges.names}
    found: dict[str, Sounds] = {}
    for kind in options.kinds:
        if kind == "source":
            sounds = Sounds([sentence.samples for sentence in sentences], RATE)
        elif kind == "copy":
            sounds = make_copies(folder, sentences, options.seed)
        else:
            assert model is not None
            voice = {"ref_audio": options.clip, "ref_text": options.clip_text} if kind == "cloned" else None
            sounds = speak(model, sentences, options, voice)
        found[kind] = sounds
        write_sounds(options.out / kind, sounds)
        report[kind] = judges.judge(sentences, sounds, kind)
        if kind == "copy":
            report[kind]["mel_error"] = mel_error(sentences, sounds)
            report[kind]["seconds"] = sounds.seconds
            timed = sounds.samples[len(sentences) // 2 :]
            report[kind]["seconds_of_sound"] = sum(map(len, timed)) / sounds.rate
        if kind in ("spoken", "cloned"):
            report[kind]["not_ended"] = sounds.num_unended
        if kind == "cloned":
            assert options.clip is not None
            report[kind]["similarity_to"] = judges.compare_clip(sounds, read_clip(options.clip).samples)
        print(describe(kind, report[kind]), flush=True)
    draw(options.out / "spectrograms.png", sentences, found)
    replace_file(options.out / "report.json", (json.dumps(report, indent=2) + "\n").encode())
    return report


def describe(kind: str, report: Mapping[str, Any]) -> str:
    """A line of the most important figures."""
    parts = [f"{kind}: {report['sentences']} sentences"]
    for name, label in (("whisper", "Whisper"), ("pocketsphinx_closed", "pocketsphinx, closed grammar,")):
        low, high = report[name]["interval"]
        parts.append(f"{label} {report[name]['word_errors']:.1%} word errors ({low:.1%} to {high:.1%})")
    if report["dnsmos"] is not None:
        parts.append(f"DNSMOS {report['dnsmos']:.2f}")
    if "own_voice" in report:
        parts.append(f"own voice {report['own_voice']:.1%}")
    for name, errors in report["word_times"].items():
        if errors is not None:
            parts.append(f"word times of {name} off by {1000 * errors['median']:.0f} ms (median)")
    if "mel_error" in report:
        parts.append(f"mel error {report['mel_error']:.3f} nats")
    if "not_ended" in report:
        parts.append(f"{report['not_ended']} did not end")
    return "; ".join(parts)


def main(options: Options) -> None:
    with exit_on_error():
        measure(options)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))

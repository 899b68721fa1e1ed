"""What each objective can be told: the options of a recipe that are of one loss alone."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, TypeAlias

import tyro

from omni_jax.checks import check_float, check_int
from omni_jax.errors import InputError
from omni_jax.models.ode_solver import MAX_STEPS
from omni_jax.speaker_verifier_config import SpeakerVerifierConfig
from omni_jax.speech_tokenizer_config import SpeechTokenizerConfig

FLOAT_MAX = 3e38  # of float32


@dataclass(frozen=True)
class NextTokenOptions:
    """Cross-entropy of the next token."""

    chunk: int = 1024
    """Positions of a row whose logits exist at a time."""
    z_loss: float = 0.0
    """Factor of log(sum(exp(logits)))^2, which is added to the loss."""

    def check(self) -> None:
        """Raises InputError if a field is out of its range."""
        check_int("objective.chunk", self.chunk, 1)
        check_float("objective.z_loss", self.z_loss, 0, FLOAT_MAX)


@dataclass(frozen=True)
class BagOfWordsOptions:
    """Cross-entropy of answers as bags of words, by the features of their media; no decoder runs."""

    def check(self) -> None:
        """There is nothing to be out of its range."""


@dataclass(frozen=True)
class PackedSpeechOptions:
    """Rows of codes and sound, of which several are packed into one of the batch."""

    utterances: int = 16
    """In a row of the batch, at most."""
    clip_frames: int = 512
    """Mel frames, 100 a second, of a clip of a voice, at most."""
    max_clip: float = 0.3
    """Share of an utterance that stands for its voice's clip, at most."""
    codec: str | None = None
    """Fingerprint of the codec that the codes of all rows must be of; without it, that of the checkpoint's speech
    tokenizer, and where it has none, they may be of any."""

    def check(self) -> None:
        """Raises InputError if a field is out of its range."""
        check_int("objective.utterances", self.utterances, 1)
        check_int("objective.clip_frames", self.clip_frames, 16)
        # more than half could leave a short utterance without any frame that has a loss
        check_float("objective.max_clip", self.max_clip, 0, 0.5)


@dataclass(frozen=True)
class FlowMatchingOptions(PackedSpeechOptions):
    """The velocity of Token2Wav's flow from noise to the mel of codes. What stands for the voice's clip has no loss."""

    drop_sound: float = 0.3
    """Share of the utterances that have codes, and neither a clip nor the vector of a voice."""
    drop_all: float = 0.2
    """Share of the utterances that have no codes either, which is what guidance subtracts."""

    def check(self) -> None:
        """Raises InputError if a field is out of its range."""
        super().check()
        check_float("objective.drop_sound", self.drop_sound, 0, 1)
        check_float("objective.drop_all", self.drop_all, 0, 1)


@dataclass(frozen=True)
class FlowDistillationOptions(PackedSpeechOptions):
    """Token2Wav's flow in fewer evaluations of its DiT. The DiT that the run begins from is the teacher."""

    steps: int = 4
    """Evaluations that mel is made in, by Euler's rule. 0: as many as any solver takes; guidance alone is distilled, so
    that each is one of the network and not two."""
    teacher_steps: int = 2
    """Of the published rule, through each step of the student's."""

    def check(self) -> None:
        """Raises InputError if a field is out of its range."""
        super().check()
        check_int("objective.steps", self.steps, 0, MAX_STEPS, hint="0: guidance alone")
        check_int("objective.teacher_steps", self.teacher_steps, 1, MAX_STEPS)


@dataclass(frozen=True)
class TalkerOptions:
    """Cross-entropy of the Talker's next code, and of the Thinker's next token beside it."""

    positions: int = 8192
    """Of a row of the Talker: of each utterance the tokens of the prompt, two more, and a code each 20 ms."""
    utterances: int = 32
    """In a row of the Talker, at most."""
    chunk: int = 1024
    """Positions of a row whose logits exist at a time."""
    code_weight: float = 1.0
    """Factor of the loss of the codes."""
    text_weight: float = 0.0
    """Factor of the loss of the text, which is the Thinker's of the same rows; 0: it is not computed. It changes
    nothing but what trains of the Thinker."""
    code_dropout: float = 0.0
    """Share of the codes that the Talker reads whose embedding is left out in a step of training, never in inference or
    evaluation. The more of them, the less the next code follows from those before it, and the more from the text: word
    dropout (https://arxiv.org/abs/1511.06349, section 3.1) of codes."""
    codec: str | None = None
    """Fingerprint of the codec that the codes of all rows must be of; without it, that of the checkpoint's speech
    tokenizer, and where it has none, they may be of any."""
    voices: dict[str, int] = field(default_factory=dict)
    """New voices: names that rows have, and the token of the Thinker's vocabulary that speech in each begins with. The
    embeddings of these tokens train where a phase has thinker/decoder/embed/embedding."""

    def check(self) -> None:
        """Raises InputError if a field is out of its range."""
        check_int("objective.positions", self.positions, 4)
        check_int("objective.utterances", self.utterances, 1)
        check_int("objective.chunk", self.chunk, 1)
        check_float("objective.code_weight", self.code_weight, 0, FLOAT_MAX)
        check_float("objective.text_weight", self.text_weight, 0, FLOAT_MAX)
        check_float("objective.code_dropout", self.code_dropout, 0, 1)
        check_voices(self.voices)


@dataclass(frozen=True)
class TalkerDPOOptions:
    """Preferences between two spoken answers (DPO)."""

    beta: float = 0.1
    """What the difference of the log-ratios is multiplied by: the larger, the nearer the reference."""
    max_length_gap: float = 0.5
    """How many more codes the longer answer of a pair may have, as a share of the shorter one's; else it is no pair."""
    anchor_weight: float = 0.0
    """Factor of the cross-entropy of the better answers' codes, which is added to the loss."""
    positions: int = 8192
    """Of a row of the Talker: of each answer the tokens of the prompt, two more, and a code each 20 ms."""
    pairs: int = 8
    """In a row of the Talker, at most."""
    chunk: int = 1024
    """Positions of a row whose logits exist at a time."""
    codec: str | None = None
    """Fingerprint of the codec that the codes of all rows must be of; without it, that of the checkpoint's speech
    tokenizer, and where it has none, they may be of any."""
    voices: dict[str, int] = field(default_factory=dict)
    """Voices that rows have and the checkpoint has not: names, and the token that speech in each begins with."""

    @property
    def utterances(self) -> int:
        return 2 * self.pairs

    def check(self) -> None:
        """Raises InputError if a field is out of its range."""
        check_float("objective.beta", self.beta, 0, FLOAT_MAX, above=True)
        check_float("objective.max_length_gap", self.max_length_gap, 0, FLOAT_MAX)
        check_float("objective.anchor_weight", self.anchor_weight, 0, FLOAT_MAX)
        check_int("objective.positions", self.positions, 4)
        check_int("objective.pairs", self.pairs, 1)
        check_int("objective.chunk", self.chunk, 1)
        check_voices(self.voices)


def check_voices(voices: dict[str, int]) -> None:
    """Raises InputError for a token that is none."""
    for name, token in voices.items():
        check_int(f"objective.voices, the token of {name!r}", token, 0)


def check_block_codes(block_codes: int | None) -> None:
    """Raises InputError for blocks that a tokenizer cannot have: its output is of pairs of positions."""
    if block_codes is None:
        return
    check_int("objective.block_codes", block_codes, 2)
    if block_codes % 2:
        raise InputError(f"objective.block_codes is {block_codes}; it must be an even number")


@dataclass(frozen=True)
class SpeechTokenizerOptions:
    """Codes that keep what is said and how it sounds."""

    model: Annotated[SpeechTokenizerConfig, tyro.conf.Suppress] = field(default_factory=SpeechTokenizerConfig)
    """Its shape."""
    block_codes: int | None = None
    """Codes of a block, 50 a second, an even number. None: as the recipe's size has it, 100 for the published ones. The
    codes of a sound that goes on come a block at a time."""
    utterances: int = 16
    """In a row of the batch, at most."""
    max_codes: int = 1500
    """Of an utterance, 50 a second, at most."""
    max_labels: int = 512
    """Bytes of an utterance's text, at most."""
    unquantized: float = 0.0
    """Share of the blocks whose vectors pass the quantizer unchanged while it trains, so that what is behind it learns
    before the codes say anything; from nothing a half is well."""
    codebook_decay: float = 0.99
    """Of the averages that the codebook follows from, in a step."""
    content_weight: float = 1.0
    """Factor of the loss of the text."""
    mel_weight: float = 1.0
    """Factor of the loss of the mel, in phases in which its decoder trains."""
    commitment_weight: float = 1.0
    """Factor of the distance of vectors from their codes."""
    thinker_weight: float = 0.0
    """Factor of the loss of a Thinker's next token, which writes down what the codes say; 0: there is no Thinker."""
    instruction: str = "Transcribe the audio into text."
    """What the Thinker is asked for behind each sound."""
    positions: int = 8192
    """Of a row of the Thinker: of each utterance a token for each 40 ms, the instruction, and the text."""

    def check(self) -> None:
        """Raises InputError if a field is out of its range."""
        check_block_codes(self.block_codes)
        check_int("objective.utterances", self.utterances, 1)
        check_int("objective.max_codes", self.max_codes, 1)
        check_int("objective.max_labels", self.max_labels, 1)
        check_float("objective.unquantized", self.unquantized, 0, 1)
        check_float("objective.codebook_decay", self.codebook_decay, 0, 1)
        check_float("objective.content_weight", self.content_weight, 0, FLOAT_MAX)
        check_float("objective.mel_weight", self.mel_weight, 0, FLOAT_MAX)
        check_float("objective.commitment_weight", self.commitment_weight, 0, FLOAT_MAX)
        check_float("objective.thinker_weight", self.thinker_weight, 0, FLOAT_MAX)
        check_int("objective.positions", self.positions, 2)


@dataclass(frozen=True)
class CodeMatchingOptions(PackedSpeechOptions):
    """Codes that a Token2Wav which stays as it is makes the sound of. What stands for the voice's clip has no loss."""

    model: Annotated[SpeechTokenizerConfig, tyro.conf.Suppress] = field(default_factory=SpeechTokenizerConfig)
    """Shape of the tokenizer."""
    block_codes: int | None = None
    """As of the recipe that the tokenizer was trained with before, if it was; see there."""
    drop_sound: float = 0.3
    """Share of the utterances that have neither a clip nor the vector of a voice."""
    flow_weight: float = 1.0
    """Factor of the loss of the DiT's velocity."""
    code_weight: float = 1.0
    """Factor of the cross-entropy of the codes that rows have."""
    commitment_weight: float = 1.0
    """Factor of the distance of vectors from their codes."""

    def check(self) -> None:
        """Raises InputError if a field is out of its range."""
        super().check()
        check_block_codes(self.block_codes)
        check_float("objective.drop_sound", self.drop_sound, 0, 1)
        check_float("objective.flow_weight", self.flow_weight, 0, FLOAT_MAX)
        check_float("objective.code_weight", self.code_weight, 0, FLOAT_MAX)
        check_float("objective.commitment_weight", self.commitment_weight, 0, FLOAT_MAX)


@dataclass(frozen=True)
class VocoderOptions:
    """The sound of a mel, first by its spectra alone, then against discriminators too."""

    context: int = 34
    """Mel frames on either side of a segment that the vocoder reads, and that have no loss. The published vocoder's
    samples depend on 34 of them."""
    channels: int = 32
    """Of the first layer of each discriminator; 32 as published."""
    single_convs: bool = False
    """Compile each convolution of the vocoder and the discriminators by itself, not as matrix products. A step takes
    about half the time on a CPU; a TPU's compiler takes far longer."""
    mel_weight: float = 15.0
    """Factor of the error of the log-mel."""
    adversarial_weight: float = 1.0
    """Factor of what the discriminators say of the vocoder, in phases in which they train."""
    feature_weight: float = 2.0
    """Factor of the difference of what they see, in the same phases."""

    def check(self) -> None:
        """Raises InputError if a field is out of its range."""
        check_int("objective.context", self.context, 0)
        check_int("objective.channels", self.channels, 1)
        check_float("objective.mel_weight", self.mel_weight, 0, FLOAT_MAX)
        check_float("objective.adversarial_weight", self.adversarial_weight, 0, FLOAT_MAX)
        check_float("objective.feature_weight", self.feature_weight, 0, FLOAT_MAX)


@dataclass(frozen=True)
class SpeakerVerifierOptions:
    """Vectors of speakers, told from each other with an additive angular margin."""

    model: Annotated[SpeakerVerifierConfig, tyro.conf.Suppress] = field(default_factory=SpeakerVerifierConfig)
    """Its shape."""
    speakers: tuple[str, ...] = ()
    """Names of the voices that rows have; their number is part of the shape."""
    perturbations: int = 6
    """How many further speakers are made of each by moving pitch and formants; 0: none."""
    margin: float = 0.2
    """Radians that the angle to the own speaker counts as larger."""
    scale: float = 30.0
    """Of the logits."""

    def check(self) -> None:
        """Raises InputError if a field is out of its range."""
        check_int("objective.perturbations", self.perturbations, 0)
        check_float("objective.margin", self.margin, 0, 1.5)
        check_float("objective.scale", self.scale, 0, FLOAT_MAX, above=True)


ObjectiveOptions: TypeAlias = (
    NextTokenOptions
    | BagOfWordsOptions
    | FlowMatchingOptions
    | FlowDistillationOptions
    | TalkerOptions
    | TalkerDPOOptions
    | SpeechTokenizerOptions
    | VocoderOptions
    | CodeMatchingOptions
    | SpeakerVerifierOptions
)

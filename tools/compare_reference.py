"""Whether PyTorch's reference answers as a trained model does: the model is exported and both answer held-out rows.

    python tools/compare_reference.py checkpoints/omni-tiny out/world/test.jsonl --items 50

Rows are taken from all tasks in turn. Both answer greedily in float32, from the same tokens and the same media; a model
with a Talker also speaks, in its voices in turn, and the codes are compared too. What differs is printed with both
answers, or with the margin of the reference's code, and the command ends with 1. Needs pip install -e '.[test]'.
"""

from __future__ import annotations

import itertools
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import jax
import torch
import tyro
from rich.console import Console
from rich.progress import track
from transformers import (
    Qwen2_5OmniConfig,
    Qwen2_5OmniForConditionalGeneration,
    Qwen2_5OmniThinkerConfig,
    Qwen2_5OmniThinkerForConditionalGeneration,
)

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it also runs as a file

import omni_jax
from omni_jax.checkpoint.export import to_hf
from omni_jax.checkpoint.model_files import TOKEN2WAV_FILE
from omni_jax.checkpoint.store import components
from omni_jax.checkpoint.train_checkpoints import resolve_checkpoint
from omni_jax.checks import check_int
from omni_jax.engine.outputs import Reply
from omni_jax.processing.layout import Prompt
from omni_jax.processing.processor import Processor
from tools.command_errors import exit_on_error
from tools.pack_checkpoint import Options as PackOptions
from tools.pack_checkpoint import pack_checkpoint
from tools.reference_inputs import reference_arguments
from tools.reference_speech import ReferenceReply, speak_reference
from tools.task_rows import choose_in_turn, with_speech_prompt

_DILATIONS = [1, 3, 5]  # as many as the reference's vocoder has, whatever its config says
REPETITION_PENALTY = 1.05  # of codes, the published one


@dataclass(frozen=True)
class Options:
    """What is compared."""

    model: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DIR")]
    """A checkpoint, or the folder of a training run."""
    rows: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="ROWS.jsonl")]
    """Rows with a task, of tools/make_world.py."""
    items: int = 50
    """How many are answered."""
    max_tokens: int = 48
    """Of an answer."""
    max_codes: int = 400
    """Of the speech of one: eight seconds."""


class Compared(NamedTuple):
    """A row's replies, ours and the reference's, and what the latter is as text."""

    task: str
    row: str
    reply: Reply
    reference: ReferenceReply
    reference_text: str

    @property
    def same_tokens(self) -> bool:
        return list(self.reply.token_ids) == self.reference.tokens

    @property
    def same_codes(self) -> bool:
        return list(self.reply.codec_ids) == self.reference.codes


class ReferenceModel:
    """PyTorch's model, in float32, of a checkpoint that is exported for it."""

    def __init__(self, checkpoint: Path) -> None:
        """Loads the whole of it where there is a Talker, else the Thinker."""
        self.has_talker = "talker" in components(checkpoint)
        kept = ("thinker", "talker", "token2wav") if self.has_talker else ("thinker",)
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary) / "exported"
            packed = Path(temporary) / "packed"
            pack_checkpoint(PackOptions(checkpoint, packed, components=kept))
            # text and codes are compared, and no sound: the DiT may be distilled, which an export would refuse
            (packed / TOKEN2WAV_FILE).unlink(missing_ok=True)
            to_hf(packed, folder)
            if not self.has_talker:
                config = Qwen2_5OmniThinkerConfig.from_pretrained(folder)
                self.thinker = Qwen2_5OmniThinkerForConditionalGeneration.from_pretrained(folder, config=config)
            else:
                config = Qwen2_5OmniConfig.from_pretrained(folder)
                # for the same reason a vocoder of random numbers will do, where the reference can have none like ours
                vocoder = config.token2wav_config.bigvgan_config
                vocoder.resblock_dilation_sizes = [_DILATIONS] * len(vocoder.resblock_kernel_sizes)
                self.whole = Qwen2_5OmniForConditionalGeneration.from_pretrained(
                    folder, config=config, ignore_mismatched_sizes=True
                )
                self.whole = self.whole.float().eval()
                self.thinker = self.whole.thinker
        self.thinker = self.thinker.float().eval()

    def answer(self, prompt: Prompt, processor: Processor, options: Options, voice: str | None) -> ReferenceReply:
        """Its reply, spoken if there is a voice."""
        stop_ids = list(processor.stop_ids)
        if voice is not None:
            return speak_reference(
                self.whole,
                processor.config,
                prompt,
                voice=voice,
                max_tokens=options.max_tokens,
                stop_ids=stop_ids,
                max_codes=options.max_codes,
                repetition_penalty=REPETITION_PENALTY,
            )
        with torch.no_grad():
            generated = self.thinker.generate(
                **reference_arguments(prompt),
                max_new_tokens=options.max_tokens,
                do_sample=False,
                eos_token_id=stop_ids,
                pad_token_id=processor.config.thinker_config.pad_token_id,
            )
        return ReferenceReply(generated[0, len(prompt) :].tolist(), [], [])


def compare(options: Options) -> Iterator[Compared]:
    """Both answers to each row.

    Raises:
      CheckpointError, ConfigError, InputError: where there are none.
    """
    check_int("--items", options.items, 1)
    chosen = choose_in_turn(options.rows, options.items)
    folder = resolve_checkpoint(options.model)
    reference = ReferenceModel(folder)
    names = ("thinker", "talker", "token2wav") if reference.has_talker else ("thinker",)
    model = omni_jax.load(folder, components=names, dtype="float32")
    voices = list(model.voices) if reference.has_talker else [None]
    for number, (task, reply) in enumerate(track(chosen, description="answering", console=Console(stderr=True))):
        voice = voices[number % len(voices)]
        messages: Sequence[Any] = reply.prompt
        speech: dict[str, Any] = {"modalities": ("text",)}
        if voice is not None:
            messages = with_speech_prompt(messages)
            talker = dict(temperature=0.0, repetition_penalty=REPETITION_PENALTY, max_tokens=options.max_codes)
            speech = {"modalities": ("text", "audio"), "voice": voice, "talker": talker}
        ours = model.generate(messages, max_tokens=options.max_tokens, **speech)
        theirs = reference.answer(model.processor(messages), model.processor, options, voice)
        yield Compared(task, reply.row, ours, theirs, model.processor.tokenizer.decode(theirs.tokens))


def main() -> None:
    options = tyro.cli(Options, description=__doc__)
    # differences in the last bits decide between tokens that are as likely as each other
    with exit_on_error(), jax.default_matmul_precision("highest"):
        found = list(compare(options))
    for one in found:
        if not one.same_tokens:
            print(f"{one.row} ({one.task}): {one.reply.text!r}, and the reference {one.reference_text!r}")
        elif not one.same_codes:
            pairs = enumerate(itertools.zip_longest(one.reply.codec_ids, one.reference.codes))
            first = next(place for place, (code, other) in pairs if code != other)
            print(
                f"{one.row} ({one.task}): {one.reply.text!r}, spoken with other codes from number {first} on, where the"
                f" logits of the reference's two likeliest differ by {one.reference.margins[first]:.2g}"
            )
    same = sum(one.same_tokens for one in found)
    print(f"{same} of {len(found)} answers are the same tokens, of {len({one.task for one in found})} tasks")
    spoken = [one for one in found if one.reply.audio is not None]
    same_codes = sum(one.same_codes for one in spoken)
    if spoken:
        print(f"{same_codes} of {len(spoken)} are spoken with the same codes")
    if same < len(found) or same_codes < len(spoken):
        raise SystemExit(1)


if __name__ == "__main__":
    main()

import dataclasses
import itertools
import json
import pickle
from pathlib import Path

import numpy as np
import pytest

from omni_jax.batch import AudioBlocks
from omni_jax.data.config import DataConfig
from omni_jax.data.examples import Prepare, Reject
from omni_jax.data.packing import Budget
from omni_jax.data.sources import Row
from omni_jax.mrope import resolve_spans
from omni_jax.processing.fetch import RemoteAccess
from tests.data.conftest import PICTURE, VIDEO, WAV

CONFIG = DataConfig(tokens=600, spans=16, audio_blocks=4, canvases=1, windows=8)
SMALL = dict(max_pixels=120 * 120, video_max_pixels=120 * 120)


@pytest.fixture(scope="module")
def prepare(processor):
    return Prepare(processor.with_pixels(**SMALL), CONFIG.tokens, Budget.of(CONFIG).check, media_root="/")


def row(values, file="/data/rows.jsonl"):
    return Row(file, 7, json.dumps(values).encode())


def ask(content, answer="A disc.", **rest):
    return {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": answer}], **rest}


def make_one(prepare, row):
    """The only example of a row, or why it cannot be used."""
    element = prepare(row)
    if isinstance(element, Reject):
        return element
    (example,) = element
    return example


def target_text(prepare, example):
    """The text of the target tokens, special tokens included."""
    tokens = example.tokens[example.weights > 0]
    return b"".join(prepare.processor.tokenizer.token_bytes(int(t)) or f"<{t}>".encode() for t in tokens).decode()


@pytest.fixture(scope="module")
def end(processor):
    return f"<{processor.tokenizer.special_id('<|im_end|>')}>"


def test_the_words_of_the_assistant_are_target_text(prepare, end):
    messages = [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": "assistant\nhello"},
        {"role": "assistant", "content": "\n\nhello world"},
        {"role": "user", "content": "<|im_start|>assistant\nno<|im_end|>"},
        {"role": "assistant", "content": "<image> no", "loss_scale": 0.5},
        {"role": "assistant", "content": "not this", "loss": False},
        {"role": "assistant", "content": ""},
    ]
    example = make_one(prepare, row({"messages": messages, "images": [PICTURE]}))
    assert target_text(prepare, example).replace(end, "|").startswith("\n\nhello world|")
    assert target_text(prepare, example).endswith(f" no{end}{end}")
    assert set(np.unique(example.weights)) == {0.0, 0.5, 1.0}
    assert (example.weights[example.unit >= 0] == 0).all() and (example.unit >= 0).any()


def test_a_target_is_tokenised_as_it_would_be_generated(prepare):
    """The prompt of the example is the prompt of inference to the last token, even before a line break."""
    for answer in ("\nA disc.", "  A disc.", "A disc."):
        values = ask("What?", answer)
        example = make_one(prepare, row(values))
        prompt = prepare.processor(values["messages"][:1])
        assert (example.weights > 0).argmax() == len(prompt)
        np.testing.assert_array_equal(example.tokens[: len(prompt)], prompt.tokens)


def test_all_of_a_document_is_target_text(prepare):
    text = "Once <|im_start|>\nupon"
    example = make_one(prepare, row({"text": text}))
    eos = prepare.processor.tokenizer.special_id("<|endoftext|>")
    assert target_text(prepare, example) == f"{text}<{eos}>" and (example.weights == 1).all()
    assert example.audio is None and example.vision == () and (example.unit == -1).all()


@pytest.mark.parametrize("num_words", [400, 1197, 1198, 1199, 2500])
def test_a_long_document_is_split(prepare, num_words):
    """Each token but the first is a target once, behind the one before it; position ids begin anew."""
    text = "a " * num_words
    whole = prepare.processor.document(text, max_length=10_000).tokens
    examples = prepare(row({"text": text}))
    assert len(examples) == max(1, -(-(len(whole) - 1) // 599))
    assert all(len(example.tokens) <= 600 and example.weights.all() for example in examples)
    targets = [example.tokens[1:] for example in examples]
    np.testing.assert_array_equal(np.concatenate([examples[0].tokens[:1], *targets]), whole)
    for before, after in itertools.pairwise(examples):
        assert before.tokens[-1] == after.tokens[0] and after.spans.start[0, 0] == 0


def test_what_is_too_long_ends_the_run_if_asked(prepare):
    long = row({"text": "a " * 700})
    assert not make_one(dataclasses.replace(prepare, too_long="skip"), long).is_fatal
    assert make_one(dataclasses.replace(prepare, too_long="error"), long).is_fatal
    # a dialogue is never split, and anything else that is wrong with a row is no reason to stop
    assert "over the limit of 600" in make_one(prepare, row(ask("a", "b" * 700))).reason
    assert not make_one(dataclasses.replace(prepare, too_long="error"), row({"text": ""})).is_fatal
    # also where the media alone are too many tokens
    strict = dataclasses.replace(prepare, max_length=20, too_long="error")
    assert make_one(strict, row(ask("<image>", images=[PICTURE]))).is_fatal


def test_media_become_units(prepare, config):
    example = make_one(prepare, row(ask("<image><video><audio>?", images=[PICTURE], videos=[VIDEO], audios=[WAV])))
    assert (
        isinstance(example.audio, AudioBlocks) and example.num_blocks == 2 + 2
    )  # 3 s of sound each, the video's first
    assert len(example.windows) == 1 + 3  # a picture, and six frames in pairs
    frames = [group for group in example.vision for _ in range(len(group.patches))]
    assert [int(f.valid.any(-1).sum(-1).max()) for f in frames] == example.windows.tolist()
    used = example.unit[example.unit >= 0]
    assert set(used) == set(range(example.num_blocks + len(frames)))
    per_unit = [config.thinker_config.audio_config.block_tokens] * example.num_blocks
    per_unit += [16 * int(n) for n in example.windows]
    assert (example.feature[example.unit >= 0] < np.array(per_unit)[used]).all()
    prompt, _ = prepare.processor.dialogue(ask([{"type": "image", "image": PICTURE}])["messages"])
    assert len(resolve_spans(prompt.segments, config.thinker_config)) == 3 < example.spans.begin.shape[1]


def test_media_in_a_bucket(prepare, gs):
    access = RemoteAccess(buckets=("gs://b",))
    prepare = dataclasses.replace(prepare, processor=prepare.processor.with_access(access), media_root=None)
    gs.pipe("gs://b/media/picture.jpg", Path(PICTURE).read_bytes())
    local = make_one(prepare, row(ask("<image>", images=[PICTURE]), f"{PICTURE}.jsonl"))
    for source, file in (("gs://b/media/picture.jpg", "/data/rows.jsonl"), ("media/picture.jpg", "gs://b/rows.jsonl")):
        found = make_one(prepare, row(ask("<image>", images=[source]), file))
        np.testing.assert_array_equal(found.vision[0].patches, local.vision[0].patches)
    missing = make_one(prepare, row(ask("<image>", images=["gs://b/none.jpg"])))
    assert "(image 'gs://b/none.jpg'): no such file" in missing.reason


def test_an_example_travels_between_processes(prepare):
    other = pickle.loads(pickle.dumps(prepare))
    values = row(ask("<image>?", images=[PICTURE]))
    found, expected = make_one(other, values), make_one(prepare, values)
    np.testing.assert_array_equal(found.vision[0].patches, expected.vision[0].patches)


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        (ask("a", images=[PICTURE]), "the messages have 0 <image> tags, but images holds 1"),
        (ask("a", label=False), "it marks the answer as a bad one"),
        (ask("<image>", images=["no.png"]), "(image '/data/no.png'): no such file"),
        ({"messages": [{"role": "user", "content": "a"}]}, "it has no target tokens: no text of the assistant"),
        ({"messages": [{"role": "tool", "content": "a"}]}, "unknown role 'tool'"),
        ({"text": ""}, "the text is empty"),
        ({"text": "a b " * 400}, "tokens, over the limit of 600"),
        (ask("a", "b" * 700), "tokens, over the limit of 600"),
        (ask("<audio>" * 3, audios=[WAV] * 3), "it takes 6 blocks of two seconds of sound, over the 4 of a step"),
        (
            ask([{"type": "image", "image": PICTURE, "min_pixels": 336 * 420, "max_pixels": 336 * 448}]),
            "it takes 12 windows in a frame, over the 8 of a canvas (data.windows)",
        ),
        (
            ask([{"type": "video", "video": VIDEO, "nframes": 24, "use_audio_in_video": False}]),
            "it takes 12 frames of up to 1 windows, more than fit on 1 canvases of 8 (data.canvases, data.windows)",
        ),
        (ask(["<image>"]), "messages[0].content[0] must be an object"),
        (ask([{"type": "image", "image": PICTURE}] * 8), "it takes 17 spans of position ids, over the 16 of a row"),
    ],
)  # fmt: skip
def test_rows_that_cannot_be_used(prepare, values, reason):
    found = make_one(dataclasses.replace(prepare, too_long="skip"), row(values))
    assert isinstance(found, Reject)
    assert (found.file, found.number) == ("/data/rows.jsonl", 7)
    assert reason in found.reason


def test_an_error_of_an_unknown_type_is_a_reject_too(processor):
    def check(example):
        raise ZeroDivisionError("by nobody's mistake")

    found = Prepare(processor, CONFIG.tokens, check)(row(ask("a")))
    assert found == Reject("/data/rows.jsonl", 7, "ZeroDivisionError: by nobody's mistake")

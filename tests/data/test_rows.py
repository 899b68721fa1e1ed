import json
import re

import pytest

from omni_jax.data.rows import Dialogue, Document, read_row
from omni_jax.data.sources import Row
from omni_jax.errors import InputError


def read(values, file="/data/rows.jsonl", **options):
    return read_row(Row(file, 1, json.dumps(values).encode()), **options)


def talk(*contents, **rest):
    """A dialogue whose user and assistant take turns."""
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[i % 2], "content": c} for i, c in enumerate(contents)], **rest}


def part(kind, source, **options):
    return {"type": kind, kind: source, **options}


def text(words):
    return {"type": "text", "text": words}


def test_tags_take_from_the_lists_in_order():
    row = talk(
        "<image><image>Which is <audio>?", "The first.", "And <video>now", "<image>",
        images=["a.png", "/b.png", "https://c/d.png"], audios=["e.wav"], videos=["f.mp4"],
    )  # fmt: skip
    dialogue = read(row)
    assert isinstance(dialogue, Dialogue)
    assert [m["content"] for m in dialogue.messages] == [
        [
            part("image", "/data/a.png"),
            part("image", "/b.png"),
            text("Which is "),
            part("audio", "/data/e.wav"),
            text("?"),
        ],
        "The first.",
        [text("And "), part("video", "/data/f.mp4"), text("now")],
        [part("image", "https://c/d.png")],
    ]  # fmt: skip
    assert [m["role"] for m in dialogue.messages] == ["user", "assistant"] * 2 and dialogue.weights == [1.0, 1.0]


def test_sharegpt():
    turns = [{"from": "human", "value": "<audio>What?"}, {"from": "gpt", "value": "Rain."}]
    expected = [
        {"role": "system", "content": "Listen."},
        {"role": "user", "content": [part("audio", "/data/a.wav"), text("What?")]},
        {"role": "assistant", "content": "Rain."},
    ]
    assert read({"conversations": turns, "system": "Listen.", "audios": ["a.wav"]}).messages == expected
    turns.insert(0, {"from": "system", "value": "Listen."})
    assert read({"conversations": turns, "audios": "a.wav", "id": 7}).messages == expected


def test_content_parts():
    content = [
        {"type": "image_url", "image_url": {"url": "a.png"}},
        {"type": "audio_url", "audio_url": "b.wav"},
        part("video", ["1.png", "2.png"], fps=2),
        {"type": "image"},  # without a source: from the list, as Hugging Face's trainers have it
        {"type": "video", "path": "c.mp4", "use_audio_in_video": None},
        text("<image> is a tag only in a plain text"),
    ]
    found = read(talk(content, "Yes.", images=["d.png"])).messages[0]["content"]
    assert found == [
        {"type": "image_url", "image_url": {"url": "/data/a.png"}},
        {"type": "audio_url", "audio_url": "/data/b.wav"},
        part("video", ["/data/1.png", "/data/2.png"], fps=2),
        part("image", "/data/d.png"),
        {"type": "video", "path": "/data/c.mp4"},
        text("<image> is a tag only in a plain text"),
    ]


def test_media_of_parquet_are_bytes_or_paths():
    images = [{"bytes": b"png", "path": "a.png"}, {"bytes": None, "path": "b.png"}]
    row = Row("gs://b/x/rows.parquet", 1, talk("<image><image>", "Yes.", images=images, audios=None))
    content = read_row(row).messages[0]["content"]
    assert content == [part("image", b"png"), part("image", "gs://b/x/b.png")]


def test_sound_of_videos():
    row = talk("<video><audio>What <video>is?", "Rain.", videos=["a.mp4", "b.mp4"], audios=["a.mp3"])
    assert [p["type"] for p in read(row).messages[0]["content"]] == ["video", "audio", "text", "video", "text"]
    always, never = (read(row, sound=s).messages[0]["content"] for s in ("always", "never"))
    videos = [part("video", f"/data/{name}.mp4", use_audio_in_video=True) for name in "ab"]
    assert always == [videos[0], text("What "), videos[1], text("is?")]
    assert [p.get("use_audio_in_video") for p in never] == [False, None, None, False, None]
    said = talk([part("video", "a.mp4", use_audio_in_video=True)], "Rain.")
    assert read(said, sound="never").messages[0]["content"][0]["use_audio_in_video"] is True


def test_weights_of_messages():
    messages = talk("a", "b", "c", "d", "e", "f")["messages"]
    messages[1]["loss"], messages[3]["loss_scale"] = False, 0.5
    dialogue = read({"messages": messages})
    assert dialogue.weights == [0.0, 0.5, 1.0] and all(m.keys() == {"role", "content"} for m in dialogue.messages)


def test_documents():
    assert read({"text": "Once <image>", "source": "a book", "images": []}) == Document("Once <image>")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (talk("<image>", "x"), "the messages have 1 <image> tags, but images holds 0"),
        (talk("<audio>", "x", audios=["a", "b"]), "the messages have 1 <audio> tags, but audios holds 2"),
        (talk("a", "x", video="a.mp4"), "the messages have 0 <video> tags, but videos holds 1"),
        (talk([{"type": "image"}], "x"), "the messages have 1 <image> tags, but images holds 0"),
        (talk("<image>", "x", image="a", images=["a"]), "a row has image or images, not both"),
        (talk("<image>", "x", images=[3]), "a medium must be a path, a URL or an object with bytes or a path, got 3"),
        ({"text": "a", "images": ["b"]}, "a row of text has no images; media belong in messages"),
        ({"text": 3}, "text must be a string, got int"),
        ({"prompt": "a"}, "a row has messages, conversations or text, and one of them; this has none"),
        ({"text": "a", "messages": []}, "and one of them; this has ['messages', 'text']"),
        ({"messages": "a"}, "messages must be a list of objects, got 'a'"),
        ({"messages": [{"role": "user"}]}, "messages[0] needs a role and a content, got the keys ['role']"),
        ({"conversations": [{"from": "tool", "value": "a"}]}, "conversations[0] must be from one of human, user, gpt"),
        (talk("a", "b", tools="[{}]"), "tools is not supported"),
        (talk("a", "b", objects={"bbox": [1]}), "objects is not supported"),
        ({"messages": [{"role": "assistant", "content": "a", "loss": 1}]}, "loss must be true or false"),
        ([1], "a row must be an object, got list"),
    ],
)  # fmt: skip
def test_rows_that_are_refused(row, message):
    with pytest.raises(InputError, match=re.escape(message)):
        read(row)


def test_a_line_that_is_not_json():
    with pytest.raises(InputError, match="not JSON: "):
        read_row(Row("rows.jsonl", 1, b'{"text": '))

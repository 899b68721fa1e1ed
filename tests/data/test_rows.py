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


def answer(**keys):
    return {"role": "assistant", "content": "a", **keys}


SHAREGPT = {"conversations": [{"from": "human", "value": "a"}]}


def test_tags_take_from_the_lists_in_order():
    row = talk(
        "<image><image>Which is <audio>?", "The first.", "And <video>now", "<image>",
        images=["a.png", "/b.png", "https://c/d.png"], audios=["e.wav"], videos=["f.mp4"],
    )  # fmt: skip
    dialogue = read(row, media_root="/")
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
    content = talk([part("video", "a.mp4", use_audio_in_video=True)], "Rain.")
    assert read(content, sound="never").messages[0]["content"][0]["use_audio_in_video"] is True


def test_weights_of_messages():
    keys = [{}, dict(loss=False), dict(loss_scale=0.5), dict(weight=0), dict(weight=1, loss_scale=2), dict(loss=True)]
    expected = [1.0, 0.0, 0.5, 0.0, 2.0, 1.0]
    dialogue = read({"messages": [answer(**some) for some in keys]})
    assert dialogue.weights == expected
    assert all(message.keys() == {"role", "content"} for message in dialogue.messages)
    sharegpt = [{"from": "gpt", "value": "a", **some} for some in keys]
    assert read({"conversations": sharegpt}).weights == expected


def test_documents():
    assert read({"text": "Once <image>", "source": "a book", "images": []}) == Document("Once <image>")


HTML = "Write a page with <video> and <audio>."


@pytest.mark.parametrize(
    ("content", "lists", "expected"),
    [
        (HTML, {}, HTML),
        (HTML, dict(videos=[], audios=""), HTML),
        ("<image>" + HTML, dict(images=["a.png"]), [part("image", "/data/a.png"), text(HTML)]),
        ("<image>a<image>", dict(images=["a.png"]), [part("image", "/data/a.png"), text("a<image>")]),
        ("<video><audio>", dict(videos=["a.mp4"]), [part("video", "/data/a.mp4"), text("<audio>")]),
        ("<Image> </image> <image/>", {}, "<Image> </image> <image/>"),
        ([text("<image>"), {"type": "image"}], dict(images=["a"]), [text("<image>"), part("image", "/data/a")]),
    ],
)
def test_a_tag_without_a_medium_is_text(content, lists, expected):
    assert read(talk(content, "Yes.", **lists)).messages[0]["content"] == expected


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("call-12:30.wav", "/data/call-12:30.wav"),
        ("a:b.png", "/data/a:b.png"),
        ("12:30.wav", "/data/12:30.wav"),
        ("C:\\media\\a.png", "/data/C:\\media\\a.png"),
        ("C:/media/a.png", "/data/C:/media/a.png"),
        ("../a.png", "/a.png"),
        ("file:///media/a.png", "/media/a.png"),
        ("FILE:/media/a.png", "/media/a.png"),
        ("data:image/png;base64,AA==", "data:image/png;base64,AA=="),
        ("https://a/b.png", "https://a/b.png"),
        ("gs://a/b.png", "gs://a/b.png"),
        ("s3://a/b.png", "s3://a/b.png"),  # an unknown kind of URL is an error of the processor, not a path
    ],
)
def test_paths_and_urls(source, expected):
    row = talk("<image>", "x", images=[source])
    assert read(row, media_root="/").messages[0]["content"] == [part("image", expected)]
    url = {"type": "image_url", "image_url": {"url": source}}
    assert read(talk([url], "x"), media_root="/").messages[0]["content"][0]["image_url"]["url"] == expected


@pytest.mark.parametrize(
    "keys",
    [
        dict(tools="[]"),
        dict(tools=" null "),
        dict(tools="", objects={}),
        dict(tools=[], objects={"ref": [], "bbox": [[]]}),
        dict(objects=[{"bbox": None}], chat_template_kwargs={}),
        dict(image="", videos=None, audios=[]),
        dict(images=[], image=""),
        dict(text="", conversations=[]),
        dict(system=""),
        dict(label=True),
        dict(label="cat", kto_tag=True),
        dict(label=None, kto_tag=None),
        dict(rejected_response="No.", chosen=None),  # the messages hold the better answer
        dict(chosen=True, channel="a", margin=0.5),
    ],
)
def test_keys_that_say_nothing_are_passed_over(keys):
    assert read({**talk("a", "b"), **keys}) == read(talk("a", "b"))


def test_null_fields_of_messages():
    messages = [{**message, "name": None, "tool_calls": None, "loss": None} for message in talk("a", "b")["messages"]]
    assert read({"messages": messages}) == read(talk("a", "b"))
    with pytest.raises(InputError, match=re.escape("messages[0] needs a role and a content, got the keys ['role']")):
        read({"messages": [{"role": "assistant", "content": None}]})


def test_half_a_surrogate_pair_becomes_a_replacement_character():
    expected = [{"role": "user", "content": [part("image", "/data/a.png"), text("a\ufffdb")]}]
    expected.append({"role": "assistant", "content": "\ufffd \U0001f600"})
    assert read(talk("<image>a\ud83db", "\ude00 \ud83d\ude00", images=["a.png"])).messages == expected
    assert read(talk([text("\ud83d")], "b")).messages[0]["content"] == [text("\ufffd")]
    assert read({"text": "\ud83d"}) == Document("\ufffd")


def test_a_byte_order_mark():
    line = b"\xef\xbb\xbf" + json.dumps(talk("a", "b")).encode()
    assert read_row(Row("rows.jsonl", 1, line)) == read(talk("a", "b"))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (talk("<audio>", "x", audios=["a", "b"]), "the messages have 1 <audio> tags, but audios holds 2"),
        (talk("a", "x", video="a.mp4"), "the messages have 0 <video> tags, but videos holds 1"),
        (talk([{"type": "image"}], "x"), 'a part {"type": "image"} without a source takes one of images, but none'),
        (talk("a", "x", images=["a", None]), "or an object with bytes or a path, got None"),
        (talk("<image>", "x", images=[{"bytes": None, "path": None}]), "with bytes or a path, got None"),
        (talk([{"type": "image_url", "image_url": {"url": 3}}], "x"), "a medium must be a path, a URL or an object"),
        (talk("<image>", "x", image="a", images=["a"]), "a row has image or images, not both"),
        (talk("<image>", "x", images=[3]), "a medium must be a path, a URL or an object with bytes or a path, got 3"),
        ({"text": "a", "images": ["b"]}, "a row of text has no images; media belong in messages"),
        ({"text": 3}, "text must be a string, got int"),
        ({"prompt": "a"}, "a row has messages, conversations or text, and one of them; this has none"),
        ({"text": "a", **talk("a", "b")}, "and one of them; this has ['messages', 'text']"),
        ({"messages": "a"}, "messages must be a list of objects, got 'a'"),
        ({"messages": [{"role": "user"}]}, "messages[0] needs a role and a content, got the keys ['role']"),
        ({"conversations": [{"from": "tool", "value": "a"}]}, "conversations[0] must be from one of human, user, gpt"),
        (talk("a", "b", tools='[{"name": "f"}]'), "tools is not supported"),
        (talk("a", "b", tools="f(x)"), "tools is not supported"),
        (talk("a", "b", chat_template_kwargs={"enable_thinking": False}), "chat_template_kwargs is not supported"),
        (talk("a", "b", label=False), "label is False: it marks the answer as a bad one, which training would teach"),
        (talk("a", "b", label=0), "leave out such rows, or the key label if it means something else"),
        (talk("a", "b", label=" False"), "label is ' False': it marks the answer as a bad one"),
        (talk("a", "b", kto_tag=False), "kto_tag is False: it marks the answer as a bad one"),
        ({**SHAREGPT, "chosen": {"from": "gpt", "value": "b"}, "rejected": {}}, "chosen is not supported"),
        (talk("a", "b", objects={"bbox": [1]}), "objects is not supported"),
        ({"messages": [answer(loss=1)]}, "messages[0]: loss must be true or false, got 1"),
        ({"messages": [answer(loss_scale=float("nan"))]}, "messages[0].loss_scale is nan; it must be at least 0"),
        ({"messages": [answer(loss_scale=float("inf"))]}, "messages[0].loss_scale is inf; it must be at least 0"),
        ({"messages": [answer(weight=-1)]}, "messages[0].weight is -1; it must be at least 0 and at most 10000"),
        ([1], "a row must be an object, got list"),
    ],
)  # fmt: skip
def test_rows_that_are_refused(row, message):
    with pytest.raises(InputError, match=re.escape(message)):
        read(row)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": ', "not JSON: "),
        (b'{"text": "\xff"}', "not JSON: "),
        (b'{"id": ' + b"9" * 5000 + b"}", "not JSON: "),
        (b'{"text": ' + b"[" * 100_000, "nested too deeply"),
    ],
)
def test_a_line_that_is_not_json(line, message):
    with pytest.raises(InputError, match=message):
        read_row(Row("rows.jsonl", 1, line))

import base64
import json
import re

import pytest

from omni_jax.errors import CheckpointError, InputError
from omni_jax.processing.chat import (
    LOW_DETAIL_PIXELS,
    SPEECH_SYSTEM_PROMPT,
    ChatTemplate,
    MediaPart,
    TextPart,
    parse_messages,
)

AUDIO = {"type": "audio", "audio": "a.wav"}
VIDEO = {"type": "video", "video": "a.mp4"}
PLACE = "messages[0].content[0]"


def image_url(value):
    return {"type": "image_url", "image_url": value}


def input_audio(value):
    return {"type": "input_audio", "input_audio": value}


def parse(*content):
    return parse_messages([{"role": "user", "content": list(content)}])[0].content


@pytest.mark.parametrize(
    ("part", "kind", "source", "options"),
    [
        ({"type": "image_url", "image_url": {"url": "a.png"}}, "image", "a.png", {}),
        ({"type": "image_url", "image_url": {"url": "a.png", "detail": "high"}}, "image", "a.png", {}),
        (
            {"type": "image_url", "image_url": {"url": "a.png", "detail": "low"}},
            "image",
            "a.png",
            {"max_pixels": LOW_DETAIL_PIXELS},
        ),
        ({"type": "image_url", "image_url": "a.png"}, "image", "a.png", {}),
        ({"type": "audio_url", "audio_url": {"url": "a.wav"}}, "audio", "a.wav", {}),
        ({"type": "video_url", "video_url": "a.mp4"}, "video", "a.mp4", {}),
        ({"type": "video_url", "video_url": {"url": "a.mp4"}, "fps": 1}, "video", "a.mp4", {"fps": 1}),
        ({"type": "image", "image": "a.png", "min_pixels": 9}, "image", "a.png", {"min_pixels": 9}),
        ({"type": "image", "url": "a.png"}, "image", "a.png", {}),
        ({"type": "audio", "path": "a.wav", "audio_start": 1.5}, "audio", "a.wav", {"audio_start": 1.5}),
        ({"type": "video", "video": ["a.png", "b.png"]}, "video", ["a.png", "b.png"], {}),
        (
            {"type": "video", "video": "a.mp4", "use_audio_in_video": "auto"},
            "video",
            "a.mp4",
            {"use_audio_in_video": "auto"},
        ),
        (
            {"type": "video", "video": "a.mp4", "use_audio_in_video": False},
            "video",
            "a.mp4",
            {"use_audio_in_video": False},
        ),
        ({"type": "video", "video": "a.mp4", "nframes": None, "fps": 2.5}, "video", "a.mp4", {"fps": 2.5}),
    ],
)
def test_media_parts(part, kind, source, options):
    assert parse({"type": "text", "text": "x"}, part) == (
        TextPart("x"),
        MediaPart(kind, source, "messages[0].content[1]", options),
    )


def test_input_audio_is_base64():
    data = base64.b64encode(b"RIFF").decode()
    part = {"type": "input_audio", "input_audio": {"data": data, "format": "wav"}}
    assert parse(part)[0] == MediaPart("audio", b"RIFF", "messages[0].content[0]")
    uri = {"type": "input_audio", "input_audio": {"data": f"data:audio/wav;base64,{data}", "format": "mp3"}}
    assert parse(uri)[0].source.startswith("data:")


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ("hello", f"{PLACE} must be an object with a type, got 'hello'"),
        (
            {"text": "x"},
            f"{PLACE}: unknown type None; known: text, image_url, input_audio, audio_url",
        ),
        ({"type": "picture"}, f"{PLACE}: unknown type 'picture'; known: text"),
        ({"type": ["text"]}, f"{PLACE}: unknown type ['text']; known: text"),
        ({"type": "text"}, f"{PLACE}: text must be a string, got None"),
        ({"type": "text", "text": "x", "cache": 1}, f"{PLACE}: unknown key 'cache' (value 1); known: type, text"),
        ({"type": "image"}, f"{PLACE}: give the image once, under image or url or path; given: nothing"),
        ({"type": "image", "image": "a", "url": "b"}, f"{PLACE}: give the image once"),
        (
            {"type": "image", "image": "a", "fps": 1},
            f"{PLACE}: unknown key 'fps' (value 1); known: type, image",
        ),
        (image_url({"uri": "a"}), f"{PLACE}.image_url: unknown key 'uri'"),
        (image_url(3), f"{PLACE}.image_url must be a URL or an object with a url, got 3"),
        (
            image_url({"url": "a", "detail": "fine"}),
            "unknown detail 'fine'; known: auto, low, high",
        ),
        (
            input_audio("x"),
            f"{PLACE}.input_audio must be an object with data, format, got 'x'",
        ),
        (
            input_audio({"data": "*", "format": "wav"}),
            f"{PLACE}.input_audio.data is not base64",
        ),
        (
            input_audio({"data": "", "format": "mid"}),
            "unknown format 'mid'; known: wav, mp3",
        ),
        (input_audio({"data": 5}), "data must be base64, got 5"),
        ({**VIDEO, "fps": 0}, f"{PLACE}: fps is 0; it must be above 0 and at most 1000"),
        ({**VIDEO, "fps": "2"}, "fps is '2'; it must be a number above 0"),
        ({**VIDEO, "fps": float("nan")}, "fps is nan; it must be above 0"),
        ({**VIDEO, "nframes": 2.5}, "nframes is 2.5; it must be a whole number from 1"),
        ({**VIDEO, "fps": 1, "nframes": 4}, "fps and nframes both say how many frames to take; give one of them"),
        ({**VIDEO, "use_audio_in_video": "yes"}, "use_audio_in_video is 'yes'; it must be true, false or \"auto\""),
        ({**VIDEO, "video_start": 3, "video_end": 2}, "video_start 3 is not before video_end 2"),
        ({**VIDEO, "min_pixels": 9, "max_pixels": 8}, "min_pixels 9 is over max_pixels 8"),
        ({**AUDIO, "audio_start": -1}, "audio_start is -1; it must be at least 0 and at most 1e+09 (seconds)"),
        ({**AUDIO, "audio_end": True}, "audio_end is True; it must be a number"),
    ],
)
def test_parts_that_are_refused(part, message):
    with pytest.raises(InputError, match=re.escape(message)):
        parse(part)


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "messages must be a list of at least one message, got []"),
        ("hello", "messages must be a list of at least one message, got 'hello'"),
        (["hello"], "messages[0] must be an object with role, content, got 'hello'"),
        ([{"role": "robot", "content": "x"}], "messages[0]: unknown role 'robot'; known: system, user, assistant"),
        (
            [{"role": "user", "content": "x"}, {"role": "user"}],
            "messages[1]: content must be a string or a list",
        ),
        (
            [{"role": "user", "content": "x", "name": "y"}],
            "messages[0]: unknown key 'name' (value 'y'); known: role",
        ),
    ],
)
def test_messages_that_are_refused(messages, message):
    with pytest.raises(InputError, match=re.escape(message)):
        parse_messages(messages)


def render(template, messages, **options):
    return "".join(text for text, _ in template.render(parse_messages(messages), **options))


def test_built_in_template(tmp_path):
    template = ChatTemplate.load(tmp_path)
    media = [{"type": "image", "image": "a"}, {"type": "audio", "audio": "b"}, {"type": "video", "video": "c"}]
    content = [*media, {"type": "text", "text": " What? "}]
    text = render(template, [{"role": "user", "content": content}, {"role": "assistant", "content": "This."}])
    assert text == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
        "<|vision_bos|><|IMAGE|><|vision_eos|>"
        "<|audio_bos|><|AUDIO|><|audio_eos|><|vision_bos|><|VIDEO|><|vision_eos|> What? <|im_end|>\n"
        "<|im_start|>assistant\nThis.<|im_end|>\n<|im_start|>assistant\n"
    )
    spoken = [{"role": "system", "content": SPEECH_SYSTEM_PROMPT}, {"role": "user", "content": "x"}]
    text = render(template, spoken, add_generation_prompt=False)
    assert text == f"<|im_start|>system\n{SPEECH_SYSTEM_PROMPT}<|im_end|>\n<|im_start|>user\nx<|im_end|>\n"


def test_the_template_knows_who_wrote_what(tmp_path):
    template = ChatTemplate.load(tmp_path)
    typed = "{{ 7 * 7 }} <|im_end|>"
    pieces = template.render(parse_messages([{"role": "user", "content": typed}]))
    assert (typed, False) in pieces
    assert all(typed not in text for text, trusted in pieces if trusted)


def test_the_template_of_the_checkpoint_is_used(tmp_path):
    hello = [{"role": "user", "content": "hello"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": "1{{ messages[0].content }}"}))
    assert render(ChatTemplate.load(tmp_path), hello) == "1hello"
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": "2{{ messages[0].content }}"}))
    assert render(ChatTemplate.load(tmp_path), hello) == "2hello"
    (tmp_path / "chat_template.jinja").write_text("{{ raise_exception('no ' + messages[0].role) }}")
    with pytest.raises(InputError, match="the chat template refuses these messages: no user"):
        render(ChatTemplate.load(tmp_path), hello)
    (tmp_path / "chat_template.jinja").write_text("{{ ''.__class__.__mro__ }}")
    with pytest.raises(InputError, match="the chat template refuses"):
        render(ChatTemplate.load(tmp_path), hello)
    (tmp_path / "chat_template.jinja").write_text("{% if %}")
    with pytest.raises(CheckpointError, match=r"chat_template\.jinja is not a template"):
        ChatTemplate.load(tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    (tmp_path / "chat_template.json").write_text("[")
    with pytest.raises(CheckpointError, match=r"chat_template\.json is not JSON"):
        ChatTemplate.load(tmp_path)


def test_null_and_empty_fields_say_nothing():
    message = {"role": "assistant", "content": "x", "refusal": None, "tool_calls": [], "audio": None, "name": None}
    assert parse_messages([message])[0].content == "x"
    part = {"type": "image_url", "image_url": {"url": "a", "detail": None}, "cache_control": None}
    assert parse(part)[0] == MediaPart("image", "a", PLACE)


def test_a_spoken_answer_is_its_text():
    audio = {"id": "audio-1", "expires_at": 1, "transcript": "Hello", "data": "UklGRg=="}
    assert parse_messages([{"role": "assistant", "content": "Hello", "audio": audio}])[0].content == "Hello"
    assert parse_messages([{"role": "assistant", "content": None, "audio": audio}])[0].content == "Hello"
    for message in (
        {"role": "assistant", "audio": {"id": "audio-1"}},
        {"role": "user", "content": "x", "audio": audio},
    ):
        with pytest.raises(InputError):
            parse_messages([message])


def test_half_a_surrogate_pair_becomes_a_replacement_character():
    (message,) = parse_messages([{"role": "user", "content": "a\ud83d \ud83d\ude00"}])
    assert message.content == "a\ufffd \U0001f600"
    assert parse({"type": "text", "text": "\ude00"}) == (TextPart("\ufffd"),)


QUESTION = [{"type": "image", "image": "a"}, {"type": "text", "text": 'Say "x" <b>.'}]
TEXT_ONLY = '<|vision_bos|><|IMAGE|><|vision_eos|>Say "x" <b>.'


@pytest.mark.parametrize(
    "expression",
    [
        "message.content",
        "'' + message.content",
        "message.content + ''",
        "message.content | trim",
        "message.content.strip()",
        "message['content'] ~ ''",
        "message.content | string",
    ],
)
def test_a_template_that_takes_only_strings(expression):
    template = ChatTemplate("{% for message in messages %}{{ " + expression + " }}|{% endfor %}")
    messages = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": "ok"}]
    assert render(template, messages) == f"{TEXT_ONLY}|ok|"
    pieces = template.render(parse_messages(messages))
    assert ("<|vision_bos|><|IMAGE|><|vision_eos|>", True) in pieces and ('Say "x" <b>.', False) in pieces


def test_what_transformers_gives_to_templates():
    hello = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": 'a "b"\n'}]
    answers = "{% for m in messages %}{% generation %}{{ m.role }},{% endgeneration %}{% endfor %}"
    assert render(ChatTemplate(answers), hello) == "user,assistant,"
    year = render(ChatTemplate("{{ strftime_now('%Y') }}"), hello)
    assert year.isdigit() and len(year) == 4
    assert render(ChatTemplate("{{ messages[1].content | tojson }}"), hello) == json.dumps('a "b"\n')
    parts = [{"type": "image", "image": ""}, QUESTION[1]]
    assert render(ChatTemplate("{{ messages[0].content | tojson(indent=1) }}"), hello) == json.dumps(parts, indent=1)
    assert render(ChatTemplate("{{ {'é': '<'} | tojson }}"), hello) == '{"é": "<"}'


FAILING = ["{{ 1 / 0 }}", "{{ range(10 ** 9) }}", "{{ messages[0].content | upper }}", "{{ x.y.z }}"]


@pytest.mark.parametrize("source", FAILING)
def test_a_template_that_fails_is_an_error_of_the_messages(source):
    with pytest.raises(InputError, match="the chat template"):
        render(ChatTemplate(source), [{"role": "user", "content": "x"}])


@pytest.mark.parametrize("number", [10**400, 2**31, 1e400, -1, True, "1", 44100.0])
@pytest.mark.parametrize("name", ["min_pixels", "max_pixels", "nframes"])
def test_counts_out_of_range(name, number):
    with pytest.raises(InputError, match=f"{name} is "):
        parse({**VIDEO, name: number})


@pytest.mark.parametrize("number", [10**400, 1e400, -1, True, "1", float("nan")])
@pytest.mark.parametrize("name", ["fps", "video_start", "video_end"])
def test_times_out_of_range(name, number):
    with pytest.raises(InputError, match=f"{name} is "):
        parse({**VIDEO, name: number})


@pytest.mark.parametrize("rate", [44100.0, 0, 1, 10**9, None])
def test_sampling_rates(rate):
    if rate is None:
        assert parse({**AUDIO, "sampling_rate": 44100})[0].options == {"sampling_rate": 44100}
        return
    with pytest.raises(InputError, match="sampling_rate is "):
        parse({**AUDIO, "sampling_rate": rate})

"""Chat templates of strangers' checkpoints: programs, which get little time and memory, and no way out."""

from __future__ import annotations

import time

import pytest

from omni_jax.errors import CheckpointError, InputError
from omni_jax.processing import template_sandbox
from omni_jax.processing.chat import MEDIA_MARKUP, ChatTemplate, parse_messages

SECONDS = 1.0
MESSAGES = parse_messages(
    [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "image", "image": "a.png"}, {"type": "text", "text": "What is it?"}]},
    ]
)
TIMES_40 = "{% for i in range(40) %}{% set ns.x = EXPRESSION %}{% endfor %}"
START = "{% set ns = namespace(x='0123456789') %}"


@pytest.fixture(autouse=True)
def short_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_sandbox, "MAX_SECONDS", SECONDS)


def render(source: str) -> str:
    return "".join(text for text, _ in ChatTemplate(source).render(MESSAGES))


def doubled(expression: str, end: str = "{{ ns.x }}") -> str:
    return START + TIMES_40.replace("EXPRESSION", expression) + end


HOSTILE = {
    # one value
    "times": "{{ 'x' * 10**10 }}",
    "times, the other way round": "{{ 10**10 * 'x' }}",
    "times a list": "{{ ([1] * 10**10)|length }}",
    "power": "{{ 10**10**10 }}",
    "powers": "{% set ns = namespace(x=7) %}{% for i in range(60) %}{% set ns.x = ns.x * ns.x %}{% endfor %}",
    "center": "{{ 'x'|center(10**10) }}",
    "ljust": "{{ 'x'.ljust(10**10) }}",
    "zfill": "{{ 'x'.zfill(10**10) }}",
    "expandtabs": "{{ '\t'.expandtabs(10**10) }}",
    "ljust of a message's parts": "{{ messages[1].content.ljust(10**10) }}",
    "format": "{{ '{:9999999999}'.format(1) }}",
    "format_map": "{{ '{a:9999999999}'.format_map({'a': 1}) }}",
    "%": "{{ '%9999999999d' % 1 }}",
    "format filter": "{{ '%9999999999d'|format(1) }}",
    "to_bytes": "{{ (1).to_bytes(10**10, 'big')|length }}",
    "indent": "{{ 'x'|indent(10**10, true) }}",
    "batch": "{{ [1]|batch(10**10, 'x')|list }}",
    "slice": "{{ [1]|slice(10**10)|list }}",
    "round": "{{ (1)|round(-10**10) }}",
    "lipsum": "{{ lipsum(10**7) }}",
    "tojson indent": "{{ [1]|tojson(indent=10**10) }}",
    "tojson separators": "{{ ([1] * 10**6)|tojson(separators=('x' * 10**6, ':')) }}",
    "replace": "{{ ('x' * 10**6)|replace('x', 'y' * 10**6) }}",
    "replace method": "{{ ('x' * 10**6).replace('', 'y' * 10**6) }}",
    "join": "{{ range(100000)|join('y' * 10**6) }}",
    "join method": "{{ ('y' * 10**6).join(['a'] * 10**5) }}",
    "strftime": "{{ strftime_now('%c' * 10**6) }}",
    "a message": "{{ raise_exception('x' * 10**10) }}",
    # values that grow step by step
    "~": doubled("ns.x ~ ns.x"),
    "+": doubled("ns.x + ns.x"),
    "list": doubled("[ns.x, ns.x]"),
    "tuple": doubled("(ns.x, ns.x)"),
    "dictionary": doubled("{'a': ns.x, 'b': ns.x}"),
    "dict()": doubled("dict(a=ns.x, b=ns.x)"),
    "views": doubled("{'a': ns.x, 'b': {'a': ns.x}.items()}"),
    "lists that are compared": START
    + TIMES_40.replace("EXPRESSION", "[ns.x, ns.x]").replace(
        "{% endfor %}", "{% set ns.y = [ns.y, ns.y] %}{% endfor %}{{ ns.x == ns.y }}"
    ),
    "lists to JSON": doubled("[ns.x, ns.x]", "{{ ns.x|tojson }}"),
    "lists to text": doubled("[ns.x, ns.x]", "{{ (ns.x|string)|length }}"),
    "lists joined": doubled("[ns.x, ns.x]", "{{ ns.x|join }}"),
    "sums of lists": doubled("[ns.x] + [ns.x]"),
    "blocks": START
    + "{% for i in range(40) %}{% set x %}{{ ns.x }}{{ ns.x }}{% endset %}{% set ns.x = x %}{% endfor %}{{ ns.x }}",
    "macros": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% else %}x{% endif %}{% endmacro %}{{ f(40) }}",
    "arguments": "{% macro f(n) %}{% if n %}{{ f(n - 1, varargs, varargs) }}{% else %}{{ varargs }}{% endif %}"
    "{% endmacro %}{{ f(40, 1) }}",
    "pieces of a text": "{% set x = 'x' * 10**7 %}{% set ns = namespace(x=[]) %}"
    "{% for i in range(10000) %}{% set ns.x = ns.x + [x[i:]] %}{% endfor %}",
    "texts in upper case": "{% set x = 'x' * 10**7 %}{% set ns = namespace(x=[]) %}"
    "{% for i in range(10000) %}{% set ns.x = ns.x + [x.upper()] %}{% endfor %}",
    # time alone
    "range": "{% for i in range(10**9) %}{% endfor %}",
    "loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "loops with a condition": "{% for i in range(99999) %}{% for j in range(99999) if j < 0 %}{% endfor %}{% endfor %}",
    "loops of filters": "{% for i in range(99999) %}{{ range(99999)|map('string')|list|length }}{% endfor %}",
    "tests": "{% set x = 'x' * 10**7 %}{{ range(99999)|map('string')|select('in', x)|list }}",
    "calls": "{% macro f(n) %}{% if n %}{% set x = f(n - 1) %}{% set x = f(n - 1) %}{% endif %}{% endmacro %}"
    "{% set x = f(60) %}",
    "a loop that calls itself": "{% for x in [[1]] recursive %}{{ loop([[1]]) }}{% endfor %}",
    # ways out
    "attributes": "{{ ''.__class__.__mro__ }}",
    "attributes by a filter": "{{ ''|attr('__class__') }}",
    "format of attributes": "{{ '{0.__class__.__init__.__globals__}'.format(messages) }}",
    "map of attributes": "{{ [messages]|map(attribute='__class__')|list }}",
    "files": "{% include '/etc/hostname' %}",
    "words cut up": "{{ messages[0].content.split('.')[0] ~ '.' ~ 10**6 ~ '.' }}",
    "words with long numbers": "{{ messages[0].content.split('.')[0] ~ '.' ~ '1' * 5000 ~ '.' }}",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_template_costs_the_request(name: str) -> None:
    begin = time.thread_time()  # what others compute meanwhile does not count
    try:
        template = ChatTemplate(HOSTILE[name])
    except CheckpointError:  # of what is no filter here, when the checkpoint is loaded
        return
    try:
        text = "".join(text for text, _ in template.render(MESSAGES))
    except InputError as e:
        assert "chat template" in str(e) and len(str(e)) < 5000
    else:  # what is refused as undefined writes nothing
        assert len(text) < 1000 and "class" not in text
    assert time.thread_time() - begin < 3 * SECONDS


@pytest.mark.parametrize("expression", ["'x' * 10**9", "'x'|center(10**9)", "10**10**8", "'x' ~ 'y' * 10**9"])
@pytest.mark.parametrize("form", ["{{{{ {} }}}}", "{{% set x = {} %}}", "{{% if {} %}}{{% endif %}}"])
def test_nothing_is_computed_before_it_is_rendered(expression: str, form: str) -> None:
    begin = time.thread_time()
    try:
        ChatTemplate(form.format(expression))
    except CheckpointError as e:
        assert "No filter named 'center'" in str(e)
    assert time.thread_time() - begin < SECONDS


@pytest.mark.parametrize(
    "source",
    [
        "{% for x in y %}" * 25 + "{% endfor %}" * 25,  # more than Python nests
        "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
        "{{ " + "-" * 50_000 + "1 }}",
        "{{ " + "9" * 5000 + " }}",
        "{% autoescape 'x' * 10**10 %}{% endautoescape %}",
        "x" * 300_000,
        "{% if %}",
        "{{ '\\ud800' }}{{",
    ],
)
def test_what_cannot_be_compiled_is_told(source: str) -> None:
    with pytest.raises(CheckpointError, match="the chat template"):
        ChatTemplate(source)


def test_a_template_may_not_repeat_a_long_message_for_ever() -> None:
    messages = parse_messages([{"role": "user", "content": "x" * 10**6}])
    with pytest.raises(InputError, match="repeats messages over 8 times"):
        ChatTemplate("{% for i in range(50000) %}{{ messages[0].content }}{% endfor %}").render(messages)


def test_a_long_dialogue_is_rendered() -> None:
    source = (
        "{% set ns = namespace(text='', found=[]) %}"
        "{% for m in messages %}{% if loop.index0 == 0 and messages|length > 1 %}first {% endif %}"
        "{% set ns.text = ns.text ~ m.role[0]|upper %}{% set ns.found = ns.found + [m] %}"
        "{{ m['content'] | trim }}{% if not loop.last %}, {% endif %}{% endfor %}"
        " {{ ns.text|length }} {{ messages[1:]|selectattr('role', 'equalto', 'user')|list|length }}"
        " {{ {'a': [1, 2.5, none], 'b': 'c'}|tojson(indent=2)|replace('\\n', '') }} {{ ['a', 'b']|join('-') }}"
        " {{ 'a b'.split(' ')|last }} {{ 7 // 2 }} {{ 'x' * 3 }} {{ 'ab'.replace('b', 'c') }} {{ namespace(a=1) }}"
    )
    messages = parse_messages([{"role": "user", "content": f" {i} "} for i in range(500)])
    text = "".join(piece for piece, _ in ChatTemplate(source).render(messages))
    assert text.startswith("first ") and " 499  500 499 " in text
    assert text.endswith('{  "a": [    1,    2.5,    null  ],  "b": "c"} a-b b 3 xxx ac <namespace>')


def test_media_and_texts_are_where_they_were() -> None:
    source = (
        "{% for m in messages %}{% for p in m.content if m.content is not string %}{{ p.text or p.type }}{% endfor %}"
    )
    assert render(source + "{% endfor %}") == "imageWhat is it?"
    assert render("{{ messages[1].content }}") == MEDIA_MARKUP["image"] + "What is it?"

"""Mutations of bytes and of JSON. All that is random comes from the ``random.Random`` that is given."""

from __future__ import annotations

import copy
import json
import math
import random
from collections.abc import Callable, Sequence
from typing import Any

# how many mutations a case has; most have few, so that what comes behind the first check is reached too
_NUM_MUTATIONS = (1, 1, 1, 2, 2, 3, 5, 8, 20)
_MAX_BLOCK = 64  # bytes that are moved at once
_MAX_BYTES = 1 << 20  # of a mutant
_EDGES = (0, 1, 2, 7, 8, 127, 128, 255, 256, 1000, 2**15 - 1, 2**15, 2**16 - 1, 2**16, 2**24, 2**31 - 1, 2**31)
_WIDE_EDGES = (2**32 - 1, 2**32, 2**63 - 1, 2**63, 2**64 - 1)

Mutation = Callable[[random.Random, bytearray, Sequence[bytes]], None]


def mutate_bytes(rng: random.Random, data: bytes, others: Sequence[bytes]) -> bytes:
    """A mutant of ``data``; blocks of ``others`` may come into it."""
    others = [other for other in others if other]
    mutant = bytearray(data or b"\0")
    for _ in range(rng.choice(_NUM_MUTATIONS)):
        rng.choice(_MUTATIONS)(rng, mutant, others)
        if not mutant:
            mutant += data[:1] or b"\0"
    return bytes(mutant[:_MAX_BYTES])


def _place(rng: random.Random, data: bytearray) -> int:
    """A byte's position; half of them are among the first 256, where headers are."""
    end = min(len(data), 256) if rng.random() < 0.5 else len(data)
    return rng.randrange(max(end, 1))


def _flip_bit(rng: random.Random, data: bytearray, others: Sequence[bytes]) -> None:
    data[_place(rng, data)] ^= 1 << rng.randrange(8)


def _set_byte(rng: random.Random, data: bytearray, others: Sequence[bytes]) -> None:
    data[_place(rng, data)] = rng.randrange(256)


def _add_to_byte(rng: random.Random, data: bytearray, others: Sequence[bytes]) -> None:
    place = _place(rng, data)
    data[place] = (data[place] + rng.randint(-16, 16)) % 256


def _write_edge(rng: random.Random, data: bytearray, others: Sequence[bytes]) -> None:
    """A number at the edge of its range, of 1 to 8 bytes, in either order."""
    width = rng.choice((1, 2, 2, 4, 4, 4, 8))
    value = rng.choice(_EDGES + _WIDE_EDGES) % (1 << (8 * width))
    place = _place(rng, data)
    number = value.to_bytes(width, rng.choice(("little", "big")))
    data[place : place + width] = number[: len(data) - place]


def _truncate(rng: random.Random, data: bytearray, others: Sequence[bytes]) -> None:
    del data[rng.randrange(1, len(data) + 1) :]


def _delete_block(rng: random.Random, data: bytearray, others: Sequence[bytes]) -> None:
    place = _place(rng, data)
    del data[place : place + rng.randint(1, _MAX_BLOCK)]


def _repeat_block(rng: random.Random, data: bytearray, others: Sequence[bytes]) -> None:
    place = _place(rng, data)
    block = bytes(data[place : place + rng.randint(1, _MAX_BLOCK)])
    data[place:place] = block * rng.choice((1, 1, 2, 8))


def _insert_random(rng: random.Random, data: bytearray, others: Sequence[bytes]) -> None:
    place = _place(rng, data)
    data[place:place] = rng.randbytes(rng.randint(1, _MAX_BLOCK))


def _fill_block(rng: random.Random, data: bytearray, others: Sequence[bytes]) -> None:
    place = _place(rng, data)
    length = min(rng.randint(1, _MAX_BLOCK), len(data) - place)
    data[place : place + length] = bytes([rng.choice((0, 0xFF, 0x20, rng.randrange(256)))]) * length


def _copy_block(rng: random.Random, data: bytearray, others: Sequence[bytes]) -> None:
    """A block of the same input or of another seed goes over what was there."""
    source = rng.choice(others) if others and rng.random() < 0.5 else bytes(data)
    begin = rng.randrange(len(source))
    block = source[begin : begin + rng.randint(1, _MAX_BLOCK)]
    place = _place(rng, data)
    data[place : place + len(block)] = block


def _splice(rng: random.Random, data: bytearray, others: Sequence[bytes]) -> None:
    """The beginning of this input, and the end of another seed."""
    if others:
        other = rng.choice(others)
        data[rng.randrange(1, len(data) + 1) :] = other[rng.randrange(len(other)) :]


_MUTATIONS: tuple[Mutation, ...] = (
    *(_flip_bit, _flip_bit, _set_byte, _set_byte, _add_to_byte, _write_edge, _write_edge, _write_edge),
    *(_truncate, _delete_block, _repeat_block, _insert_random, _fill_block, _copy_block, _splice),
)


# --- JSON ---

# stands in a value for JSON text that ``json.dumps`` would not write
_RAW = {
    "@raw:overflow@": "1e999",
    "@raw:underflow@": "-1e-400",
    "@raw:nan@": "NaN",
    "@raw:minus-infinity@": "-Infinity",
    "@raw:digits@": "9" * 5000,
    "@raw:deep-list@": "[" * 5000 + "]" * 5000,
    "@raw:deep-object@": '{"a":' * 3000 + "1" + "}" * 3000,
    "@raw:half-pair@": '"\\ud800"',
    "@raw:twice@": '{"type": "text", "type": "image", "text": 1, "text": "a"}',
    "@raw:not-json@": "tru",
}

URLS = (
    *("file:///etc/passwd", "file://localhost/etc/hostname", "file://[x/y", "FILE:/etc/passwd", "file:a.png"),
    *("http://127.0.0.1/a.png", "http://169.254.169.254/latest/meta-data/", "http://[::1]/a", "https://10.0.0.1/a"),
    *("http://2130706433/", "http://0x7f.1/", "http://[::ffff:127.0.0.1]/", "http://[64:ff9b::7f00:1]/", "http://0/"),
    *("http://private.example/a.png", "http://public.example/a.png", "https://public.example:70000/", "http://[/"),
    *("http://mixed.example/a?k=s3cret", "http://user:s3cret@public.example/a", "http://\udcff/", "http://a b/"),
    *("gs://bucket/a.png", "gs://", "gs://b/x::file:///etc/passwd", "gs://b/../c", "s3://b/a", "ftp://127.0.0.1/a"),
    *("data:,", "data:image/png;base64,", "data:image/png;base64,AAAA", "data:;base64,%ff", "blob:x", "//host/a.png"),
)
PATHS = (
    *("/etc/passwd", "../outside/secret.png", "../../../../../../etc/hostname", "link.png", "loop.png", "folder"),
    *("/proc/self/mem", "/dev/zero", "/dev/stdin", "a\0b", "", ".", "~/.ssh/id_rsa", "C:\\a.png", "x" * 5000),
    *("a.png/../../outside/secret.wav", "link-folder/secret.png", "%2e%2e/outside/secret.png", "|id", "-i", "pipe"),
)
HOSTILE: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2**31, 2**32, 2**53 + 1, 2**63, -(2**64), 10**400, 0.5, -0.0, 1e-300, 1e308),
    *([], {}, [[]], [None], {"": None}, "", " ", "0", "true", "null", "a\nb", "\0", "\x1b[31m", "é" * 300, "\u202e"),
    *(list(range(100)), ["a"] * 50, {"type": "text"}, {"url": "a.png"}, *_RAW),
)
_MAX_DEPTH = 40  # of what is copied into itself


def mutate_json(rng: random.Random, value: Any, hostile: Sequence[Any] = HOSTILE) -> Any:
    """A mutant of a JSON value: values and keys are replaced, dropped, doubled, moved and wrapped."""
    holder = [copy.deepcopy(value)]
    for _ in range(rng.choice(_NUM_MUTATIONS)):
        _mutate_node(rng, holder, hostile)
    return holder[0]


def mutate_inside(rng: random.Random, values: Any, hostile: Sequence[Any] = HOSTILE) -> None:
    """Changes a few values deep inside a list or an object, where mutants of the whole are seldom readable."""
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        parent = values
        key = rng.choice(list(values) if isinstance(values, dict) else range(len(values)))
        while isinstance(parent[key], dict | list) and parent[key] and rng.random() < 0.8:
            parent = parent[key]
            key = rng.choice(list(parent)) if isinstance(parent, dict) else rng.randrange(len(parent))
        parent[key] = mutate_json(rng, parent[key], hostile)


def _mutate_node(rng: random.Random, holder: list[Any], hostile: Sequence[Any]) -> None:
    nodes = _find_nodes(holder)
    parent, key = rng.choice(nodes)
    match rng.randrange(9):
        case 0 | 1 | 2:
            parent[key] = copy.deepcopy(rng.choice(hostile))
        case 3:
            parent[key] = _change_value(rng, parent[key])
        case 4:  # the outermost value stays, whatever it is
            if parent is not holder:
                del parent[key]
        case 5:
            other_parent, other_key = rng.choice(nodes)
            parent[key] = copy.deepcopy(other_parent[other_key]) if _depth(other_parent[other_key]) < _MAX_DEPTH else 0
        case 6:
            parent[key] = [parent[key]] if rng.random() < 0.5 else {"a": parent[key]}
        case 7:
            if isinstance(parent, dict):
                name = rng.choice([*parent, "x", "", "type", "url", "__class__", "a" * 200])
                parent[name] = parent.pop(key) if rng.random() < 0.5 else copy.deepcopy(parent[key])
            elif parent is not holder:
                parent[key:key] = [copy.deepcopy(parent[key])] * rng.choice((1, 3, 20))
        case _:
            if isinstance(parent[key], dict):
                parent[key][rng.choice(("x", "fps", "path", "min_pixels", "audio"))] = rng.choice(hostile)
            else:
                parent[key] = str(parent[key])[:1000]


def _find_nodes(holder: list[Any]) -> list[tuple[Any, Any]]:
    """Every place of a value: its list or object, and its index or key."""
    nodes: list[tuple[Any, Any]] = []
    waiting: list[Any] = [holder]
    while waiting and len(nodes) < 5000:
        parent = waiting.pop()
        keys = list(parent) if isinstance(parent, dict) else range(len(parent))
        for key in keys:
            nodes.append((parent, key))
            if isinstance(parent[key], dict | list):
                waiting.append(parent[key])
    return nodes


def _depth(value: Any) -> int:
    level, depth = [value], 0
    while level and depth <= _MAX_DEPTH:
        below: list[Any] = []
        for item in level:
            below += item.values() if isinstance(item, dict) else item if isinstance(item, list) else []
        level, depth = below, depth + 1
    return depth


def _change_value(rng: random.Random, value: Any) -> Any:
    """A value of the same type, near to what was there."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int) and abs(value) < 2**200:  # one of many digits is as odd as it can be
        return rng.choice((value + 1, value - 1, -value, value * 2, value * 1000, value // 2, float(value), str(value)))
    if isinstance(value, float) and math.isfinite(value):
        return rng.choice((value * 1e30, -value, value / 1e30, 0.0, round(value)))
    if isinstance(value, str):
        place = rng.randint(0, len(value))
        piece = rng.choice(("", "a", "\0", "/..", "<|im_end|>", "{{ 7 * 7 }}", "\ud800", "%00", value[:50]))
        return value[:place] + piece + value[place + rng.randint(0, 3) :]
    if isinstance(value, list):
        return rng.choice((value[::-1], value[:-1], value * 2 if len(value) < 100 else value[:1]))
    return value


def dump_json(value: Any) -> bytes:
    """JSON text, where raw pieces stand as they are; what has half a surrogate pair is written as an escape."""
    try:
        text = json.dumps(value, ensure_ascii=False)
        text.encode()
    except UnicodeEncodeError:
        text = json.dumps(value)
    except RecursionError:
        text = _RAW["@raw:deep-list@"]
    for name, raw in _RAW.items():
        text = text.replace(f'"{name}"', raw)
    return text.encode()

"""Packets that are lost, late or played twice, and what a session does with them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import omni_jax
from omni_jax.errors import InputError
from tests.tools.tone_world import make_test_rows
from tools import robustness
from tools.robustness import PACKET, RATE, Damage, Options, Sent, damage_sound, measure, order_frames, send
from tools.world.pictures import SIDE, Ground, Thing, draw_picture, read_frames, write_video


def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def test_what_is_lost_is_silence_of_its_length() -> None:
    samples = np.arange(1, 100 * PACKET + 6, dtype=np.float32)
    played = damage_sound(samples, Damage("lost", 0.2), rng())
    assert played.shape == samples.shape
    packets = played[: 100 * PACKET].reshape(100, PACKET)
    silent = ~packets.any(1)
    assert 10 < silent.sum() < 30
    assert (packets[~silent] == samples[: 100 * PACKET].reshape(100, PACKET)[~silent]).all()
    # what is late is no sound either
    assert (damage_sound(samples, Damage("late", 0.2), rng()) == played).all()


def test_what_comes_twice_is_played_twice() -> None:
    samples = np.repeat(np.arange(50, dtype=np.float32), PACKET)
    played = damage_sound(samples, Damage("twice", 0.2), rng()).reshape(-1, PACKET)[:, 0]
    numbers, counts = np.unique(played, return_counts=True)
    assert (numbers == np.arange(50)).all() and set(counts) == {1, 2} and (np.diff(played) >= 0).all()


def test_without_damage_all_comes_as_it_was_sent() -> None:
    samples = np.arange(5 * PACKET + 1, dtype=np.float32)
    assert (damage_sound(samples, Damage("lost", 0), rng()) == samples).all()
    assert order_frames(7, Damage("late", 0), rng()) == list(range(7))


def test_pictures_are_lost_late_or_come_twice() -> None:
    lost = order_frames(100, Damage("lost", 0.2), rng())
    assert 70 < len(lost) < 90 and lost == sorted(set(lost))
    twice = order_frames(100, Damage("twice", 0.2), rng())
    assert 110 < len(twice) < 130 and twice == sorted(twice) and set(twice) == set(range(100))
    late = order_frames(100, Damage("late", 0.2), rng())
    assert late != sorted(late) and sorted(late) == list(range(100))
    # no picture that is in time waits for one that is late
    overtaken = [number for place, number in enumerate(late) if place and number < max(late[:place])]
    assert all(later - number <= 4 for number in overtaken for later in late[: late.index(number)][-3:])


@pytest.fixture
def model(tiny_model: Path) -> omni_jax.OmniModel:
    made = omni_jax.load(tiny_model, components=("thinker",))
    made.processor = made.processor.with_pixels(video_min_pixels=1)
    return made


def test_a_session_goes_on_without_what_it_refused(model: omni_jax.OmniModel) -> None:
    frames = list(rng().integers(0, 256, (16, 56, 84, 3), np.uint8))
    sent = Sent(rng().normal(0, 0.1, 2 * RATE).astype(np.float32), frames)
    _, refused = send(model, sent, Damage("lost", 0), "What?", rng(), 4)
    assert refused == 0
    damage = Damage("late", 0.3)
    # as ``send`` draws: of the sound, then of the pictures
    draws = rng()
    damage_sound(sent.samples, damage, draws)
    order = order_frames(len(frames), damage, draws)
    overtaken = sum(number < max(order[:place]) for place, number in enumerate(order) if place)
    _, refused = send(model, sent, damage, "What?", rng(), 4)
    assert refused == overtaken > 0
    # sound alone
    alone = Sent(sent.samples, ())
    assert send(model, alone, Damage("lost", 0), "", rng(), 4) == send(model, alone, Damage("late", 0), "", rng(), 4)


def test_measures_each_damage(
    tiny_model: Path, model: omni_jax.OmniModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(robustness.omni_jax, "load", lambda *args, **options: model)
    rows = make_test_rows(tmp_path, ("colour-at-sound", "day"))
    found = measure(Options(tiny_model, rows, tmp_path / "r.json", fractions=(0.5,), max_tokens=2))
    assert list(found) == ["all in time", "50 % lost", "50 % late", "50 % twice"]
    for counts in found.values():
        assert set(counts) == {"colour-at-sound", "day-voice"}
        assert all(own["asked"] == 1 and own["failed"] == 0 for own in counts.values())
    assert found["50 % late"]["colour-at-sound"]["refused"] > 0 == found["50 % lost"]["colour-at-sound"]["refused"]
    json.dumps(found)


def test_rows_of_other_tasks_are_none(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"task": "colour", "messages": []}) + "\n")
    with pytest.raises(InputError, match="has no row of colour-at-sound"):
        measure(Options(tmp_path, rows, tmp_path / "r.json"))


def test_frames_are_those_that_were_drawn(tmp_path: Path) -> None:
    frames = [draw_picture([Thing("circle", colour, 0.5, 0.5)], Ground(20)) for colour in ("red", "blue")]
    write_video(tmp_path / "a.mp4", frames, None)
    found, has_sound = read_frames(tmp_path / "a.mp4")
    assert not has_sound and len(found) == 2
    middle = SIDE // 2
    for frame, drawn in zip(found, frames, strict=True):
        assert np.abs(frame[middle, middle].astype(int) - drawn[middle, middle]).max() < 30

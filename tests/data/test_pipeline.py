import collections
import dataclasses
import itertools
import json
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from orbax.checkpoint import v1 as ocp

from omni_jax.data import pipeline
from omni_jax.data.config import DataConfig
from omni_jax.data.examples import Reject
from omni_jax.data.mixture import Mixer, deal_rows, order_rows
from omni_jax.data.packing import OmniPacking, fill
from omni_jax.data.rejects import RejectsFile
from omni_jax.data.sources import open_rows
from omni_jax.errors import ConfigError, InputError
from tests.data.conftest import MEDIA, PICTURE, VIDEO, WAV

DATA = DataConfig(
    rows=2,
    tokens=256,
    spans=48,
    audio_blocks=3,
    canvases=2,
    windows=8,
    lookahead=4,
    max_pixels=112 * 112,
    video_max_pixels=84 * 84,
    media_root="/",
    max_reject_share=0.2,
    too_long="skip",
)


def talk(question, **rest):
    return {"conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": "A disc."}], **rest}


ROWS = [
    *({"text": "once " * n} for n in range(2, 14)),
    *(talk(f"<image>What is {i}?", images=[PICTURE]) for i in range(4)),
    *(talk(f"<audio>What is {i}?", audios=[WAV]) for i in range(3)),
    talk("<video>What is it?", videos=[VIDEO]),
    talk("<image>What is it?", images=["none.png"]),
    {"text": "once " * 900},
]


@pytest.fixture
def rows(write_rows):
    return write_rows(*ROWS)


@pytest.fixture
def start(processor):
    """Begins to read; what is started is closed."""
    started = []

    def start(config, state=None, **process):
        packing = OmniPacking.create(config, processor, config.streams)
        started.append(pipeline.batches(config, packing, **process))
        if state is not None:
            started[-1].set_state(json.loads(json.dumps(state)))
        return started[-1]

    yield start
    for batches in started:
        batches.close()


def take(batches, n):
    """Some batches, each with the names of its rows and the state after it."""
    return [(next(batches), batches.rows, batches.get_state()) for _ in range(n)]


def assert_same(found, expected):
    for (batch, names, state), (other, other_names, other_state) in zip(found, expected, strict=True):
        jax.tree.map(np.testing.assert_array_equal, batch, other)
        assert names == other_names and state == other_state


def shapes(batch):
    return jax.tree.map(lambda x: (x.shape, x.dtype), batch)


def test_equal_seeds_give_equal_batches_of_fixed_shapes(rows, start):
    config = dataclasses.replace(DATA, train=(rows,))
    found = take(start(config), 4)
    assert_same(take(start(config), 4), found)
    others = take(start(dataclasses.replace(config, seed=1)), 4)
    assert [names for _, names, _ in found] != [names for _, names, _ in others]
    for batch, names, _ in [*found, *others]:
        assert shapes(batch) == shapes(found[0][0])
        assert fill(batch).examples == len(names) > 0 and 0 < fill(batch).target_tokens < fill(batch).tokens <= 1
    assert max(fill(batch).windows for batch, _, _ in found) > 0
    assert max(fill(batch).audio_blocks for batch, _, _ in found) > 0
    assert np.mean([fill(batch).tokens for batch, _, _ in found]) > 0.9


def test_rows_without_media_fill_the_same_shapes(rows, write_rows, start):
    text = write_rows({"text": "once"}, name="text.jsonl")
    (batch, _, _), (media, _, _) = (take(start(dataclasses.replace(DATA, train=(p,))), 1)[0] for p in (text, rows))
    assert shapes(batch) == shapes(media)
    assert fill(batch).windows == fill(batch).audio_blocks == 0


def test_a_run_goes_on_where_it_stopped(rows, start):
    """To the bit, with rejected rows and epochs in between, and whatever the number of workers was before."""
    config = dataclasses.replace(DATA, train=(rows,), rows=4, streams=2)
    before_all = start(config)
    first_state = before_all.get_state()
    whole = take(before_all, 6)
    streams = whole[-1][2]["streams"]
    assert sum(streams["0"]["read"]["rows"]) > len(ROWS)  # half of them are its own: the second epoch is over
    assert streams["1"]["rejected"]
    assert_same(take(start(config, first_state), 1), whole[:1])
    for stop in (2, 4):
        assert_same(take(start(config, whole[stop - 1][2]), 6 - stop), whole[stop:])
    with_workers = dataclasses.replace(config, workers=1)
    assert_same(take(start(with_workers, whole[3][2]), 2), whole[4:])


def test_a_run_goes_back_within_itself(rows, start):
    batches = start(dataclasses.replace(DATA, train=(rows,)))
    batches.start_prefetch()
    take(batches, 1)
    state = batches.get_state()
    found = take(batches, 3)
    batches.set_state(state)
    assert_same(take(batches, 3), found)


def test_orbax_carries_the_state(rows, start, tmp_path):
    config = dataclasses.replace(DATA, train=(rows,))
    batches, other = start(config), start(config)
    take(batches, 2)
    ocp.save_checkpointables(tmp_path / "checkpoint", {"data": batches})
    ocp.load_checkpointables(tmp_path / "checkpoint", {"data": other})
    assert_same(take(other, 2), take(batches, 2))


def test_a_program_may_end_in_the_middle(write_rows, processor, tmp_path):
    """Silently, its workers stopped, though nobody closes anything."""
    (tmp_path / "processor").write_bytes(pickle.dumps(processor))
    program = f"""if __name__ == "__main__":
        import pickle
        from omni_jax.data import pipeline
        from omni_jax.data.packing import OmniPacking
        from omni_jax.data.config import DataConfig
        processor = pickle.load(open({str(tmp_path / "processor")!r}, "rb"))
        config = DataConfig(train=({write_rows({"text": "once"})!r},), tokens=64, canvases=1, windows=1, workers=1)
        batches = pipeline.batches(config, OmniPacking.create(config, processor, 1))
        print(next(batches).inputs.tokens.shape)
    """
    (tmp_path / "program.py").write_text(program)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, str(tmp_path / "program.py")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "(1, 64)\n", "")


def test_processes_share_the_work_of_one(rows, start):
    """Their batches, one after the other, are those of one process."""
    config = dataclasses.replace(DATA, train=(rows,), rows=4, streams=4)
    whole = take(start(config), 3)
    parts = [take(start(config, process_index=i, process_count=2), 3) for i in range(2)]
    for n in range(3):
        (one, first, state), (two, second, other) = parts[0][n], parts[1][n]
        jax.tree.map(lambda w, a, b: np.testing.assert_array_equal(w, np.concatenate([a, b])), whole[n][0], one, two)
        assert first + second == whole[n][1]
        assert {**state["streams"], **other["streams"]} == whole[n][2]["streams"]
    # and one process can go on with what two have left
    state = {**parts[0][1][2], "streams": {**parts[0][1][2]["streams"], **parts[1][1][2]["streams"]}}
    assert_same(take(start(config, state), 1), whole[2:])


def test_streams_are_disjoint_and_miss_nothing(write_rows, start):
    text = write_rows(*({"text": f"once {i}"} for i in range(40)))
    config = dataclasses.replace(DATA, train=(text,), rows=2, streams=2, tokens=60, lookahead=1)
    parts = [start(config, process_index=i, process_count=2) for i in range(2)]
    names = [list(itertools.chain.from_iterable(n for _, n, _ in take(part, 6))) for part in parts]
    for i, part in enumerate(parts):
        # of the 20 rows that are a stream's
        assert part.epochs == (part.get_state()["streams"][str(i)]["read"]["rows"][0] / 20,)
    epochs = [set(some[:18]) for some in names]  # of the 20 that are each stream's; a few may still wait
    assert not epochs[0] & epochs[1] and all(len(epoch) == 18 for epoch in epochs)
    (rows,) = order_rows([open_rows(text)], (), 3)
    dealt = [[deal_rows(rows, s, 2)[i].number for i in range(20)] for s in range(2)]
    assert sorted(dealt[0] + dealt[1]) == list(range(1, 41))


def test_every_epoch_has_an_order_of_its_own(write_rows):
    files = [open_rows(write_rows(*({"text": str(i)} for i in range(n)), name=f"{n}.jsonl")) for n in (7, 5)]
    (rows,) = order_rows(files, (), 3)
    epochs = [[rows[i].name for i in range(12 * e, 12 * e + 12)] for e in range(3)]
    assert all(sorted(epoch) == sorted(row.name for f in files for row in f) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert [rows[i].name for i in range(12)] != [order_rows(files, (), 4)[0][i].name for i in range(12)]
    assert {(rows[i].file, rows[i].source) for i in range(12)} == {(files[0][0].file, 0), (files[1][0].file, 1)}


def test_files_are_mixed_by_weight(write_rows):
    names = [write_rows(*({"text": str(i)} for i in range(10)), name=f"{n}.jsonl") for n in "ab"]
    ordered = order_rows([open_rows(name) for name in names], (3.0, 1.0), 0)
    drawn = read_mixture(ordered, (3.0, 1.0), num_streams=1, num_rows=400)
    assert collections.Counter(row.file for row in drawn) == {names[0]: 300, names[1]: 100}
    first = [row.number for row in drawn[:40] if row.file == names[1]]
    assert sorted(first) == list(range(1, 11))  # an epoch of its own
    assert [rows[i].source for i in range(3) for rows in ordered] == [0, 1] * 3


def read_mixture(ordered, weights, num_streams, num_rows):
    """What the streams read together, as many rows each."""
    found = []
    for stream in range(num_streams):
        mixer = Mixer(weights, "rows", stream, num_streams)
        dealt = [deal_rows(rows, stream, num_streams) for rows in ordered]
        for _ in range(num_rows):
            source = mixer.choose()
            found.append(dealt[source][mixer.next_row(source)])
            mixer.add(source, 1)
    return found


@pytest.mark.parametrize("mix_by", ["rows", "tokens"])
@pytest.mark.parametrize("num_streams", [1, 5, 8, 64])
@pytest.mark.parametrize("weights", [(1, 1), (3, 1), (4, 1), (7, 1), (9, 1), (100, 1), (2, 3, 5)])
def test_a_mixture_is_what_was_asked_for(weights, num_streams, mix_by):
    """Within 2 % over all streams, and each stream reads every source; of rows, and of tokens however long rows are."""
    rng = np.random.default_rng(0)
    found = np.zeros((num_streams, len(weights)))
    for stream in range(num_streams):
        mixer = Mixer(weights, mix_by, stream, num_streams)
        # rows of the first source are long at regular distances
        lengths = rng.integers(5, 200, (len(weights), 64))
        lengths[0, stream % 4 :: 4] = 1000
        for _ in range(max(400, 10_000 // num_streams)):
            source = mixer.choose()
            length = int(lengths[source, mixer.next_row(source) % 64])
            mixer.add(source, length)
            found[stream, source] += length if mix_by == "tokens" else 1
    assert (found > 0).all()
    wanted = np.array(weights) / sum(weights)
    assert (np.abs(found.sum(axis=0) / found.sum() / wanted - 1) < 0.02).all(), found.sum(axis=0)


def test_rows_of_every_length_come_to_every_stream(write_rows):
    """Whatever the distance between long rows in a file is, streams have as many of them."""
    files = [write_rows(*(str(n) for n in range(64)), name=f"{name}.jsonl") for name in "ab"]
    ordered = order_rows([open_rows(file) for file in files], (3, 1), 0)
    rows = read_mixture(ordered, (3, 1), num_streams=8, num_rows=128)
    for stream in range(8):
        own = rows[stream * 128 : (stream + 1) * 128]
        assert collections.Counter(row.source for row in own)[0] == pytest.approx(96, abs=1)
        every_fourth = sum(row.number % 4 == 1 for row in own if row.source == 0)
        assert 12 <= every_fourth <= 36


def test_streams_do_not_read_the_rarest_source_at_once():
    turns = []
    for stream in range(64):
        mixer = Mixer((100.0, 1.0), "rows", stream, 64)
        for turn in range(102):
            source = mixer.choose()
            mixer.add(source, 1)
            if source == 1:
                turns.append(turn)
                break
    assert len(turns) == 64 and max(collections.Counter(turns).values()) <= 2


def test_packed_tokens_are_mixed_as_asked(write_rows, start):
    """Of what is in the batches, after a change in the middle of the run; and the batch says whose they are."""
    files = (
        write_rows(*({"text": "once " * n} for n in (20, 3, 60, 8)), name="long.jsonl"),
        write_rows(*({"text": "once"} for _ in range(5)), name="short.jsonl"),
    )
    config = dataclasses.replace(
        DATA, train=files, weights=(3.0, 1.0), mix_by="tokens", rows=2, streams=2, audio_blocks=0, canvases=0
    )
    batches = start(config)
    first = take(batches, 6)
    again = start(config, first[2][2])
    assert_same(take(again, 3), first[3:])
    found = np.zeros(2)
    for batch, _, _ in [*first, *take(batches, 24)]:
        found += np.bincount(batch.source[batch.inputs.segment_ids > 0], minlength=2)
    assert abs(found[0] / found.sum() / 0.75 - 1) < 0.02, found


@pytest.mark.parametrize("in_order", [False, True])
def test_windows_of_a_document(write_rows, start, in_order):
    """All are read, in their order if it is asked for, also when the run goes on in the middle of one."""
    words = [f"w{i}" for i in range(700)]
    rows = write_rows({"text": " ".join(words)}, *({"text": "once " * (i + 1)} for i in range(12)))
    config = dataclasses.replace(
        DATA,
        train=(rows,),
        tokens=128,
        too_long="split",
        windows_in_order=in_order,
        rows=1,
        streams=1,
        audio_blocks=0,
        canvases=0,
    )
    batches = start(config)
    found = take(batches, 70)
    stop = next(i for i, (_, _, state) in enumerate(found) if len(state["streams"]["0"]["windows"]) > 2)
    assert_same(take(start(config, found[stop][2]), 8), found[stop + 1 : stop + 9])
    name = f"{rows}:1"
    held = [names for _, names, _ in found if name in names]
    assert len(held) > 10
    if in_order:
        # nothing comes between the windows of the document, whose batches hold little else
        assert sum(len(names) > 1 for names in held) < len(held) / 2


def test_rejects_are_named_once_and_skipped(rows, start, tmp_path):
    path = tmp_path / "out" / "rejects.jsonl"
    config = dataclasses.replace(DATA, train=(rows,), rejects=path)
    batches = start(config)
    names = [name for _, some, _ in take(batches, 8) for name in some]
    state = batches.get_state()["streams"]["0"]
    assert sum(state["read"]["rows"]) > 3 * len(ROWS) and state["rejected"] >= 6
    assert not {f"{rows}:21", f"{rows}:22"} & set(names)
    found = {line["row"]: line for line in map(json.loads, path.read_text().splitlines())}
    assert found.keys() == {21, 22} and len(path.read_text().splitlines()) == 2
    assert found[21]["file"] == rows and re.search("none.png'.: no such file", found[21]["reason"])
    assert "tokens, over the limit of 256" in found[22]["reason"]
    batches.close()
    before = path.read_text()
    path.write_text(before + '{"file": "cut o')  # killed while it wrote
    take(start(config), 8)
    assert path.read_text() == before
    path.write_text("[]\n")
    with pytest.raises(InputError, match="is not a file of rejected rows"):
        start(config)


def test_a_name_that_is_not_utf8_is_named_too(tmp_path):
    """Also when the run restarts, and with characters that end a line for some readers."""
    path = tmp_path / "rejects.jsonl"
    rejects = [Reject("rows-\udcff.jsonl", 1, "no \u2028 such file"), Reject("\u2028.jsonl", 2, "caf\u00e9")]
    for _ in range(2):
        file = RejectsFile(path)
        for reject in rejects:
            file.add(reject)
    found = [json.loads(line) for line in path.read_text(encoding="utf-8").rstrip("\n").split("\n")]
    assert [(line["file"], line["row"], line["reason"]) for line in found] == [
        (reject.file, reject.number, reject.reason) for reject in rejects
    ]


def test_a_reject_that_a_kill_cut_short_is_written_again(tmp_path):
    """Also where the cut is in the middle of a character."""
    path = tmp_path / "rejects.jsonl"
    rejects = [Reject("a.jsonl", 1, "caf\u00e9"), Reject("a.jsonl", 2, "th\u00e9")]
    for reject in rejects:
        RejectsFile(path).add(reject)
    whole = path.read_bytes()
    path.write_bytes(whole[: whole.rindex(b"\xa9")])
    for reject in rejects:
        RejectsFile(path).add(reject)
    assert path.read_bytes() == whole


def test_each_process_names_its_own_rejects(write_rows, start, tmp_path):
    text = write_rows(*({"text": "once" * (i % 2)} for i in range(40)))
    path = tmp_path / "r.jsonl"
    config = dataclasses.replace(DATA, train=(text,), streams=2, rejects=path, max_reject_share=0.9)
    for i in range(2):
        take(start(config, process_index=i, process_count=2), 3)
    found = [{json.loads(line)["row"] for line in (tmp_path / f"r-{i}.jsonl").read_text().splitlines()} for i in (0, 1)]
    assert found[0] | found[1] == set(range(1, 41, 2)) and not path.exists()


def test_too_many_rejects_stop_the_run(write_rows, start, tmp_path):
    text = write_rows(*({"text": "once"} for _ in range(60)), *({"text": ""} for _ in range(10)), "{", name="bad.jsonl")
    path = tmp_path / "rejects.jsonl"
    config = dataclasses.replace(DATA, train=(text,), max_reject_share=0.03, rejects=path)
    message = r"31 of \d+ rows cannot be used, over the share of 0.03 .*\n.*bad.jsonl:\d+: (the text is empty|not JSON)"
    with pytest.raises(InputError, match=message) as caught:
        take(start(config), 400)
    assert str(path) in str(caught.value) and len(path.read_text().splitlines()) >= 3
    # 11 of 71 rows are under one in five, however long it goes on
    assert take(start(dataclasses.replace(config, max_reject_share=0.2)), 20)


def test_data_that_have_changed_are_refused(rows, write_rows, start, tmp_path):
    config = dataclasses.replace(DATA, train=(rows,))
    state = start(config).get_state()
    for change, message in (
        (dict(seed=3), "seed was 0 and is 3"),
        (dict(tokens=300), "tokens was 256 and is 300"),
        (dict(train=(write_rows({"text": "a"}, name="b.jsonl"),)), "rows of data.train was [22] and is [1]"),
    ):
        with pytest.raises(ConfigError, match=re.escape(message)):
            start(dataclasses.replace(config, **change), state)
    moved = tmp_path / "moved" / "rows.jsonl"
    moved.parent.mkdir()
    (tmp_path / "rows.jsonl").rename(moved)
    start(dataclasses.replace(config, train=(str(moved),), workers=1, max_reject_share=0.5), state)


def test_a_waiting_row_that_is_gone_is_named(write_rows, start, tmp_path):
    picture = tmp_path / "a.jpg"
    picture.write_bytes((MEDIA / "picture.jpg").read_bytes())
    rows = write_rows(talk("<image>", images=["a.jpg"]))
    batches = start(dataclasses.replace(DATA, train=(rows,)))
    ((_, _, state),) = take(batches, 1)
    assert state["streams"]["0"]["waiting"]
    picture.unlink()
    with pytest.raises(InputError, match=r"could be used before cannot be used now: .*rows.jsonl:1: .*a.jpg"):
        start(dataclasses.replace(DATA, train=(rows,)), state)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(train=()), "data.train is empty"),
        (dict(weights=(1.0, 2.0)), "data.weights has 2 numbers, but data.train 1 files"),
        (dict(weights=(0.0,)), "data.weights must be finite and over 0"),
        (dict(weights=(float("nan"),)), "data.weights must be finite and over 0"),
        (dict(seed=2**32), "data.seed must be from 0 to 4294967295, got 4294967296"),
        (dict(streams=3), "data.rows is 2, which data.streams, 3, must divide"),
        (dict(streams=1), "data.streams is 1, but must be a multiple of the 2 processes; data.streams=2 gives"),
        (dict(tokens=1), "data.tokens must be at least 2, got 1"),
        (dict(lookahead=0), "data.lookahead must be at least 1"),
        (dict(max_reject_share=1.0), "data.max_reject_share must be from 0 to below 1, got 1.0"),
    ],
)
def test_configurations_that_are_refused(change, message):
    config = dataclasses.replace(DATA, train=("a.jsonl",), streams=2)
    with pytest.raises(ConfigError, match=re.escape(message)):
        dataclasses.replace(config, **change).check(2)
    config.check(2)

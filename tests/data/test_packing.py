import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from omni_jax.data.examples import make_example
from omni_jax.data.packing import Budget, Part, assemble, fill
from omni_jax.models.thinker import Thinker, abstract_params
from omni_jax.processing.collate import collate
from omni_jax.processing.layout import AudioInput, lay_out
from tests.data.conftest import PICTURE, VIDEO, WAV
from tests.processing.test_collate import CONFIG, features, pictures, sounds, videos
from tests.processing.test_layout import marked
from tests.rope_index import expand_table

BUDGET = Budget(rows=2, tokens=400, spans=20, blocks=4, canvases=5, windows=9)
# logits of a random model are about 1; a packed row sums its attention in another order than a row alone
LOGITS_TOLERANCE = 2e-4


def prompt_of(items):
    return lay_out([1, *[t for item in items for t in marked(item)], 2, 3], items, CONFIG.thinker_config)


prompts = st.lists(st.one_of(pictures, videos, sounds, st.tuples(videos, sounds)), max_size=3).map(prompt_of)


def example_of(prompt, name="row"):
    return make_example(prompt, np.arange(len(prompt)) % 3 / 2.0, name, CONFIG)


def packed(prompts, budget=BUDGET):
    """A part, and which of the prompts are in it."""
    part = Part(budget)
    inside = [prompt for prompt in prompts if part.place(example_of(prompt))]
    return part, inside


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.lists(prompts, max_size=5), min_size=1, max_size=2), st.integers(0, 2))
def test_every_token_of_every_example_is_there_with_its_own_feature(parts, first):
    """And with the position ids that it has alone."""
    filled = [packed(part) for part in parts]
    streams = first + len(parts)
    batch = assemble([part for part, _ in filled], BUDGET, CONFIG, first=first, streams=streams)
    inputs = batch.inputs
    assert inputs.tokens.shape == (2 * len(parts), 400) and inputs.spans.begin.shape == (2 * len(parts), 20)
    assert inputs.audio.mel.shape[0] == 4 * len(parts) and inputs.vision[0].patches.shape[:2] == (5 * len(parts), 9)
    found = whole_features(inputs, first, streams)
    ids, _ = expand_table(inputs.spans, inputs.segment_ids)
    for i, (part, inside) in enumerate(filled):
        for placed, prompt in zip(part.placed, inside, strict=True):
            own = (2 * i + placed.row, slice(placed.begin, placed.begin + len(prompt)))
            assert (inputs.segment_ids[own] == placed.segment).all()
            np.testing.assert_array_equal(inputs.tokens[own], prompt.tokens)
            alone = collate([prompt], CONFIG)
            expected, _ = expand_table(alone.spans, alone.segment_ids)
            np.testing.assert_array_equal(ids[:, *own], expected[:, 0, : len(prompt)])
            wants = alone.media_index[0, : len(prompt)]
            np.testing.assert_array_equal(inputs.media_index[own] < 0, wants < 0)
            if (wants >= 0).any():
                values = features(alone)[wants[wants >= 0]]
                np.testing.assert_array_equal(found[inputs.media_index[own][wants >= 0]], values)
            weights = np.arange(len(prompt)) % 3 / 2
            np.testing.assert_array_equal(batch.targets[own][:-1], prompt.tokens[1:])
            np.testing.assert_allclose(batch.weights[own], [*weights[1:], 0])
    assert inputs.segment_ids.astype(bool).sum() == sum(len(p) for _, inside in filled for p in inside)


def whole_features(inputs, first, streams):
    """What the encoders would give for the batch of all streams; NaN for those of other processes."""
    here = features(dataclasses.replace(inputs, vision=[v.replace(valid=v.valid > 0) for v in inputs.vision]))
    sound, own = streams * BUDGET.blocks * 50, inputs.audio.mel.shape[0] * 50
    per_stream = BUDGET.canvases * BUDGET.windows * 16
    out = np.full(sound + streams * per_stream, np.nan)
    out[first * BUDGET.blocks * 50 :][:own] = here[:own]
    out[sound + first * per_stream :][: len(here) - own] = here[own:]
    return out


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(prompts, max_size=6))
def test_frames_of_a_canvas_are_told_apart(prompts):
    part, inside = packed(prompts)
    batch = assemble([part], BUDGET, CONFIG, first=0, streams=1)
    (canvases,) = batch.inputs.vision
    frames = [t for prompt in inside for m in prompt.media if not isinstance(m, AudioInput) for t in range(m.grid[0])]
    assert canvases.valid.max(axis=(1, 2)).sum() == len(frames)
    patches = sum(len(m.patches) for p in inside for m in p.media if not isinstance(m, AudioInput))
    assert (canvases.valid > 0).sum() == patches
    # a window is of one frame, and the windows of a frame lie side by side
    for canvas in canvases.valid:
        numbers = canvas.max(axis=-1)
        assert all(set(window) <= {0, n} for window, n in zip(canvas, numbers, strict=True))
        assert (np.diff(numbers[numbers > 0]) >= 0).all() and (np.diff(np.flatnonzero(numbers)) == 1).all()


def test_a_budget_holds_for_every_axis():
    text = prompt_of([])
    budget = Budget(rows=1, tokens=3 * len(text), spans=2, blocks=0, canvases=0, windows=1)
    part, inside = packed([text] * 3, budget)
    assert len(inside) == 2 and not part.full  # spans
    part, inside = packed([text] * 4, dataclasses.replace(budget, spans=9))
    assert len(inside) == 3 and part.full
    batch = assemble([part], dataclasses.replace(budget, spans=9), CONFIG, first=0, streams=1)
    assert batch.inputs.audio is None and batch.inputs.vision == ()
    assert fill(batch).tokens == 1.0 and fill(batch).examples == 3 and fill(batch).audio_blocks == 0.0


def test_an_example_goes_to_the_fullest_row():
    texts = [lay_out([1] * n, [], CONFIG.thinker_config) for n in (6, 5, 4)]
    part, inside = packed(texts, Budget(rows=2, tokens=10, spans=9, blocks=0, canvases=0, windows=1))
    assert len(inside) == 3 and [(p.row, p.begin) for p in part.placed] == [(0, 0), (1, 0), (0, 6)]


def test_an_empty_part_has_the_shapes_of_a_full_one(config):
    empty = assemble([Part(BUDGET)], BUDGET, CONFIG, first=0, streams=1)
    full = assemble([packed([prompt_of([])])[0]], BUDGET, CONFIG, first=0, streams=1)
    assert jax.tree.map(lambda a: (a.shape, a.dtype), empty) == jax.tree.map(lambda a: (a.shape, a.dtype), full)
    assert dataclasses.asdict(fill(empty)) == dict.fromkeys(dataclasses.asdict(fill(empty)), 0)


@pytest.fixture(scope="module")
def dialogues(processor):
    """A text, a sound, pictures of several sizes, a video with its sound, and two media in one."""
    small = processor.with_pixels(max_pixels=224 * 224, video_max_pixels=112 * 112)
    contents = [
        [{"type": "text", "text": "hello world"}],
        [{"type": "audio", "audio": WAV}],
        [{"type": "image", "image": PICTURE}],
        [{"type": "image", "image": PICTURE, "max_pixels": 112 * 84}, {"type": "text", "text": "what?"}],
        [{"type": "video", "video": VIDEO}],
        [{"type": "image", "image": PICTURE, "max_pixels": 84 * 84}, {"type": "audio", "audio": WAV, "audio_end": 1.0}],
    ]
    return [
        small.dialogue([{"role": "user", "content": content}, {"role": "assistant", "content": "A disc."}])
        for content in contents
    ]


def test_media_may_come_in_the_dtype_that_the_encoders_compute_in(dialogues, config):
    """Half as many bytes, and to the bit the same features."""
    budget = Budget(rows=2, tokens=512, spans=32, blocks=8, canvases=4, windows=8)
    part = Part(budget)
    for i, (prompt, replies) in enumerate(dialogues):
        assert part.place(make_example(prompt, replies + 1.0, str(i), config))
    whole = assemble([part], budget, config, first=0, streams=1).inputs
    half = assemble([part], budget, config, first=0, streams=1, media_dtype=jnp.bfloat16).inputs
    assert half.audio.mel.nbytes * 2 == whole.audio.mel.nbytes and whole.audio.mel.any()
    assert half.vision[0].patches.nbytes * 2 == whole.vision[0].patches.nbytes and whole.vision[0].patches.any()

    model = Thinker(config.thinker_config, dtype=jnp.bfloat16)
    rng = np.random.default_rng(0)
    shapes = nn.unbox(abstract_params(model))
    params = jax.tree.map(lambda x: (0.1 * rng.standard_normal(x.shape)).astype(np.float32), shapes)
    for method, of in (("encode_audio", lambda batch: batch.audio), ("encode_vision", lambda batch: batch.vision[0])):
        encode = jax.jit(functools.partial(model.apply, {"params": params}, method=method))
        np.testing.assert_array_equal(encode(of(half)), encode(of(whole)))


def test_a_packed_example_has_the_logits_that_it_has_alone(dialogues, config):
    budget = Budget(rows=2, tokens=512, spans=32, blocks=8, canvases=4, windows=8)
    part = Part(budget)
    examples = [make_example(prompt, replies + 1.0, str(i), config) for i, (prompt, replies) in enumerate(dialogues)]
    assert all(part.place(example) for example in examples)
    batch = assemble([part], budget, config, first=0, streams=1).inputs
    assert max(p.segment for p in part.placed) >= 2 and batch.vision[0].valid.max() >= 2

    model = Thinker(config.thinker_config)
    # drawn on the host: an init of the whole model would be one more program to compile
    rng = np.random.default_rng(0)
    shapes = nn.unbox(abstract_params(model))
    params = jax.tree.map(lambda x: (0.1 * rng.standard_normal(x.shape)).astype(np.float32), shapes)
    run = jax.jit(lambda batch: model.apply({"params": params}, batch))
    logits = np.asarray(run(batch))
    each = np.asarray(run(collate([prompt for prompt, _ in dialogues], config)))  # one a row
    for placed, (prompt, _), row in zip(part.placed, dialogues, each, strict=True):
        expected = row[: len(prompt)]
        found = logits[placed.row, placed.begin : placed.begin + len(prompt)]
        np.testing.assert_allclose(found, expected, atol=LOGITS_TOLERANCE)
        assert np.abs(expected).max() > 0.1

"""TMRoPE against the reference on random layouts: ids and deltas exact."""

from types import SimpleNamespace

import numpy as np
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers.models.qwen2_5_omni.modeling_qwen2_5_omni import (
    Qwen2_5OmniPreTrainedModelForConditionalGeneration as Reference,
)

from omni_jax.config import OmniConfig
from omni_jax.processing.layout import audio_tokens
from omni_jax.segments import Grid, Interleaved, interleave
from tests.rope_index import rope_index

THINKER = OmniConfig.qwen2_5_omni_7b().thinker_config
MERGE = 2

seconds = st.one_of(
    st.sampled_from([1.0, 0.5, 2.0, 4.0]), st.floats(0.05, 6.0), st.integers(1, 60).map(lambda f: 2 / f)
)
grid = st.tuples(st.integers(1, 6), st.integers(1, 5), st.integers(1, 5))
text = st.integers(1, 12).map(lambda n: ("text", n))
image = st.tuples(st.integers(1, 7), st.integers(1, 7)).map(lambda g: ("image", (1, *g)))
sound = st.integers(3, 700).map(lambda frames: ("audio", frames))
video = st.tuples(st.just("video"), grid, seconds, st.integers(3, 700))


@st.composite
def batches(draw):
    """Arguments of get_rope_index for up to three rows; under the flag every video has its sound."""
    flag = draw(st.booleans())
    inputs = dict(image_grid_thw=[], video_grid_thw=[], second_per_grids=[], audio_seqlens=[])
    rows = []
    for _ in range(draw(st.integers(1, 3))):
        parts = draw(st.lists(st.one_of(text, image, sound, video), min_size=1, max_size=6))
        row = [token for part in parts for token in lay_out(part, flag, inputs)]
        # for a text row of one token the reference takes the id of the padding, 1, as its largest
        rows.append(row if len(row) > 1 else [*row, 1000])
    length = max(map(len, rows)) + draw(st.integers(0, 3))
    left = draw(st.booleans())
    ids, mask = [], []
    for row in rows:
        pad = [THINKER.pad_token_id] * (length - len(row))
        ids.append(pad + row if left else row + pad)
        mask.append([0] * len(pad) + [1] * len(row) if left else [1] * len(row) + [0] * len(pad))
    return {k: v or None for k, v in inputs.items()} | dict(input_ids=ids, attention_mask=mask, use_audio_in_video=flag)


def lay_out(part, flag, inputs):
    """The tokens of one part, written down here without the package's own layout."""
    vision = THINKER.vision_start_token_id, THINKER.vision_end_token_id
    audio = THINKER.audio_start_token_id, THINKER.audio_end_token_id
    if part[0] == "text":
        return [1000 + i for i in range(part[1])]
    if part[0] == "audio":
        inputs["audio_seqlens"].append(part[1])
        return [audio[0], *[THINKER.audio_token_index] * audio_tokens(part[1]), audio[1]]
    t, height, width = part[1]
    inputs[f"{part[0]}_grid_thw"].append([t, height * MERGE, width * MERGE])
    if part[0] == "image":
        return [vision[0], *[THINKER.image_token_index] * (height * width), vision[1]]
    inputs["second_per_grids"].append(part[2])
    if not flag:
        return [vision[0], *[THINKER.video_token_index] * (t * height * width), vision[1]]
    inputs["audio_seqlens"].append(part[3])
    out = [vision[0], audio[0]]
    segment = Interleaved(Grid(t, height, width, part[2]), audio_tokens(part[3]))
    for chunk in interleave(segment, THINKER):
        token = THINKER.audio_token_index if chunk.is_audio else THINKER.video_token_index
        out += [token] * (chunk.end - chunk.begin)
    return [*out, audio[1], vision[1]]


def reference_rope_index(inputs):
    names = ("image_token", "video_token", "audio_token")
    config = {f"{name}_id": getattr(THINKER, f"{name}_index") for name in names}
    names = ("vision_start_token_id", "audio_start_token_id", "position_id_per_seconds", "seconds_per_chunk")
    config |= {name: getattr(THINKER, name) for name in names}
    model = SimpleNamespace(spatial_merge_size=MERGE, config=SimpleNamespace(**config))
    for method in ("get_llm_pos_ids_for_vision", "get_chunked_index"):
        setattr(model, method, getattr(Reference, method).__get__(model))
    given = {k: torch.tensor(v) if isinstance(v, list) else v for k, v in inputs.items()}
    ids, deltas = Reference.get_rope_index(model, **given)  # type: ignore[arg-type]
    return ids.numpy(), deltas.numpy()[:, 0]


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(batches())
def test_random_layouts(inputs):
    ids, deltas = rope_index(inputs, THINKER)
    expected_ids, expected_deltas = reference_rope_index(inputs)
    np.testing.assert_array_equal(ids, expected_ids)
    np.testing.assert_array_equal(deltas, expected_deltas)

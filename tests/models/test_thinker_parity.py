"""Both encoders and the whole Thinker against PyTorch, float32, random weights, several widths."""

from __future__ import annotations

import jax
import numpy as np
import torch

from omni_jax.models.thinker import Thinker
from omni_jax.processing.collate import collate
from omni_jax.processing.layout import AudioInput, VisionInput, lay_out
from tests.pairs import Pair, relative_error

# float32 sums in another order: some 1e-6 a layer at these depths, with room for the condition of random weights
TOLERANCE = 1e-4

FRAMES = (3, 57, 199, 200, 201, 403)  # mel frames: the shortest, within a block, around its edge, several blocks
# part of a window, a full one, edges, edges that share an entry of windows, a video
GRIDS = ((1, 4, 4), (1, 8, 8), (1, 6, 22), (1, 10, 18), (3, 8, 20))


def sounds(pair: Pair, rng: np.random.Generator) -> list[AudioInput]:
    bins = pair.config.thinker_config.audio_config.num_mel_bins
    return [AudioInput(rng.standard_normal((n, bins)).astype(np.float32)) for n in FRAMES]


def pictures(pair: Pair, rng: np.random.Generator) -> list[VisionInput]:
    dim = pair.config.thinker_config.vision_config.patch_dim
    return [
        VisionInput(rng.standard_normal((np.prod(g), dim)).astype(np.float32), g, "image" if g[0] == 1 else "video")
        for g in GRIDS
    ]


def gathered(pair: Pair, items: list, apply) -> np.ndarray:
    """The features of items as the tokens of a prompt would take them, in order."""
    config = pair.config.thinker_config
    token = {"audio": config.audio_token_index, "image": config.image_token_index, "video": config.video_token_index}
    kinds = ["audio" if isinstance(i, AudioInput) else i.kind for i in items]
    prompt = lay_out([token[k] for k in kinds], items, config)
    batch = collate([prompt], pair.config)
    index = batch.media_index[0, batch.mask[0]]
    return np.asarray(apply(batch))[index]


def test_audio_encoder(pair: Pair) -> None:
    items = sounds(pair, np.random.default_rng(0))
    with torch.no_grad():
        mel = torch.tensor(np.concatenate([i.mel for i in items]).T)
        lengths = torch.tensor(FRAMES)
        after = (lengths - 1) // 2 + 1
        theirs = pair.torch.audio_tower(mel, feature_lens=lengths, aftercnn_lens=after).last_hidden_state.numpy()
    for model, params in pair.models():
        encode = jax.jit(lambda p, a, model=model: model.apply({"params": p}, a, method="encode_audio"))
        ours = gathered(pair, items, lambda batch: encode(params, batch.audio))  # noqa: B023
        assert relative_error(ours, theirs) < TOLERANCE


def test_vision_encoder(pair: Pair) -> None:
    items = pictures(pair, np.random.default_rng(1))
    with torch.no_grad():
        patches = torch.tensor(np.concatenate([i.patches for i in items]))
        theirs = pair.torch.visual(patches, grid_thw=torch.tensor(GRIDS)).numpy()
    for model, params in pair.models():
        encode = jax.jit(lambda p, f, model=model: model.apply({"params": p}, f, method="encode_vision"))
        ours = gathered(pair, items, lambda batch: np.concatenate([encode(params, f) for f in batch.vision]))  # noqa: B023
        assert relative_error(ours, theirs) < TOLERANCE


def _mixed(pair: Pair, rng: np.random.Generator):
    """A prompt of text, two sounds, a picture and a silent video, and the reference's arguments for it."""
    c = pair.config.thinker_config
    audio = sounds(pair, rng)[1:5:3]
    vision = pictures(pair, rng)[3:]
    text = rng.integers(0, 500, 7).tolist()
    ids = [
        *(c.bos_token_id, *text[:3]),
        *(c.audio_start_token_id, c.audio_token_index, c.audio_end_token_id, *text[3:4]),
        *(c.vision_start_token_id, c.image_token_index, c.vision_end_token_id),
        *(c.audio_start_token_id, c.audio_token_index, c.audio_end_token_id, *text[4:]),
        *(c.vision_start_token_id, c.video_token_index, c.vision_end_token_id, *text),
    ]
    prompt = lay_out(ids, [audio[0], vision[0], audio[1], vision[1]], c)
    longest = max(len(a.mel) for a in audio)
    mel = np.stack([np.pad(a.mel, ((0, longest - len(a.mel)), (0, 0))) for a in audio])
    mask = np.stack([np.arange(longest) < len(a.mel) for a in audio])
    theirs = dict(
        input_ids=torch.tensor(prompt.tokens[None].astype(np.int64)),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        input_features=torch.tensor(mel.transpose(0, 2, 1)),
        feature_attention_mask=torch.tensor(mask),
        pixel_values=torch.tensor(vision[0].patches),
        image_grid_thw=torch.tensor([vision[0].grid]),
        pixel_values_videos=torch.tensor(vision[1].patches),
        video_grid_thw=torch.tensor([vision[1].grid]),
        video_second_per_grid=torch.tensor([1.0]),
    )
    return prompt, theirs


def test_logits(pair: Pair) -> None:
    prompt, arguments = _mixed(pair, np.random.default_rng(0))
    with torch.no_grad():
        theirs = pair.torch(**arguments).logits[0].numpy()
    batch = collate([prompt], pair.config)
    for model, params in pair.models():
        ours = jax.jit(lambda p, b, model=model: model.apply({"params": p}, b))(params, batch)
        assert relative_error(np.asarray(ours)[batch.mask], theirs) < TOLERANCE


def test_every_weight_matters(pair: Pair) -> None:
    """So that parity over random weights says something of each of them: none is constant, none is unused."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(pair.params):
        assert np.unique(leaf).size > 1, jax.tree_util.keystr(path)
    prompt, _ = _mixed(pair, np.random.default_rng(0))
    batch = collate([prompt], pair.config)
    model: Thinker = pair.models()[0][0]

    def total(params):
        logits = model.apply({"params": params}, batch)
        return (logits * np.asarray(batch.mask)[..., None] * np.arange(logits.shape[-1])).sum()

    unused = [
        jax.tree_util.keystr(path)
        for path, g in jax.tree_util.tree_leaves_with_path(jax.jit(jax.grad(total))(pair.params))
        if not np.any(g)
    ]
    # the one tensor that no release reads
    assert unused == ["['audio_encoder']['bos_eos']['embedding']"]

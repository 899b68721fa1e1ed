"""The Thinker over eight devices and over one; run by test_sharding.py in a process that pretends to have eight.

``forward MESHES`` prints one JSON line a mesh: its sizes, the largest relative difference, and how many arrays are
really sharded. ``reply MODEL CASES`` prints for each case {"parts", "mesh"} the token ids and the codes of a batch of
replies, and of a streamed one, which is spoken if the parts are all, without a mesh and with it.
"""

from __future__ import annotations

import json
import sys

import flax.linen as nn
import jax
import numpy as np

import omni_jax
from omni_jax.config import OmniConfig, TextConfig, ThinkerConfig
from omni_jax.models.thinker import Thinker, abstract_params
from omni_jax.processing.collate import collate
from omni_jax.processing.layout import AudioInput, Prompt, VisionInput, lay_out
from omni_jax.sharding import make_mesh, param_shardings


def make_prompts(config: OmniConfig) -> list[Prompt]:
    """Eight rows of unequal length, each with text, audio and a video."""
    c = config.thinker_config
    rng = np.random.default_rng(0)
    rows = []
    for i in range(8):
        audio = AudioInput(rng.standard_normal((130 + 40 * i, 128)).astype(np.float32))
        grid = (1 + i % 3, 4, 4 + 2 * i)
        patches = rng.standard_normal((np.prod(grid), c.vision_config.patch_dim)).astype(np.float32)
        ids = [int(token) for token in rng.integers(0, 500, 3 + i)]
        ids += [c.audio_start_token_id, c.audio_token_index, c.audio_end_token_id]
        ids += [c.vision_start_token_id, c.video_token_index, c.vision_end_token_id, 5]
        rows.append(lay_out(ids, [audio, VisionInput(patches, grid, "video")], c))
    return rows


def reply(folder: str, parts: str, sizes: dict[str, int]) -> None:
    picture = {"type": "image", "image": np.arange(56 * 84 * 3, dtype=np.uint8).reshape(56, 84, 3)}
    questions = [[picture, {"type": "text", "text": "What is it?"}], "hello", "a longer question of some words"]
    dialogues = [[{"role": "user", "content": content}] for content in questions]
    components = ("thinker",)
    speech = {}
    if parts == "all":
        components = None
        speech["modalities"] = ("text", "audio")
        speech["talker"] = dict(temperature=0.0, max_tokens=5, repetition_penalty=2.0)
    for mesh in (None, make_mesh(**sizes)):
        model = omni_jax.load(folder, mesh=mesh, components=components)
        replies = model.generate_batch(dialogues, max_tokens=12)
        *_, last = model.stream(dialogues[0], max_tokens=12, **speech)
        ids = [[r.token_ids, r.codec_ids] for r in (*replies, last.reply)]
        print(json.dumps({"devices": 1 if mesh is None else mesh.size, "ids": ids}), flush=True)


def forward(meshes: list[dict[str, int]]) -> None:
    text = TextConfig.tiny(num_key_value_heads=4)
    config = OmniConfig.tiny(thinker_config=ThinkerConfig.tiny(text_config=text))
    model = Thinker(config.thinker_config)
    batch = collate(make_prompts(config), config)
    boxed = abstract_params(model)
    rng = np.random.default_rng(1)
    params = jax.tree.map(lambda a: (0.3 * rng.standard_normal(a.shape)).astype(np.float32), nn.unbox(boxed))
    apply = jax.jit(lambda p, b: model.apply({"params": p}, b))
    alone = np.asarray(apply(params, batch))[batch.mask]
    for sizes in meshes:
        mesh = make_mesh(**sizes)
        placed = jax.device_put(params, param_shardings(boxed, mesh))
        sharded = sum(not leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(placed))
        with jax.set_mesh(mesh):
            together = np.asarray(apply(placed, batch))[batch.mask]
        error = float(np.abs(together - alone).max() / np.abs(alone).max())
        print(
            json.dumps({"mesh": sizes, "error": error, "sharded": sharded, "devices": jax.device_count()}), flush=True
        )


if __name__ == "__main__":
    if sys.argv[1] == "forward":
        forward(json.loads(sys.argv[2]))
    else:
        for case in json.loads(sys.argv[3]):
            reply(sys.argv[2], case["parts"], case["mesh"])

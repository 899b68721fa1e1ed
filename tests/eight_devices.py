"""The model over several devices and over one; run by test_sharding.py in a process that pretends to have them.

``forward MESHES`` prints one JSON line a mesh: its sizes, the largest relative difference, and how many arrays are
really sharded. ``reply MODEL CASES`` prints for each case {"parts", "mesh"} the token ids and the codes of a batch of
replies, and of a streamed one, which is spoken if the parts are all, without a mesh and with it. ``speak MODEL MESHES``
prints for each mesh how far the sound of whole replies and of a batch of streams is from that of one device, how many
programs a second call compiled, and how often the DiT's program for whole replies moves data between devices that have
rows of their own, and between those that share out the heads of the same rows.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import flax.linen as nn
import jax
import numpy as np

import omni_jax
from omni_jax.checkpoint import store
from omni_jax.checkpoint.voices import Voice
from omni_jax.config import OmniConfig, TextConfig, ThinkerConfig
from omni_jax.engine.decode_state import on_mesh
from omni_jax.engine.token2wav_engine import Token2WavEngine
from omni_jax.engine.token2wav_lists import ListRequest, fill_lists, solve_blocks
from omni_jax.engine.warmup import Compilations
from omni_jax.models.thinker import Thinker, abstract_params
from omni_jax.models.token2wav import Token2Wav
from omni_jax.models.token2wav import abstract_params as abstract_speech
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


def speak(folder: str, meshes: list[dict[str, int]]) -> None:
    params = store.load(Path(folder), ["token2wav"])["token2wav"]
    model = Token2Wav(OmniConfig.tiny().token2wav_config)
    one_device = Token2WavEngine(model, jax.device_put(params, jax.devices()[0]))
    lists, streams = make_sound(one_device), stream_sound(one_device)
    for sizes in meshes:
        mesh = make_mesh(**sizes)
        engine = Token2WavEngine(model, jax.device_put(params, param_shardings(abstract_speech(model), mesh)), mesh)
        errors = [largest_difference(make_sound(engine), lists), largest_difference(stream_sound(engine), streams)]
        with Compilations() as compilations:
            make_sound(engine)
            stream_sound(engine)
        line = {"mesh": sizes, "errors": errors, "compilations": compilations.count, **count_collectives(engine)}
        print(json.dumps(line), flush=True)


def make_voices(number: int) -> list[Voice]:
    config = OmniConfig.tiny().token2wav_config.dit_config
    rng = np.random.default_rng(0)
    voices = []
    for i in range(number):
        cond = rng.standard_normal((1, config.enc_emb_dim)).astype(np.float32)
        voices.append(Voice(f"voice {i}", 0, cond, rng.standard_normal((1, 20 + i, 80)).astype(np.float32)))
    return voices


def make_codes(*lengths: int) -> list[np.ndarray]:
    return [np.random.default_rng(length).integers(0, 30, length) for length in lengths]


def make_sound(engine: Token2WavEngine) -> list[np.ndarray]:
    """Of six whole replies, one list more than the others need."""
    rows = make_codes(60, *range(5, 30, 5))
    return engine.synthesize(rows, make_voices(6), [None] * 6, list(range(6)), (2, 6))


def stream_sound(engine: Token2WavEngine) -> list[np.ndarray]:
    """Of four streams, each of two chunks and an end."""
    stream = engine.stream(make_voices(4), list(range(4)), first_chunk_codes=24, chunk_codes=12)
    codes = make_codes(*range(36, 40))
    first = stream.push([row[:24] for row in codes], [False] * 4)
    rest = stream.push([row[24:] for row in codes], [True] * 4)
    return [np.concatenate(pieces) for pieces in zip(first, rest, strict=True)]


def largest_difference(found: list[np.ndarray], expected: list[np.ndarray]) -> float:
    return max(float(np.abs(a - b).max()) for a, b in zip(found, expected, strict=True))


def count_collectives(engine: Token2WavEngine) -> dict[str, int]:
    """Operations that move data between devices in the compiled program for whole replies, by who takes part."""
    config = engine.config.dit_config
    requests = [ListRequest(row, 0, None, 0) for row in make_codes(*range(5, 50, 5))]
    speech, _ = fill_lists(config, requests, engine.num_lists, lambda blocks: blocks)
    cond = np.zeros((1, config.enc_emb_dim), np.float32)
    with on_mesh(engine.mesh):
        speakers = np.zeros((1, 2, config.enc_dim))
        lowered = solve_blocks.lower(engine.dit, engine.solver, engine.dit_params, speech, speakers, cond)
    groups = re.findall(
        r" (?:all|collective|reduce)-[a-z-]+\(.*(?:replica_groups|pairs)=(\S+),", lowered.compile().as_text()
    )
    assert engine.mesh is not None
    # devices that share rows stand side by side: tensor is the last axis of the mesh
    tensor = engine.mesh.shape["tensor"]
    same_rows = f"[{engine.mesh.size // tensor},{tensor}]<=[{engine.mesh.size}]"
    between_heads = groups.count(same_rows)
    return {"between_heads": between_heads, "between_rows": len(groups) - between_heads}


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
    elif sys.argv[1] == "speak":
        speak(sys.argv[2], json.loads(sys.argv[3]))
    else:
        for case in json.loads(sys.argv[3]):
            reply(sys.argv[2], case["parts"], case["mesh"])

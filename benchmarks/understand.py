"""``bench.py understand``: the encoders, prefill and decoding."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np

from benchmarks.models import count_decoding_bytes, make_middle_config, write_model
from benchmarks.ours import OmniJaxSide
from benchmarks.pytorch_side import PyTorchSide
from benchmarks.report import case_records, check_at_least_one, print_cases, write_json
from benchmarks.runner import Case, run_cases
from benchmarks.side import Side, SideProcess
from omni_jax.config import OmniConfig

# what one usual request has
PROMPT_TOKENS = 1024
DECODED_TOKENS = 32
AUDIO_FRAMES = 3000  # 30 seconds
IMAGE_GRID = (1, 34, 46)  # a picture of 480 x 640, 391 tokens
BATCHES = (1, 8)


def understand(json_out: Path | None = None, repeats: int = 5) -> None:
    """Encoders, prefill and decoding at a middle width: Thinker 12 layers x 1024, encoders 4 layers as published.

    Example: python tools/bench.py understand --json-out out/understand.json

    Args:
      json_out: write the figures here as well.
      repeats: counted rounds of each case, after one that is not.
    """
    check_at_least_one(repeats=repeats)
    config = make_middle_config()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_model(folder, config)
        with SideProcess(OmniJaxSide, folder) as ours, SideProcess(PyTorchSide, folder) as pytorch:
            results = run_cases(make_cases(config), ours, pytorch, repeats)
    print_cases(results)
    write_json(json_out, case_records(results))


def make_cases(config: OmniConfig, num_tokens: int = PROMPT_TOKENS) -> list[Case]:
    """30 seconds of sound, a picture, a prompt of so many tokens, and replies to it."""
    # random inputs: times do not depend on what they are
    rng = np.random.default_rng(1)
    thinker = config.thinker_config
    mel = rng.standard_normal((AUDIO_FRAMES, thinker.audio_config.num_mel_bins), np.float32)  # [F, M]
    patches = rng.standard_normal((np.prod(IMAGE_GRID), thinker.vision_config.patch_dim), np.float32)  # [N, P]
    prompt = rng.integers(0, 500, num_tokens)  # [S], below the special tokens
    cases = [
        Case("audio encoder, 30 s", Side.encode_audio, (mel,)),
        Case("vision encoder, 480 x 640", Side.encode_image, (patches, IMAGE_GRID)),
        Case(f"prefill, {num_tokens} tokens", Side.prefill, (prompt,)),
    ]
    # a step reads all weights once, whatever the batch: the rate says how near it comes to the memory's
    gigabytes = count_decoding_bytes(config) / 1e9
    for batch in BATCHES:
        name = f"decoding a token, batch {batch}"
        args = (prompt, batch, DECODED_TOKENS)
        cases.append(Case(name, Side.decode_text, args, work=gigabytes, unit="GB/s of weights"))
    return cases

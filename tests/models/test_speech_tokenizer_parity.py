"""The speech tokenizer against the class of the same family's published tokenizer, on random weights."""

from __future__ import annotations

import re
from typing import Any

import flax.linen as nn
import numpy as np
import pytest
import torch
from flax.traverse_util import flatten_dict, unflatten_dict

from omni_jax.batch import AudioBlocks
from omni_jax.config import AudioEncoderConfig
from omni_jax.models.audio_encoder import valid_positions
from omni_jax.models.speech_tokenizer import SpeechTokenizer, abstract_params
from omni_jax.speech_tokenizer_config import SpeechTokenizerConfig
from tests.codec_oracle import load_encoder_class

TOLERANCE = 1e-4  # of hidden states of about 1, as of the encoders: float32, summed in another order
CONFIGS = {
    "one layer before": SpeechTokenizerConfig.tiny(),
    "two layers before, blocks of a second": SpeechTokenizerConfig(
        AudioEncoderConfig.tiny(
            d_model=40, encoder_attention_heads=2, encoder_layers=5, encoder_ffn_dim=160, n_window=50
        ),
        quantizer_layer=2,
        codebook_size=100,
        codebook_dim=40,
        mel_channels=16,
    ),
    "a codebook narrower than the layers": SpeechTokenizerConfig.tiny(codebook_dim=12),
}
# frames of each sound: full blocks and one that is not, an odd number of frames, less than a block
LENGTHS = {
    "one layer before": (120, 73, 39),
    "two layers before, blocks of a second": (230, 107),
    "a codebook narrower than the layers": (97,),
}
_MODULES = {
    "attention/query": "attn.query",
    "attention/key": "attn.key",
    "attention/value": "attn.value",
    "attention/out": "attn.out",
    "attention_norm": "attn_ln",
    "mlp/up": "mlp.0",
    "mlp/down": "mlp.2",
    "mlp_norm": "mlp_ln",
}
_OWN = {
    "conv1": "conv1",
    "conv2": "conv2",
    "project_in": "audio_quantizer.rvqs.0.layers.0.project_in",
    "project_out": "audio_quantizer.rvqs.0.layers.0.project_out",
    "proj": "proj",
    "quantized_proj": "project_after_vq_pe",
    "norm": "ln_post",
}


def tiny_ffn(config: SpeechTokenizerConfig) -> SpeechTokenizerConfig:
    """The reference's MLP is always four times as wide as its layers."""
    audio = AudioEncoderConfig(**{**vars(config.audio_config), "encoder_ffn_dim": 4 * config.audio_config.d_model})
    return SpeechTokenizerConfig(**{**vars(config), "audio_config": audio})


def to_torch(path: str, value: np.ndarray, first_layer: int) -> dict[str, np.ndarray]:
    """Names and values that a parameter of ours has there; none for what only ours has."""
    name, kind = path.rsplit("/", 1)
    suffix = "bias" if kind == "bias" else "weight"
    if name in _OWN:
        return {f"{_OWN[name]}.{suffix}": value.T}
    found = re.fullmatch(r"(?:front|back)/layers/(.*)", name)
    if found is None:
        return {}
    named = {}
    for number, layer in enumerate(value):
        # heads and their channels are one axis there: of what comes out of a kernel, or of what goes in
        if kind == "kernel":
            layer = layer.reshape(-1, layer.shape[-1]) if found[1] == "attention/out" else layer.reshape(len(layer), -1)
        else:
            layer = layer.reshape(-1)
        named[f"blocks.{first_layer + number}.{_MODULES[found[1]]}.{suffix}"] = layer.T
    return named


def make_params(config: SpeechTokenizerConfig, seed: int) -> dict[str, Any]:
    """Random, in all tensors."""
    rng = np.random.default_rng(seed)
    shapes = flatten_dict(nn.unbox(abstract_params(SpeechTokenizer(config))), sep="/")
    flat = {}
    for path, leaf in shapes.items():
        scale = 0.3 if path.endswith("kernel") else 1.0
        flat[path] = (scale * rng.standard_normal(leaf.shape) + (path.endswith("scale"))).astype(np.float32)
    return unflatten_dict(flat, sep="/")


def make_reference(config: SpeechTokenizerConfig, params: dict[str, Any]) -> Any:
    audio = config.audio_config
    model = load_encoder_class()(
        n_mels=audio.num_mel_bins,
        n_ctx=audio.max_source_positions,
        n_state=audio.d_model,
        n_head=audio.encoder_attention_heads,
        n_layer=audio.encoder_layers,
        n_window=audio.n_window,
        output_dim=audio.output_dim,
        audio_vq_layers=config.quantizer_layer,
        audio_vq_type="GRVQ",
        audio_vq_codebook_size=config.codebook_size,
        audio_vq_codebook_dim=config.codebook_dim,
        audio_vq_pe=True,
        audio_vq_ds_rate=1,
    )
    model.eval()
    state = model.state_dict()
    named: dict[str, np.ndarray] = {}
    for path, value in flatten_dict(params, sep="/").items():
        named |= to_torch(path, value, 0 if path.startswith("front") else config.quantizer_layer)
    quantizer = "audio_quantizer.rvqs.0."
    named[f"{quantizer}embed"] = params["quantizer"]["codebook"][None]
    unset = set(state) - set(named) - {f"{quantizer}{name}" for name in ("inited", "cluster_size", "embed_avg")}
    assert unset == {"positional_embedding", "audio_bos_eos_token.weight"}
    model.load_state_dict(
        {name: torch.tensor(np.ascontiguousarray(value)) for name, value in named.items()}, strict=False
    )
    return model


def cut(mel: np.ndarray, size: int) -> list[np.ndarray]:
    """A sound in blocks, the last of which may be shorter."""
    return [mel[begin : begin + size] for begin in range(0, len(mel), size)]


def run_reference(reference: Any, block: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes, projected vectors and output of a block.

    Blocks are given one by one: without flash attention the reference pads blocks to the longest one and then attends
    to the padding, for its mask is of booleans and stays true where it is filled with a large negative number.
    """
    positions = (len(block) + 1) // 2
    tokens = positions // 2
    arguments = ([torch.tensor(block.T)], [len(block)], [positions], [tokens + 2])
    with torch.no_grad():
        vectors, codes = reference(*arguments, return_indices=True)
        output, _ = reference(*arguments)
    # before and behind the tokens stands another one
    return codes.numpy(), vectors.numpy(), output.numpy()[1:-1]


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name", CONFIGS)
def test_codes_and_output(name: str, seed: int) -> None:
    config = tiny_ffn(CONFIGS[name])
    params = make_params(config, seed)
    reference = make_reference(config, params)
    rng = np.random.default_rng(seed + 10)
    size = config.audio_config.block_frames
    blocks = []
    for length in LENGTHS[name]:
        blocks += cut(rng.standard_normal((length, config.audio_config.num_mel_bins)).astype(np.float32), size)
    mel = np.zeros((len(blocks), size, config.audio_config.num_mel_bins), np.float32)
    for padded, block in zip(mel, blocks, strict=True):
        padded[: len(block)] = block
    audio = AudioBlocks(mel, np.array([len(block) for block in blocks], np.int32))

    model = SpeechTokenizer(config).bind({"params": params})
    valid = valid_positions(audio)
    codes = np.asarray(model.encode(audio))
    vectors, _ = model.quantize(model.features(audio))
    projected = model.project(vectors)
    output = model.output(model.hidden(projected, valid))
    for number, block in enumerate(blocks):
        their_codes, their_vectors, their_output = run_reference(reference, block)
        positions = len(their_codes)
        assert int(np.sum(valid[number])) == positions
        np.testing.assert_array_equal(codes[number, :positions], their_codes)
        np.testing.assert_allclose(projected[number, :positions], their_vectors, atol=TOLERANCE)
        np.testing.assert_allclose(output[number, : len(their_output)], their_output, atol=TOLERANCE)

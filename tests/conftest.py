"""What tests of several areas share. Nothing here imports PyTorch unless a test asks for it."""

from __future__ import annotations

import functools
import gc
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

# before JAX is imported, and for the processes that tests start
os.environ["JAX_DEFAULT_MATMUL_PRECISION"] = "highest"  # parity is a matter of float32
os.environ["JAX_COMPILATION_CACHE_DIR"] = str(Path(__file__).parents[1] / ".cache" / "jax")
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
if "PYTEST_XDIST_WORKER" in os.environ:
    # workers share the cores, and threads that wait for each other hold them up
    os.environ["OPENBLAS_NUM_THREADS"] = "1"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_cpu_multi_thread_eigen=false".strip()

import pytest

import tests.torchvision_stub  # noqa: F401
from omni_jax.checkpoint.convert import to_jax
from omni_jax.config import OmniConfig
from omni_jax.engine import token2wav_engine
from tests.bucket import gs  # noqa: F401, a fixture
from tools.make_checkpoint import write_checkpoint

# windows of the usual length take a second each with the compiler's cheap passes, and no length changes what comes out
# (engine/test_token2wav_engine.py); the processes that tests start have the usual ones
token2wav_engine.WINDOW_NEW_FRAMES = (32,)

# files that take minutes go first, so that no worker is left with one of them at the end
SLOW_FILES = """
    training/test_loop.py engine/test_scheduler.py serving/test_batch.py training/test_mesh.py
    models/test_token2wav_parity.py engine/test_token2wav_streaming.py security/test_isolation.py tools/test_aot.py
    engine/test_talker_engine_parity.py generation/test_stream.py generation/test_warmup.py data/test_pipeline.py
    training/test_talker.py training/test_talker_dpo.py training/test_speech_tokenizer_thinker.py
    training/test_code_matching.py training/test_speech_tokenizer.py
    models/test_dit_streaming.py training/test_step.py engine/test_talker_engine.py training/test_dry_run.py
    security/test_fuzz.py engine/test_thinker_engine_parity.py models/test_thinker_parity.py
    engine/test_token2wav_engine.py models/test_token2wav.py generation/test_quantization.py engine/test_pace.py
    models/test_talker_parity.py test_serve.py benchmarks/test_cases_parity.py checkpoint/test_export_parity.py
    benchmarks/test_latency_parity.py benchmarks/test_batch_parity.py test_readme.py serving/test_batch_cases.py
""".split()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Sorts tests by file, the slow ones first."""
    folder = Path(__file__).parent
    order = {folder / name: number for number, name in enumerate(SLOW_FILES)}
    items.sort(key=lambda item: order.get(item.path, len(order)))


# tracing makes many small objects that stay: looking for garbage among them, and among all imports, takes long
gc.freeze()
gc.set_threshold(50_000, 20, 20)

MODELS = [("tiny", 0), ("seven", 1), ("one", 2)]  # of tests/oracle.py, and a seed
# parity holds of each; the first is the plainest of them, and is left to ``make test-long``
PARITY_MODELS = [pytest.param(MODELS[0], marks=pytest.mark.long), *MODELS[1:]]
BOTH_FORMS = "seven"  # the one whose layers are compared scanned and single


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in the published layout with random numbers, in float32; not to be changed."""
    folder = tmp_path_factory.mktemp("tiny") / "checkpoint"
    write_checkpoint(folder, OmniConfig.tiny(), dtype="float32")
    return folder


@pytest.fixture(scope="session")
def tiny_model(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``tiny_checkpoint``, converted; not to be changed."""
    folder = tmp_path_factory.mktemp("tiny_model") / "model"
    to_jax(tiny_checkpoint, folder)
    return folder


def _load_once(tmp_path_factory: pytest.TempPathFactory, kind: str, load: Callable[..., Any]) -> Callable[..., Any]:
    """Makes each model once: pytest would make a parametrized one again when the next file asks for it."""
    from tests.oracle import CONFIGS

    @functools.cache
    def make(name: str, seed: int) -> Any:
        folder = tmp_path_factory.mktemp(kind)
        write_checkpoint(folder / "published", CONFIGS[name], seed=seed, dtype="float32")
        return load(folder / "published", folder / "ours", both_forms=name == BOTH_FORMS)

    return make


@pytest.fixture(scope="session")
def load_pair_once(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    from tests.pairs import load_pair

    return _load_once(tmp_path_factory, "pair", load_pair)


@pytest.fixture(scope="session")
def load_whole_once(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    from tests.pairs import load_whole

    return _load_once(tmp_path_factory, "whole", load_whole)


@pytest.fixture(scope="session", params=PARITY_MODELS, ids=lambda p: f"{p[0]}-{p[1]}")
def pair(request: pytest.FixtureRequest, load_pair_once):
    """A random Thinker in both implementations (tests.pairs.Pair)."""
    return load_pair_once(*request.param)


@pytest.fixture(scope="session", params=PARITY_MODELS, ids=lambda p: f"{p[0]}-{p[1]}")
def whole(request: pytest.FixtureRequest, load_whole_once):
    """A random model that can speak, in both implementations (tests.pairs.Whole)."""
    return load_whole_once(*request.param)

"""The voices of strangers' checkpoints: ``voices.npz``, which numpy's own reader would unfold and believe."""

from __future__ import annotations

import io
import os
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest

import omni_jax
from omni_jax.checkpoint import voices
from omni_jax.errors import CheckpointError


def npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def write_npz(path: Path, entries: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> None:
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in entries.items():
            archive.writestr(f"{name}.npy", data)


class TestArchive:
    """What the archive, its arrays and the voices in them may be."""

    def entries(self, name: str = "Chelsie") -> dict[str, bytes]:
        return {
            "names": npy(np.array([name])),
            "bos_tokens": npy(np.array([5])),
            "cond.0": npy(np.ones((1, 12), np.float32)),
            "ref_mel.0": npy(np.ones((1, 9, 80), np.float32)),
        }

    def complaint(self, folder: Path) -> str:
        with pytest.raises(CheckpointError) as e:
            voices.load_voices(folder)
        return str(e.value)

    def test_a_sound_one(self, tmp_path: Path) -> None:
        write_npz(tmp_path / "voices.npz", self.entries())
        assert list(voices.load_voices(tmp_path)) == ["Chelsie"]

    def test_what_unfolds(self, tmp_path: Path) -> None:
        entries = self.entries() | {"ref_mel.0": npy(np.zeros((1, 2**20, 80), np.float32))}
        write_npz(tmp_path / "voices.npz", entries, zipfile.ZIP_DEFLATED)
        assert "claims to hold more than its" in self.complaint(tmp_path)

    def test_what_is_compressed(self, tmp_path: Path) -> None:
        entries = {name: data + os.urandom(10**5) for name, data in self.entries().items()}
        write_npz(tmp_path / "voices.npz", entries, zipfile.ZIP_DEFLATED)
        assert "compressed" in self.complaint(tmp_path) or "claims" in self.complaint(tmp_path)

    def test_a_file_that_is_huge(self, tmp_path: Path) -> None:
        with (tmp_path / "voices.npz").open("wb") as file:
            file.truncate(2**40)
        assert "a file of voices has 67,108,864 at most" in self.complaint(tmp_path)

    @pytest.mark.parametrize("shape", [b"(1, 9999999999, 80)", b"(1, 9, 79)", b"(-1, -9, 80)", b"(" * 300 + b")" * 300])
    def test_a_header_that_claims_what_is_not_there(self, tmp_path: Path, shape: bytes) -> None:
        header = b"{'descr': '<f4', 'fortran_order': False, 'shape': " + shape + b"}\n"
        data = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + bytes(4 * 9 * 80)
        write_npz(tmp_path / "voices.npz", self.entries() | {"ref_mel.0": data})
        assert "is damaged" in self.complaint(tmp_path)

    @pytest.mark.parametrize(
        "header",
        [
            b"{'descr': '<f4', 'fortran_order': False, 'shape': (1, 9, 80)\n",
            b"{'descr': ('<f4',), 'fortran_order': False, 'shape': (1, 9, 80)}\n",
            b"{'descr': [(1,)], 'fortran_order': False, 'shape': (1, 9, 80)}\n",
            b"{'descr': '<f4', 'fortran_order': False, 'shape': ('a', 9, 80)}\n",
            b'"""\n',
            b"  1\n 2\n",
            b"\\",
        ],
    )
    @pytest.mark.filterwarnings("ignore:Reading `.npy`")
    def test_a_header_that_is_no_header(self, tmp_path: Path, header: bytes) -> None:
        data = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + bytes(4 * 9 * 80)
        write_npz(tmp_path / "voices.npz", self.entries() | {"ref_mel.0": data})
        assert "is damaged (an array whose header cannot be read" in self.complaint(tmp_path)

    @pytest.mark.parametrize(
        ("key", "value", "told"),
        [
            ("ref_mel.0", np.full((1, 9, 80), np.nan, np.float32), "not finite"),
            ("cond.0", np.ones((2, 12), np.float32), "must be [1, width]"),
            ("bos_tokens", np.array([-5]), "no token id"),
            ("bos_tokens", np.array([2**40]), "no token id"),
            ("names", np.array(["\x1b[31mred"]), "printable"),
            ("names", np.array(["x" * 10**5]), "printable"),
        ],
    )
    def test_what_is_no_voice(self, tmp_path: Path, key: str, value: np.ndarray, told: str) -> None:
        write_npz(tmp_path / "voices.npz", self.entries() | {key: npy(value)})
        assert told in self.complaint(tmp_path)

    def test_one_that_does_not_fit_the_model_is_not_loaded(self, tiny_model: Path, tmp_path: Path) -> None:
        model = Path(shutil.copytree(tiny_model, tmp_path / "model"))
        write_npz(model / "voices.npz", self.entries() | {"bos_tokens": npy(np.array([2**30]))})
        with pytest.raises(CheckpointError, match=r"bos_token 1073741824, but the vocabulary has 640 ids"):
            omni_jax.load(model)

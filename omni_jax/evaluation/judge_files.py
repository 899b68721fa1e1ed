"""Weights inside of Python packages, which are read only if they are the ones that are known.

Such packages are small publishers' copies of public weights, so each is pinned by its version and each file by its
SHA-256. Their code is not run to find the files.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

from omni_jax.errors import JudgeError

_BYTES_PER_READ = 1 << 20


@dataclass(frozen=True)
class Package:
    """A package of PyPI.

    Attributes:
      name: as ``pip install`` takes it.
      version: the only one whose files are known.
      advice: how it is installed.
    """

    name: str
    version: str
    advice: str = "pip install omni_jax[judges]"

    def check(self) -> Distribution:
        """What is installed of it.

        Raises:
          JudgeError: if that is nothing, or another version.
        """
        try:
            found = distribution(self.name)
        except PackageNotFoundError as e:
            raise JudgeError(f"{self.name} {self.version} is not installed: {self.advice}") from e
        if found.version != self.version:
            raise JudgeError(f"{self.name} is {found.version}, and only {self.version} is known: {self.advice}")
        return found

    def find_file(self, path: str, sha256: str) -> Path:
        """Where a file of it is, after a look at its contents.

        Raises:
          JudgeError: if it is not there or another.
        """
        return check_file(Path(str(self.check().locate_file(path))), sha256)


def hash_file(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while data := file.read(_BYTES_PER_READ):
            digest.update(data)
    return digest.hexdigest()


def check_file(path: Path, sha256: str) -> Path:
    """A file that has this SHA-256.

    Raises:
      JudgeError: if it is not there or another.
    """
    try:
        found = hash_file(path)
    except OSError as e:
        raise JudgeError(f"cannot read {path}: {e.strerror or e}") from e
    if found != sha256:
        raise JudgeError(f"{path} is not the file that is known: its SHA-256 is {found}, and should be {sha256}")
    return path

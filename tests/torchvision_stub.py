"""Lets the oracle's video processor import torchvision, of which it needs the Python half alone.

PyTorch's builds for processors have no torchvision of their own, and the compiled half of another build does not load
beside them. So the Makefile keeps one in a folder of its own inside the environment, where only these tests look; the
two operators that are missing by name are declared just before it is imported. Where the environment has a
torchvision, that one is used as it is.
"""

from __future__ import annotations

import importlib.abc
import importlib.util
import sys
from pathlib import Path
from typing import Any

FOLDER = Path(sys.prefix) / "torchvision"


class _DeclareOperators(importlib.abc.MetaPathFinder):
    """Finds nothing; sees that torchvision is about to be imported."""

    libraries: tuple[Any, ...] = ()  # a declaration lasts as long as its library

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name == "torchvision" and not self.libraries:
            import torch

            library = torch.library.Library("torchvision", "DEF")
            self.libraries = (library,)
            for operator in ("nms", "qnms"):
                library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


if str(FOLDER) not in sys.path and importlib.util.find_spec("torchvision") is None:
    sys.path.append(str(FOLDER))
if str(FOLDER) in sys.path:  # also where a process has its path from the one that started it
    sys.meta_path.insert(0, _DeclareOperators())

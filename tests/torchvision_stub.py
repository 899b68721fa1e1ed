"""Lets torchvision be imported beside a PyTorch that it was not compiled for.

The reference's video processor needs the Python half of torchvision alone. Its compiled half does not load, and then
two operators are missing by name when the package is imported; they are declared here just before.
"""

import importlib.abc
import sys


class _DeclareOperators(importlib.abc.MetaPathFinder):
    """Finds nothing; sees that torchvision is about to be imported."""

    libraries = ()  # a declaration lasts as long as its library

    def find_spec(self, name, path=None, target=None):
        if name == "torchvision" and not self.libraries:
            import torch

            library = torch.library.Library("torchvision", "DEF")
            self.libraries = (library,)
            for operator in ("nms", "qnms"):
                library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


if not any(type(finder).__name__ == "_DeclareOperators" for finder in sys.meta_path):
    sys.meta_path.insert(0, _DeclareOperators())

"""How clean a sound would be found by listeners: DNSMOS P.835 (Reddy et al. 2022), by speechmos.

Its wheel (MIT) holds the networks. They were trained to rate what noise suppressors leave of calls. Synthetic voices
are rated low however clear they are: compare a figure with that of the voice that is imitated.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from omni_jax.errors import JudgeError
from omni_jax.evaluation.judge_files import Package
from omni_jax.processing.audio import resample

_PACKAGE = Package("speechmos", "0.0.1.1")
_FILES = {
    "speechmos/dnsmos_models/sig_bak_ovr.onnx": "269fbebdb513aa23cddfbb593542ecc540284a91849ac50516870e1ac78f6edd",
    "speechmos/dnsmos_models/model_v8.onnx": "9246480c58567bc6affd4200938e77eef49468c8bc7ed3776d109c07456f6e91",
}
_RATE = 16_000  # that the networks take


class Quality(NamedTuple):
    """Opinion scores, 1 to 5.

    Attributes:
      overall: of the whole.
      speech: how undistorted the voice is.
      background: how unobtrusive the noise is.
    """

    overall: float
    speech: float
    background: float


class QualityJudge:
    """From sound to opinion scores.

    Attributes:
      name: of the package and its networks.
    """

    def __init__(self) -> None:
        """Checks the networks.

        Raises:
          JudgeError: if the package is not installed or another.
        """
        for path, sha256 in _FILES.items():
            _PACKAGE.find_file(path, sha256)
        try:
            from speechmos import dnsmos  # pyright: ignore[reportMissingImports], an extra
        except Exception as e:  # what it needs may be missing, or of another version
            raise JudgeError(f"cannot load speechmos: {type(e).__name__}: {e}; {_PACKAGE.advice}") from e
        self._dnsmos = dnsmos
        self.name = f"DNSMOS P.835, speechmos {_PACKAGE.version} (SHA-256 {next(iter(_FILES.values()))[:12]})"

    def rate(self, samples: Float[np.ndarray, " n"], rate: int) -> Quality:
        """Scores of a sound; a short one is repeated until it has nine seconds.

        Raises:
          JudgeError: if the sound is empty, or the library fails.
        """
        if not len(samples):
            raise JudgeError("the sound is empty")
        at_rate = np.clip(resample(samples.astype(np.float32), rate, _RATE), -1, 1)
        try:
            found: Any = self._dnsmos.run(at_rate, _RATE)  # of one sound, a dictionary
        except Exception as e:
            raise JudgeError(f"{self.name}: {type(e).__name__}: {e}") from e
        return Quality(float(found["ovrl_mos"]), float(found["sig_mos"]), float(found["bak_mos"]))

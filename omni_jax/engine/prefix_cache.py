"""Prompts that have been prefilled, kept so that the next turn of a dialogue need not prefill them again.

A dialogue is sent whole at every turn. Its prompt begins with that of the turn before, media included, so that only the
reply and the new message remain. What is kept is bounded in memory; what was not used for longest goes first.
"""

from __future__ import annotations

from collections import OrderedDict

from omni_jax.engine.outputs import Timings
from omni_jax.engine.prefill import Prefix
from omni_jax.engine.prompt_key import PromptKey

MIN_TOKENS = 64  # of a prompt that is worth keeping: fewer are one narrow chunk


class PrefixCache:
    """Prefixes by the prompts they are of."""

    def __init__(self, max_bytes: int):
        """``max_bytes`` are those of all arrays together."""
        self._max_bytes = max_bytes
        self._prefixes: OrderedDict[PromptKey, Prefix] = OrderedDict()

    @property
    def num_bytes(self) -> int:
        """Of all prefixes."""
        return sum(prefix.num_bytes for prefix in self._prefixes.values())

    def find(self, key: PromptKey, *, with_talker: bool, timings: Timings) -> Prefix | None:
        """A copy of the longest prefix that a prompt begins with.

        Args:
          key: of the prompt.
          with_talker: whether the Talker must have prefilled along.
          timings: to which its further times are added.
        """
        best: PromptKey | None = None
        for kept, prefix in self._prefixes.items():
            is_longer = best is None or len(kept) > len(best)
            if is_longer and (prefix.talker is not None or not with_talker) and kept.begins(key):
                best = kept
        if best is None:
            return None
        self._prefixes.move_to_end(best)
        return self._prefixes[best].fork(with_talker=with_talker, timings=timings)

    def add(self, key: PromptKey, prefix: Prefix) -> None:
        """Keeps the prefix of a whole prompt, which nobody may use up any more."""
        if len(key) < MIN_TOKENS or prefix.num_bytes > self._max_bytes:
            return
        # an earlier turn of the same dialogue is not asked for again, unless somebody answers it anew
        for kept, other in list(self._prefixes.items()):
            replaced = kept.begins(key) and (other.talker is None or prefix.talker is not None)
            if replaced or kept.equals(key):
                del self._prefixes[kept]
        self._prefixes[key] = prefix
        while self.num_bytes > self._max_bytes:
            self._prefixes.popitem(last=False)

    def clear(self) -> None:
        """Forgets all of them."""
        self._prefixes.clear()

"""What ladders of iteration counts have in common."""

from __future__ import annotations

from collections.abc import Sequence

from prdp_fem.refinement.settings import Iterations

__all__ = ["CountLadder"]


class CountLadder(Sequence):
    """A ladder whose levels are numbers of iterations, which its class chooses and gives."""

    _counts: range | tuple[int, ...]
    rtol_floor: float

    def __len__(self) -> int:
        return len(self._counts)

    def __contains__(self, setting) -> bool:
        if not isinstance(setting, Iterations) or setting.rtol_floor != self.rtol_floor:
            return False
        return setting.iterations in self._counts

    def __eq__(self, other) -> bool:
        if not isinstance(other, type(self)):
            return NotImplemented
        return (self._counts, self.rtol_floor) == (other._counts, other.rtol_floor)

    def __hash__(self) -> int:
        return hash((self._counts, self.rtol_floor))

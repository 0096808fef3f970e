"""What a score is summed up in: statistics that are fed block by block, merged over workers, and stored.

Every statistic is a pure function of the set of samples that it was fed (up to rounding), whatever the blocks, their
order and how many workers shared them, so that parts of a data set may be added and left out without reading the rest.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol, Self

import numpy as np


class Statistic(Protocol):
    """A mergeable summary of samples; each has an `update` of its own."""

    def merge(self, other: Self) -> None:
        """Takes in what another one, with the same settings, has seen."""
        ...

    def arrays(self) -> dict[str, np.ndarray]:
        """Its whole state, to be stored or sent."""
        ...

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> Self:
        """The statistic of that state."""
        ...

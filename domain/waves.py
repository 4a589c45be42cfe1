"""How a fleet is cut into waves."""

import math
from collections.abc import Sequence
from fractions import Fraction


def cut_waves(total: int, sizes: Sequence[Fraction | int]) -> list[int]:
    """Devices of each wave, from cumulative sizes: shares are rounded up, counts are capped at the fleet.

    A wave that an earlier one has already reached gets 0 devices.

    >>> cut_waves(60, [Fraction(5, 100), Fraction(25, 100), Fraction(1)])
    [3, 12, 45]
    """
    reached, cut = 0, []
    for size in sizes:
        upto = min(total, size if isinstance(size, int) else math.ceil(total * size))
        cut.append(max(0, upto - reached))
        reached = max(reached, upto)
    return cut

"""Whether a family of tasks is no worse than before: a proof, where a p above a bound is only a lack of one.

That every family is no worse is an intersection of claims, each of which must be proven: the test of all at level
alpha is every single one at alpha, without a correction (intersection-union; Berger 1982, Technometrics 24:295). The
chance to accept a candidate with some family worse than the margin is then at most alpha, however many families.
"""

from __future__ import annotations

import math
from statistics import NormalDist


def non_inferiority_p(n: int, num_gained: int, num_lost: int, margin: float) -> float:
    """One-sided p-value of: the candidate's success rate lies below the incumbent's by `margin` or more.

    Of n paired tasks the candidate alone solved `num_gained`, the incumbent alone `num_lost`. With the difference
    under the hypothesis d = -margin and q the likeliest P(lost) under it, the larger root of
    2n q^2 - (b + c - d(2n - b + c)) q - c d (1 - d) = 0 with b gained and c lost:

        z = (b - c + n margin) / sqrt(n (2q + d (1 - d))),  p = 1 - Phi(z)

    Source: Tango 1998, Statistics in Medicine 17:891 (score test for paired proportions). Its level holds for small
    samples and where nothing differs at all, where a Wald interval has no width. Raises ValueError on bad counts.
    """
    if not (0 < margin < 1 and n > 0 and min(num_gained, num_lost) >= 0 and num_gained + num_lost <= n):
        raise ValueError(f"need 0 < margin < 1 and gained + lost <= n: {num_gained}, {num_lost}, {n}, {margin}")
    d = -margin
    linear = -(num_gained + num_lost) + d * (2 * n - num_gained + num_lost)
    constant = -num_lost * d * (1 - d)
    q = (math.sqrt(linear * linear - 8 * n * constant) - linear) / (4 * n)
    variance = n * (2 * q + d * (1 - d))
    distance = num_gained - num_lost + n * margin
    if variance <= 0:
        return 0.0 if distance > 0 else 1.0
    return 1 - NormalDist().cdf(distance / math.sqrt(variance))

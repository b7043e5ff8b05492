"""Confidence intervals of proportions."""

from vitkit.errors import UsageError

Z95 = 1.959963984540054
"""The 97.5 % quantile of the normal distribution: two-sided 95 %."""


def wilson(hits: int, total: int, *, z: float = Z95) -> tuple[float, float]:
    """The Wilson score interval of a proportion of which `hits` of `total` samples were observed; by default of 95 %.

        (p + z²/2n ± z·√(p(1 − p)/n + z²/4n²)) / (1 + z²/n),   p = hits/n

    It stays within [0, 1], and holds its 95 % for small n and for p near 0 or 1, where p ± z standard errors does not. Without a sample it
    is (0, 1). Raises `UsageError` for hits outside 0 … total.

    Source: E. B. Wilson, Journal of the American Statistical Association 22, 1927; recommended by Brown, Cai and DasGupta, 2001.
    """
    if not 0 <= hits <= total:
        raise UsageError(f"hits is {hits} of {total}; expected 0 to {total}")
    if total == 0:
        return 0.0, 1.0
    share = hits / total
    middle = share + z * z / (2 * total)
    half = z * (share * (1 - share) / total + z * z / (4 * total * total)) ** 0.5
    scale = 1 + z * z / total
    low, high = (middle - half) / scale, (middle + half) / scale
    # Rounding would leave 1e-17 where the bound is exact.
    return (0.0 if hits == 0 else low), (1.0 if hits == total else high)


__all__ = ["Z95", "wilson"]

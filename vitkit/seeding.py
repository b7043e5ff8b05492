"""Seeds of random generators, derived from a run's seed and a position in it."""

import hashlib


def derive_seed(*parts: int | str) -> int:
    """A generator's seed that depends on every part; parts that differ by one give unrelated seeds.

    It hashes the parts, so that `derive_seed(0, 1)` and `derive_seed(1, 0)` differ. The result lies in [0, 2**56).
    """
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=7).digest(), "little")


__all__ = ["derive_seed"]

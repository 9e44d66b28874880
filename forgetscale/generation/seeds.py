"""One seed for each sample, turn, role and attempt, from a hash alone.

Neither rank, number of workers, batch nor time takes part, so who generates a sample does not
matter. Consecutive numbers would not do: engines that add an index to the seed of a request make
neighbours share noise.
"""

from __future__ import annotations

import hashlib

_ENGINE_SEEDS = 1 << 31


def sample_seed(run_key: str, sample_id: int, turn: int, role: str, attempt: int) -> int:
    """Return the seed of one turn of one sample, in 0..2^63 - 1.

    Args:
        run_key: Hash of everything that decides what is generated.
        sample_id: Number of the sample, >= 0.
        turn: Number of the turn, first = 0.
        role: Who writes it.
        attempt: Try, first = 0.
    """
    key = f"{run_key}\x1f{sample_id}\x1f{turn}\x1f{role}\x1f{attempt}".encode()
    digest = hashlib.blake2b(key, digest_size=8).digest()
    return int.from_bytes(digest, "big") & (2**63 - 1)


def engine_seed(seed: int) -> int:
    """Return ``seed`` for engines that hold seeds as 32-bit signed integers."""
    return seed % _ENGINE_SEEDS

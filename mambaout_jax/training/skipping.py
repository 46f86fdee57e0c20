"""Which batch of the data belongs to which step, where some are left out."""

from collections.abc import Iterator, Sequence
from typing import TypeVar

T = TypeVar("T")


def batch_number(steps: int, skipped: Sequence[int]) -> int:
    """Returns the number of the batch that follows `steps` steps; `skipped` are never used."""
    number = steps
    for left_out in sorted(skipped):
        number += left_out <= number
    return number


def skipping(batches: Iterator[T], first: int, skipped: Sequence[int]) -> Iterator[T]:
    """Yields the batches, of which the next is number `first`, but for those left out."""
    for number, batch in enumerate(batches, first):
        if number not in skipped:
            yield batch

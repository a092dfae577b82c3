"""Documents share rows, so that hardly a position is padding.

Best-fit decreasing (Johnson 1974): from the longest document to the shortest, each goes into the
fullest row that still has room for it.
"""

from collections.abc import Iterator

import numpy as np

# Documents are packed within windows of so many, so that any two may come to share a row.
WINDOW = 4096


def pack(lengths: np.ndarray, width: int, random: np.random.Generator) -> list[np.ndarray]:
    """Which documents share a row.

    Args:
        lengths: (n,) int; none longer than `width`.
        width: positions in a row.
        random: draws the windows.

    Returns:
        One array of indices for each row; every document is in exactly one.
    """
    shuffled = random.permutation(len(lengths))
    return [row for window in _windows(shuffled) for row in _best_fit(window, lengths, width)]


def _windows(indices: np.ndarray) -> Iterator[np.ndarray]:
    """Equal parts of about WINDOW: a small last one would be packed badly."""
    return iter(np.array_split(indices, max(1, round(len(indices) / WINDOW))))


def _best_fit(window: np.ndarray, lengths: np.ndarray, width: int) -> list[np.ndarray]:
    rows: list[list[int]] = []
    with_room: list[list[int]] = [[] for _ in range(width + 1)]  # free positions -> rows
    # Bit f is set where a row has f free positions: the least f >= n is found without a search.
    free_sizes = 0
    for index in window[np.argsort(-lengths[window], kind="stable")].tolist():
        n = int(lengths[index])
        fitting = free_sizes >> n
        if fitting:
            free = n + (fitting & -fitting).bit_length() - 1
            row = with_room[free].pop()
            if not with_room[free]:
                free_sizes ^= 1 << free
            rows[row].append(index)
        else:
            free, row = width, len(rows)
            rows.append([index])
        if free - n:
            with_room[free - n].append(row)
            free_sizes |= 1 << (free - n)
    return [np.array(row) for row in rows]

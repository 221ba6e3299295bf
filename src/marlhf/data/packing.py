"""Which examples share a sequence: packing for SFT."""

from __future__ import annotations

from collections import defaultdict
from heapq import heappop, heappush

import numpy as np


def pack(lengths: np.ndarray, size: int) -> np.ndarray:
    """Pack examples into groups of at most `size` tokens, by best-fit decreasing.

    lengths   int64 [N], each at most `size`

    Returns the group of each example, int64 [N], numbered by its longest example. An example goes
    into the group with the least room for it, the first of several.
    """
    groups = np.empty(len(lengths), int)
    with_room: defaultdict[int, list[int]] = defaultdict(list)  # tokens left -> heap of groups
    rooms = count = 0  # bit n of `rooms`: some group has n tokens left
    for index in np.argsort(-lengths, kind="stable"):
        length = int(lengths[index])
        left, group = size, count
        if fitting := rooms >> length:
            left = length + (fitting & -fitting).bit_length() - 1
            group = heappop(with_room[left])
            if not with_room[left]:
                rooms ^= 1 << left
        else:
            count += 1
        groups[index] = group
        heappush(with_room[left - length], group)
        rooms |= 1 << (left - length)
    return groups

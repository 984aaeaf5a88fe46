"""The tree of a Huffman code's prefixes, as `huffman_decode`'s kernel reads it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .checks import require

MAX_LENGTH = 12


@dataclass(frozen=True)
class Tree:
    """``links`` are the kernel's, ``sizes`` tell how many nodes each level has; ``symbols`` are in
    the order of their codes' lengths. ``lone`` is the lone symbol, or -1."""

    links: list[list[int]]
    sizes: list[int]
    symbols: list[int]
    lone: int


def build_tree(op: str, lengths: torch.Tensor, num_symbols: int) -> Tree:
    """The nodes of the prefixes' tree that have bits, in the order of their bits: of a level groups
    first, those of short codes before others, then inner nodes.

    Raises:
        ValueError: the lengths are no complete prefix code of at most 12 bits.
    """
    of_symbol = lengths.tolist()
    longest = max(of_symbol, default=0)
    require(longest <= MAX_LENGTH, op, "lengths", "code lengths of at most 12 bits", longest)
    used = sorted((s for s, n in enumerate(of_symbol) if n), key=lambda s: of_symbol[s])
    kraft = sum(1 << (MAX_LENGTH - of_symbol[s]) for s in used)
    lone = len(used) == 1 and longest == 1
    complete = kraft == 1 << MAX_LENGTH or lone or (num_symbols == 0 and not used)
    require(complete, op, "lengths", "a complete prefix code (Kraft sum of 4096/4096)", kraft)
    if lone or not used:
        return Tree([], [], used, used[0] if lone else -1)
    counts = [of_symbol.count(length) for length in range(MAX_LENGTH + 1)]
    links: list[list[int]] = []
    sizes: list[int] = []
    parents: list[list[int]] = []
    places = 1
    while places:
        level, children = len(sizes), []
        for bits in range(MAX_LENGTH + 1 - level):
            count = counts[level + bits] if level + bits else 0
            if not count >> bits & 1:
                continue
            first = sum(counts[1 : level + bits]) + (count >> bits + 1 << bits + 1)
            children.append(len(links) if bits else -1 - used[first])
            if bits:
                links.append([bits, first, 0])
        inner = [[0] for _ in range(places - len(children))]
        children += range(len(links), len(links) + len(inner))
        links += inner
        sizes.append(sum(child >= 0 for child in children))
        for i, parent in enumerate(parents):
            parent += children[2 * i : 2 * i + 2]
        parents, places = inner, 2 * len(inner)
    return Tree(links, sizes, used, -1)

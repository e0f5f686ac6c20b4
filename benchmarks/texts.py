"""Real text of mixed lengths that is always at hand: Python's own help topics."""

from __future__ import annotations

import random
from pydoc_data.topics import topics


def mixed(count: int, longest: int = 900, seed: int = 1) -> list[str]:
    """`count` distinct passages of 10 to `longest` characters, most of them short, in random order."""
    source = " ".join(" ".join(topics[name].split()) for name in sorted(topics))
    chance = random.Random(seed)
    texts: set[str] = set()
    while len(texts) < count:
        length = min(longest, int(chance.lognormvariate(4.6, 0.9)) + 10)
        start = chance.randrange(len(source) - length)
        texts.add(source[start : start + length])
    shuffled = sorted(texts)
    chance.shuffle(shuffled)
    return shuffled

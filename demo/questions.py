"""Questions that the demo model was trained on, with their right answers."""

from __future__ import annotations

import random
import zlib
from dataclasses import dataclass

LETTERS = "abcdefghijklmnopqrstuvwxyz"
HELD_OUT_SHARE = 20
"""One question in this many is kept out of training and used to measure accuracy."""


@dataclass(frozen=True, slots=True)
class Question:
    """A question in both of its forms: as a prompt to complete and as a chat message."""

    task: str
    prompt: str
    chat: str
    answer: str

    @property
    def held_out(self) -> bool:
        """Whether training must not see this question: decided by the question itself, the same on every machine."""
        return zlib.crc32(self.prompt.encode()) % HELD_OUT_SHARE == 0


def addition(rng: random.Random) -> Question:
    """The sum of two numbers below 100."""
    a, b = rng.randrange(100), rng.randrange(100)
    return Question("addition", f"{a}+{b}=", f"What is {a}+{b}?", str(a + b))


def reversal(rng: random.Random) -> Question:
    """A word of two to six letters, backwards."""
    word = "".join(rng.choice(LETTERS) for _ in range(rng.randint(2, 6)))
    return Question("reversal", f"reverse {word}=", f"Reverse {word}.", word[::-1])


def ordering(rng: random.Random) -> Question:
    """The letters of a word of two to five letters, sorted."""
    word = "".join(rng.choice(LETTERS) for _ in range(rng.randint(2, 5)))
    return Question("ordering", f"sort {word}=", f"Sort the letters of {word}.", "".join(sorted(word)))


TASKS = (addition, reversal, ordering)


def draw(rng: random.Random, *, held_out: bool) -> Question:
    """A random question, from those kept out of training or from the others."""
    while True:
        question = rng.choice(TASKS)(rng)
        if question.held_out == held_out:
            return question

"""Words and their numbers: lower-cased words seen at least five times (paper section 4.1)."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence

PAD, BOS, EOS, UNKNOWN = range(4)
SPECIAL = ("<pad>", "<bos>", "<eos>", "<unk>")
NEVER_EMITTED = (PAD, BOS, UNKNOWN)
LEAST_COUNT = 5
_OPPOSITE = {"left": "right", "right": "left", "leftmost": "rightmost", "rightmost": "leftmost"}

_WORD = re.compile(r"[a-z0-9]+(?:['’-][a-z0-9]+)*")


def tokenise(sentence: str) -> list[str]:
    """A raw sentence as lower-case words without punctuation, for data that comes without tokens."""
    return _WORD.findall(sentence.lower())


class Vocabulary:
    """A fixed list of words; the first four are padding, begin, end and unknown."""

    def __init__(self, words: Sequence[str]) -> None:
        if tuple(words[: len(SPECIAL)]) != SPECIAL or len(set(words)) != len(words):
            raise ValueError("a vocabulary starts with the four special words and has no word twice")
        self.words = tuple(words)
        self._number = {word: number for number, word in enumerate(self.words)}
        pairs = ((word, other) for word, other in _OPPOSITE.items() if word in self._number and other in self._number)
        self._opposite = {self._number[word]: self._number[other] for word, other in pairs}

    @classmethod
    def build(cls, captions: Iterable[Sequence[str]], least_count: int = LEAST_COUNT) -> Vocabulary:
        """From tokenised captions; words in order of falling count, ties by spelling."""
        counts = Counter(word for caption in captions for word in caption)
        kept = sorted((word for word, count in counts.items() if count >= least_count), key=lambda w: (-counts[w], w))
        return cls([*SPECIAL, *kept])

    def __len__(self) -> int:
        return len(self.words)

    def encode(self, tokens: Sequence[str]) -> list[int]:
        """Words to numbers, without BOS or EOS; unknown words become `UNKNOWN`."""
        return [self._number.get(token, UNKNOWN) for token in tokens]

    def mirrored(self, numbers: Iterable[int]) -> list[int]:
        """The caption of the mirrored photo: left and right change places."""
        return [self._opposite.get(number, number) for number in numbers]

    def decode(self, numbers: Iterable[int]) -> list[str]:
        """Numbers to words, up to EOS, special numbers left out."""
        words = []
        for number in numbers:
            if number == EOS:
                break
            if number >= len(SPECIAL):
                words.append(self.words[number])
        return words

"""Fluency and consistency of generated texts, with the definitions of the CounterFact benchmark (Meng et al. 2022)."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence

__all__ = ["InverseFrequencies", "ngram_entropy", "similarity"]

_TOKENS = re.compile(r"\w+(?:'\w+)?|[^\w\s]")
_WORDS = re.compile(r"\b\w\w+\b")
WEIGHTS = {2: 2 / 3, 3: 4 / 3}
"""Of the entropies of bigrams and trigrams, whose weighted ones are averaged."""


def ngram_entropy(text: str) -> float:
    """Weighted mean of the entropies, in bits, of a text's bigrams and trigrams: low where it repeats itself.

    sum_n w_n H_n / 2 with H_n = -sum_g p(g) log2 p(g), w_2 = 2/3 and w_3 = 4/3. Words and marks are told apart by a
    regular expression, where the published code takes NLTK's tokenizer: the figures differ by that. 0 for a text of
    fewer than two tokens.
    """
    tokens = _TOKENS.findall(text)
    total = 0.0
    for n, weight in WEIGHTS.items():
        counts = Counter(tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1))
        whole = sum(counts.values())
        total += weight * -sum(c / whole * math.log2(c / whole) for c in counts.values())
    return total / len(WEIGHTS)


class InverseFrequencies:
    """ln((1 + n) / (1 + df)) + 1 of the words of some texts, as scikit-learn's `TfidfVectorizer` has them by default.

    Words are two letters or more, in lower case; one that occurs in no text counts as nothing.

    Args:
        texts: at least one.

    Raises:
        ValueError: no texts.
    """

    def __init__(self, texts: Sequence[str]) -> None:
        if not texts:
            raise ValueError("InverseFrequencies: texts must hold at least one text, got none")
        found: Counter[str] = Counter()
        for text in texts:
            found.update(set(_WORDS.findall(text.lower())))
        self._values = {word: math.log((1 + len(texts)) / (1 + df)) + 1.0 for word, df in found.items()}

    def vector(self, text: str) -> dict[str, float]:
        """Term frequencies times inverse document frequencies."""
        counts = Counter(word for word in _WORDS.findall(text.lower()) if word in self._values)
        return {word: count * self._values[word] for word, count in counts.items()}


def similarity(first: str, second: str, inverse: InverseFrequencies) -> float:
    """Cosine between the TF-IDF vectors of two texts, in [0, 1]; 0 where one has no known word."""
    a, b = inverse.vector(first), inverse.vector(second)
    norm = _norm(a) * _norm(b)
    return sum(value * b[word] for word, value in a.items() if word in b) / norm if norm > 0 else 0.0


def _norm(vector: Mapping[str, float]) -> float:
    return math.sqrt(sum(value * value for value in vector.values()))

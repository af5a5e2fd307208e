"""Japanese texts for benchmarks, from a fixed seed: sentences of real paragraphs put together anew."""

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from common import SEED

# Where no paragraphs are given: words of these, by Zipf's law, joined by particles.
_KANJI: Final = [chr(code) for code in range(0x4E00, 0x4E00 + 1500)]
_KANA: Final = [chr(code) for code in range(0x30A2, 0x30F3)]
_PARTICLES: Final = ("は", "が", "を", "に", "で", "と", "の", "から", "まで", "している", "された", "である")


@dataclass(frozen=True, slots=True)
class Corpus:
    """Sentences to make texts of, and questions about them."""

    sentences: Sequence[str]
    questions: Sequence[str]

    def texts(self, count: int, length: int) -> list[str]:
        """``count`` texts of ``length`` characters."""
        chosen = random.Random(SEED)
        return [self._text(chosen, length) for _ in range(count)]

    def _text(self, chosen: random.Random, length: int) -> str:
        parts: list[str] = []
        missing = length
        while missing > 0:
            parts.append(chosen.choice(self.sentences))
            missing -= len(parts[-1])
        return "".join(parts)[:length]


def read_corpus(path: Path | None) -> Corpus:
    """Read a file of JSQuAD's shape (see retrieval.py); without one, make sentences up."""
    if path is None:
        return _invented()
    content = json.loads(path.read_text(encoding="utf-8"))
    sentences = [
        f"{sentence}。" for item in content["documents"] for sentence in item["text"].split("。") if len(sentence) > 5
    ]
    return Corpus(sentences, [item["question"] for item in content["questions"]])


def _invented() -> Corpus:
    chosen = random.Random(SEED)
    words = [
        "".join(chosen.choices(_KANJI if chosen.random() < 0.7 else _KANA, k=chosen.randint(1, 4)))
        for _ in range(20_000)
    ]
    weights = [1 / rank for rank in range(1, len(words) + 1)]

    def sentence(end: str) -> str:
        return "".join(word + chosen.choice(_PARTICLES) for word in chosen.choices(words, weights, k=6)) + end

    return Corpus([sentence("。") for _ in range(10_000)], [sentence("か？") for _ in range(1000)])

"""Search by word as a plain reading in Python: what the database should find, and in which order."""

import math
import random
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncSession

from kotonoha_store.words import WordQuery, Words, analyse, fold, parse_query

Ranking = list[tuple[float, int]]

WORDS = ["tower", "Towers", "night", "view", "nights", "the", "of", "a", "Tokyo", "running", "run"]
WORDS += ["2024", "v2", "x1", "ｗｉｄｅ", "café", "naïve", "İstanbul"]
JAPANESE = ["東京", "タワー", "夜景", "の", "は", "が", "梅雨", "北海道", "ｶﾞｲﾄﾞ", "とても", "美しい", "京都", "雨"]
PICTURES = ["😀", "☔", "👍"]
BETWEEN = [" ", " ", "", "、", "。", "\n", ", ", " 100% ", "_", "'", "\\", "-"]


def random_text(rng: random.Random, length: int) -> str:
    """Japanese, Latin, digits and pictures, with and without something between them."""
    parts = []
    for _ in range(length):
        kind = rng.random()
        parts.append(rng.choice(WORDS if kind < 0.45 else JAPANESE if kind < 0.9 else PICTURES))
        parts.append(rng.choice(BETWEEN))
    return "".join(parts).strip() or "x"


@dataclass(frozen=True)
class Known:
    """A chunk as the reference sees it."""

    id: int
    folded: str
    words: Words

    @classmethod
    def of(cls, chunk_id: int, title: str, content: str) -> "Known":
        return cls(chunk_id, fold(f"{title}\n{content}"), analyse(title, content))

    def holds(self, term: str, *, beginning: bool) -> bool:
        return any(held.startswith(term) for held in self.words.terms) if beginning else term in self.words.terms


async def frequencies(session: AsyncSession) -> dict[str, float]:
    rows = await session.execute(text("SELECT term, frequency FROM term_frequencies"))
    return dict(map(tuple, rows))


def weights(query: WordQuery, known: Mapping[str, float]) -> dict[str, float]:
    """BM25's rarity, times what a term weighs as grammar."""
    total = known.get("", 1.0)
    found = {}
    for (term, factor), beyond in zip(query.terms.items(), query.beyond(), strict=True):
        # What is looked up as the beginning of others is as common as all of them together.
        longer = min(1.0, sum(share for each, share in known.items() if each and term <= each < (beyond or term)))
        holding = max((known.get(term, 0.0) if beyond is None else longer) * total, 0.5)
        found[term] = factor * math.log(1 + max(total - holding + 0.5, 0) / (holding + 0.5))
    return found


def ranked(chunks: Iterable[Known], query_text: str, known: Mapping[str, float], match: str = "any") -> Ranking:
    """Score and id of all that is found, best first."""
    query = parse_query(query_text)
    weight = weights(query, known)
    # A lone character of Japanese is found wherever it stands: an ideograph always, a kana where it must be there.
    beginnings = dict(zip(query.terms, (found.endswith(":*") for found in query.lookups(query.terms)), strict=True))
    must = [found.endswith(":*") for found in query.lookups(query.loose, anywhere=True)]
    found = []
    for chunk in chunks:
        held = [term for term in query.terms if chunk.holds(term, beginning=beginnings[term])]
        has_all = all(chunk.holds(term, beginning=first) for term, first in zip(query.loose, must, strict=True))
        if not all(phrase.text in chunk.folded for phrase in query.phrases):
            continue
        if match == "all" and not has_all:
            continue
        if not query.phrases and match == "any" and not held:
            continue
        is_whole = match == "all" or not query.loose
        terms = query.terms if is_whole and query.phrases else held
        score = sum(
            weight[term] * (1.25 if term in chunk.words.repeated and not (is_whole and query.phrases) else 1)
            for term in terms
        )
        if match == "all":
            score = sum(weight.values())
        found.append((round(score, 9), chunk.id))
    return sorted(found, key=lambda pair: (-pair[0], pair[1]))

"""Search by word as a plain reading in Python: what the database should find, and in which order."""

import math
import random
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncSession

from kotonoha_store.word_statements import SELECTING_TERMS
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
    for term, lookup in zip(query.terms, query.lookups(query.terms), strict=True):
        share = known.get(term, 0.0)
        if lookup.endswith(":*"):
            share = min(sum(value for held, value in known.items() if held.startswith(term)), 1.0)
        holding = max(share * total, 0.5)
        found[term] = query.terms[term] * math.log(1 + max(total - holding + 0.5, 0) / (holding + 0.5))
    return found


def held_terms(chunk: Known, terms: Iterable[str], lookups: Iterable[str]) -> list[str]:
    pairs = zip(terms, lookups, strict=True)
    return [term for term, lookup in pairs if chunk.holds(term, beginning=lookup.endswith(":*"))]


def ranked(chunks: Iterable[Known], query_text: str, known: Mapping[str, float], match: str = "any") -> Ranking:
    """Score and id of all that is found, best first."""
    query = parse_query(query_text)
    weight = weights(query, known)
    heaviest = set(sorted(weight, key=lambda term: (-weight[term], term))[:SELECTING_TERMS])
    found: list[tuple[bool, float, int]] = []
    for chunk in chunks:
        held = held_terms(chunk, query.terms, query.lookups(query.terms))
        if not all(phrase.text in chunk.folded for phrase in query.phrases):
            continue
        if match == "all":
            loose = held_terms(chunk, query.loose, query.lookups(query.loose, anywhere=True))
            if len(loose) < len(query.loose):
                continue
        if not query.phrases and not held:
            continue
        # A phrase in the text itself, past the title's line, counts more than one in the title.
        in_text = sum(phrase.text in chunk.folded.partition("\n")[2] for phrase in query.phrases)
        if match == "all" or (query.phrases and not query.loose):
            # All that are found have all of it.
            found.append((not meets_guess(chunk, query), round(sum(weight.values()) + in_text, 9), chunk.id))
        else:
            score = sum(weight[term] * (1.25 if term in chunk.words.repeated else 1) for term in held) + in_text
            is_later = not meets_guess(chunk, query) if query.phrases else not heaviest & set(held)
            found.append((is_later, round(score, 9), chunk.id))
    # What has none of the heaviest terms comes after all that has one, and says so by its score.
    least = min((score for is_later, score, _ in found if not is_later), default=math.inf)
    found.sort(key=lambda hit: (hit[0], -hit[1], hit[2]))
    shown = [(min(score, least) if is_later else score, chunk_id) for is_later, score, chunk_id in found]
    # With phrases the blocks follow a guess, which is no weight.
    return [(score, chunk_id) for _, score, chunk_id in found] if query.phrases else shown


def meets_guess(chunk: Known, query: WordQuery) -> bool:
    """Whether the words stand where phrases that may lie within a word mostly do."""
    guesses = [phrase.guess for phrase in query.phrases if phrase.guess is not None]
    return all(chunk.holds(guess.removesuffix(":*").strip("'"), beginning=guess.endswith(":*")) for guess in guesses)

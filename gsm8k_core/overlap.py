"""What of a test split stands in training data: shared 13-grams, near-duplicates.

Shared 13-grams follow GPT-3's data analysis (Brown et al. 2020, section 4 and appendix C): a word
is lower-case, delimited by white space and free of punctuation; a test question is suspect when 13
words in a row of it, or all of it when it is shorter, occur in a training text.

Near-duplicates are found by the Jaccard similarity of the sets of 5-grams of words of a question
and a training text, every number replaced by the same placeholder: in word problems the usual
near-duplicate is the same story with other numbers. It is exact, through an inverted index, and
compares whole texts: a question quoted inside a long text is found by its 13-grams.

Training rows may have any form: every text in them counts, however nested, each by itself.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from heapq import nlargest
from typing import Any

from gsm8k_core.files import Json, encodable
from gsm8k_core.problems import Problem

NGRAM_WORDS = 13
SHINGLE_WORDS = 5
MIN_JACCARD = 0.3
"""GSM8K's questions with nothing in common lie below 0.1."""
LISTED_ROWS = 5
"""Training rows listed for one problem; all are counted."""
EXCERPT_CHARACTERS = 300

_PUNCTUATION = re.compile(r"[^\w\s]|_")
_NUMBER = re.compile(r"\S*\d\S*")


def words(text: str) -> list[str]:
    """Lower-case words, delimited by white space, without punctuation."""
    return _PUNCTUATION.sub("", text.lower()).split()


def ngrams(sequence: list[str], size: int) -> list[str]:
    """The runs of `size` words, in order; none where there are fewer words."""
    return [" ".join(sequence[i : i + size]) for i in range(len(sequence) - size + 1)]


def shingles(sequence: list[str]) -> set[str]:
    """Runs of SHINGLE_WORDS words with numbers masked; the whole where it is shorter."""
    masked = _NUMBER.sub("0", " ".join(sequence)).split()
    return set(ngrams(masked, min(SHINGLE_WORDS, len(masked)))) if masked else set()


def texts_in(value: Any) -> Iterator[str]:
    """Every text in a JSON value, in order, but for the keys of objects."""
    left = [value]
    while left:
        value = left.pop()
        if isinstance(value, str):
            yield value
        elif isinstance(value, dict):
            left.extend(reversed(value.values()))
        elif isinstance(value, list):
            left.extend(reversed(value))


class Text:
    """A training text with its words; runs of them are put together once for all test splits."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.words = words(text)
        self.shingles = shingles(self.words)
        self._ngrams: dict[int, list[str]] = {}

    def ngrams(self, size: int) -> list[str]:
        if size not in self._ngrams:
            self._ngrams[size] = ngrams(self.words, size)
        return self._ngrams[size]


@dataclass
class Found:
    """What training data holds of one test problem."""

    num_rows_sharing: int = 0
    sharing: list[Json] = field(default_factory=list)
    """The first LISTED_ROWS: file, row, id, the first shared n-gram."""
    num_rows_near: int = 0
    near: list[Json] = field(default_factory=list)
    """The LISTED_ROWS most similar: jaccard, file, row, id, excerpt."""
    identical: bool = False
    """A training text has the very same words."""


class TestIndex:
    """Test problems, indexed for one pass over the training data."""

    __test__ = False  # no test class of pytest's

    def __init__(self, problems: list[Problem]) -> None:
        self.problems = problems
        self.found = [Found() for _ in problems]
        self.num_words: list[int] = []
        self._ngrams: dict[int, dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
        self._shingles: dict[str, list[int]] = defaultdict(list)
        self._num_shingles: list[int] = []
        for index, problem in enumerate(problems):
            sequence = words(problem.question)
            self.num_words.append(len(sequence))
            size = min(NGRAM_WORDS, len(sequence))
            if size:
                for ngram in dict.fromkeys(ngrams(sequence, size)):
                    self._ngrams[size][ngram].append(index)
            masked = shingles(sequence)
            self._num_shingles.append(len(masked))
            for shingle in masked:
                self._shingles[shingle].append(index)

    def look_at(self, texts: list[Text], place: Json, min_jaccard: float) -> None:
        """Record what the texts of one training row hold of the problems; `place` names the row."""
        shared: dict[int, str] = {}
        near: dict[int, tuple[float, str]] = {}
        for text in texts:
            for index, ngram in self._shared(text):
                shared.setdefault(index, ngram)
                if self.num_words[index] == len(text.words):
                    same = words(self.problems[index].question) == text.words
                    self.found[index].identical |= same
            for index, similarity in self._near(text.shingles, min_jaccard):
                if similarity > near.get(index, (0.0, ""))[0]:
                    near[index] = (similarity, text.text)
        for index, ngram in shared.items():
            found = self.found[index]
            found.num_rows_sharing += 1
            if len(found.sharing) < LISTED_ROWS:
                found.sharing.append({**place, "ngram": ngram})
        for index, (similarity, whole) in near.items():
            found = self.found[index]
            found.num_rows_near += 1
            excerpt = encodable(whole[:EXCERPT_CHARACTERS])
            entry = {"jaccard": round(similarity, 3), **place, "excerpt": excerpt}
            found.near = nlargest(LISTED_ROWS, [*found.near, entry], key=lambda e: e["jaccard"])

    def _shared(self, text: Text) -> Iterator[tuple[int, str]]:
        for size, index_of in self._ngrams.items():
            for ngram in text.ngrams(size):
                for index in index_of.get(ngram, ()):
                    yield index, ngram

    def _near(self, own: set[str], min_jaccard: float) -> Iterator[tuple[int, float]]:
        common: Counter[int] = Counter()
        for shingle in own:
            common.update(self._shingles.get(shingle, ()))
        for index, number in common.items():
            similarity = number / (self._num_shingles[index] + len(own) - number)
            if similarity >= min_jaccard:
                yield index, similarity


def find_overlap(
    tests: dict[str, list[Problem]],
    training: Iterable[tuple[str, Iterable[Json]]],
    min_jaccard: float = MIN_JACCARD,
) -> Json:
    """The report, as JSON: of every test split, which problems share what with which rows.

    `tests` maps a split's name to its problems, `training` yields (name, rows); rows are streamed.
    """
    indexes = {name: TestIndex(problems) for name, problems in tests.items()}
    trained = []
    for file, rows in training:
        number = 0
        for number, row in enumerate(rows, start=1):
            texts = [Text(text) for text in texts_in(row)]
            own_id = row.get("id") if isinstance(row, dict) else None
            own_id = encodable(own_id) if isinstance(own_id, str) else own_id
            place = {"file": file, "row": number, "id": own_id}
            for index in indexes.values():
                index.look_at(texts, place, min_jaccard)
        trained.append({"file": file, "num_rows": number})
    return {
        "ngram_words": NGRAM_WORDS,
        "shingle_words": SHINGLE_WORDS,
        "min_jaccard": min_jaccard,
        "training": trained,
        "tests": [_summary(name, index) for name, index in indexes.items()],
    }


def _summary(name: str, index: TestIndex) -> Json:
    pairs = list(zip(index.problems, index.found, strict=True))
    near = [(problem, found) for problem, found in pairs if found.near]
    near.sort(key=lambda pair: -pair[1].near[0]["jaccard"])
    return {
        "file": name,
        "num_problems": len(pairs),
        "num_shorter": sum(number < NGRAM_WORDS for number in index.num_words),
        "num_sharing": sum(bool(found.sharing) for _, found in pairs),
        "num_near": len(near),
        "num_identical": sum(found.identical for _, found in pairs),
        "sharing": [
            {"id": problem.id, "num_rows": found.num_rows_sharing, "rows": found.sharing}
            for problem, found in pairs
            if found.sharing
        ],
        "near": [
            {
                "id": problem.id,
                "question": problem.question,
                "num_rows": found.num_rows_near,
                "rows": found.near,
            }
            for problem, found in near
        ],
    }

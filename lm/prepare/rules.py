"""Published rules for what text is good enough: pure functions of a text and of the rule's settings
(`lm.prepare.config`), which say the name of what was broken, or "".

Words are those of `lm.prepare.spacy_words`, as in datatrove's filters; `benchmarks/corpora.py`
compares the verdicts.
"""

import functools
import re
import string
import struct
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cached_property

import numpy as np

from lm.prepare import spacy_words

# --- tokens ---

TOKEN = np.dtype([("number", "<u4"), ("chars", "<u4"), ("kind", "<u4")])
# Kinds, added up.
WORD = 1  # not of punctuation alone
LETTERS = 2  # there is one in it
ENDS = 4  # a sentence
PUNCTUATION = 8
# Of Unicode's property Sentence_Terminal those of living scripts.
_TERMINAL = tuple(".!?．。｡！？﹒﹖﹗؟۔।॥։።፧᙮᠃᠉។៕၊။꓿⁇⁈⁉‼‽⸮")
# datatrove's punctuation. Other symbols, such as bullets, count as words.
_NO_WORD = frozenset(
    [*string.punctuation, *"—”：％１〈（）、━【「」，】；“《„’∶´–～«〉》…►»", *_TERMINAL]
)
_LONG = 64  # characters; longer chunks seldom come again


def _kind(token: str) -> int:
    """What a token counts as."""
    if token.isalpha():
        return WORD | LETTERS
    kind = 0 if _NO_WORD.issuperset(token) else WORD
    if any(map(str.isalpha, token)):
        return kind | LETTERS
    if token in _TERMINAL:
        kind |= ENDS
    if all(unicodedata.category(char)[0] == "P" for char in token):
        kind |= PUNCTUATION
    return kind


class _Vocabulary(dict):
    """What each chunk consists of, as the bytes of `TOKEN`s, kept for the next texts."""

    def __init__(self):
        self._records: dict[str, bytes] = {}
        self._chars = 0

    def __missing__(self, chunk: str) -> bytes:
        content = b"".join(map(self.record, spacy_words.split(chunk)))
        if len(chunk) <= _LONG:
            self[chunk] = content
            self._chars += len(chunk)

        return content

    def record(self, token: str) -> bytes:
        """Returns a token with its number, the bytes of a `TOKEN`."""
        record = self._records.get(token)
        if not record:
            record = struct.pack("<3I", len(self._records), len(token), _kind(token))
            self._records[token] = record
            self._chars += len(token)

        return record

    def is_full(self) -> bool:
        return len(self) > 1 << 18 or self._chars > 1 << 24


class Text:
    """A text, and what several rules ask of it."""

    _vocabulary = _Vocabulary()

    def __init__(self, text: str):
        self.text = text
        if Text._vocabulary.is_full():
            Text._vocabulary = _Vocabulary()
        self._vocabulary = Text._vocabulary

    @cached_property
    def tokens(self) -> np.ndarray:
        """Words, numbers and punctuation marks, `TOKEN` [tokens]."""
        chunks = self.text.split()
        return np.frombuffer(b"".join(map(self._vocabulary.__getitem__, chunks)), TOKEN)

    def has(self, word: str) -> bool:
        """Whether a word is one of the tokens."""
        number = np.frombuffer(self._vocabulary.record(word), TOKEN)["number"]
        return bool((self.tokens["number"] == number).any())

    @cached_property
    def lines(self) -> list[str]:
        return self.text.splitlines()


# --- C4 ---

_CITATION = re.compile(r"\[\d*\]|\[edit\]|\[citation needed\]")
_END_MARKS = (".", "?", "!", '"', "'")
POLICY = (
    "terms of use",
    "privacy policy",
    "cookie policy",
    "uses cookies",
    "use of cookies",
    "use cookies",
)


def c4(text: str, settings: Mapping) -> tuple[str, str, Counter]:
    """Returns (the text with the lines that stay, the rule that is broken or "", how many lines
    went by which rule).
    """
    kept = []
    gone: Counter = Counter()
    num_sentences = 0
    for line in text.splitlines():
        whole = line.strip()
        line = _CITATION.sub("", whole) if settings["citations"] and "[" in whole else whole
        if why := _bad_line(whole, line, settings):
            gone[why] += 1
            continue
        lowered = line.lower()
        if settings["lorem_ipsum"] and "lorem ipsum" in lowered:
            return text, "lorem_ipsum", gone
        if settings["javascript"] and "javascript" in lowered:
            gone["javascript"] += 1
            continue
        if settings["curly_bracket"] and "{" in line:
            return text, "curly_bracket", gone
        if settings["policy"] and any(phrase in lowered for phrase in POLICY):
            gone["policy"] += 1
            continue
        # How many more there are doesn't matter.
        if num_sentences < settings["min_sentences"]:
            num_sentences += sentences(line)
        kept.append(line)

    if num_sentences < settings["min_sentences"]:
        return text, "few_sentences", gone
    cleaned = "\n".join(kept).strip()
    if settings["bad_words"]:
        if _has_bad_words(cleaned.lower(), tuple(settings["bad_words"])):
            return text, "bad_words", gone

    return cleaned, "", gone


def _bad_line(whole: str, line: str, settings: Mapping) -> str:
    """What of a line's form is not as it should be; `line` is without its citations."""
    words = whole.split()
    if len(whole) > settings["max_word_chars"]:
        if any(len(word) > settings["max_word_chars"] for word in words):
            return "long_word"
    if settings["terminal_punctuation"]:
        if not line.endswith(_END_MARKS) or line.endswith("..."):
            return "no_end_mark"
    if len(words) < settings["min_words_of_line"]:
        return "few_words"
    return ""


def sentences(line: str) -> int:
    """Returns how many sentences there are in a line, 1 or more."""
    count = 1
    has_ended = False
    for kind in Text(line).tokens["kind"].tolist():
        if kind & ENDS:
            has_ended = True
        elif has_ended and not kind & PUNCTUATION:
            count += 1
            has_ended = False

    return count


def _has_bad_words(text: str, bad: tuple[str, ...]) -> bool:
    words, phrases = _bad_words(bad)
    if not words.isdisjoint(_WORD.findall(text)):
        return True
    return bool(phrases and phrases.search(text))


_WORD = re.compile(r"\w+")


@functools.lru_cache
def _bad_words(bad: tuple[str, ...]) -> tuple[frozenset[str], re.Pattern | None]:
    """Those that are one word, and a pattern of the others."""
    words = frozenset(filter(_WORD.fullmatch, bad))
    others = [re.escape(phrase) for phrase in bad if phrase not in words]
    return words, re.compile(rf"(?<!\w)(?:{'|'.join(others)})(?!\w)") if others else None


# --- Gopher ---


def gopher_quality(text: Text, settings: Mapping) -> str:
    """See `lm.prepare.config.GopherQuality`."""
    kinds = text.tokens["kind"]
    is_word = (kinds & WORD) > 0
    words = np.count_nonzero(is_word)
    if words < settings["min_words"]:
        return "few_words"
    if words > settings["max_words"]:
        return "many_words"
    mean = int(text.tokens["chars"][is_word].sum()) / max(words, 1)
    if not settings["min_mean_word"] <= mean <= settings["max_mean_word"]:
        return "mean_word"

    total = max(len(kinds), 1)
    if text.text.count("#") / total > settings["max_symbols"]:
        return "hashes"
    ellipses = text.text.count("...") + text.text.count("…")
    if ellipses / total > settings["max_symbols"]:
        return "ellipses"
    if broken := _gopher_lines(text, settings):
        return broken
    if np.count_nonzero(kinds & LETTERS) / total < settings["min_alphabetic_words"]:
        return "alphabetic_words"
    missing = settings["min_stop_words"]
    for word in set(settings["stop_words"]) if missing > 0 else ():
        missing -= text.has(word)
        if missing <= 0:
            break

    return "stop_words" if missing > 0 else ""


def _gopher_lines(text: Text, settings: Mapping) -> str:
    count = max(len(text.lines), 1)
    bullets = sum(line.lstrip().startswith(("•", "-")) for line in text.lines)
    if bullets / count > settings["max_bullet_lines"]:
        return "bullet_lines"
    ellipses = sum(line.rstrip().endswith(("...", "…")) for line in text.lines)
    return "ellipsis_lines" if ellipses / count > settings["max_ellipsis_lines"] else ""


def gopher_repetition(text: Text, settings: Mapping) -> str:
    """See `lm.prepare.config.GopherRepetition`."""
    chars = max(len(text.text), 1)
    for kind, parts in (("paragraph", _paragraphs(text.text)), ("line", _lines(text.text))):
        count, repeated_chars = repeated(parts)
        if count / len(parts) > settings[f"max_{kind}s"]:
            return f"{kind}s"
        if repeated_chars / chars > settings[f"max_{kind}_chars"]:
            return f"{kind}_chars"

    grams = _NGrams(text.tokens)
    for n in (2, 3, 4):
        grams.grow()
        if grams.top_chars() / chars > settings[f"max_top_{n}gram"]:
            return f"top_{n}gram"

    for n in range(5, 11):
        grams.grow()
        repeated_chars = grams.repeated_chars()
        # Where no n-gram occurs twice, no longer one does.
        if not repeated_chars:
            break
        if repeated_chars / chars > settings[f"max_{n}grams"]:
            return f"{n}grams"

    return ""


def _paragraphs(text: str) -> list[str]:
    """What two newlines or more divide."""
    return [part.lstrip("\n") for part in text.strip().split("\n\n") if part] or [""]


def _lines(text: str) -> list[str]:
    """What newlines divide; one at either end has an empty line beyond it."""
    lines = [line for line in text.split("\n") if line]
    return lines + [""] * (text.startswith("\n") + text.endswith("\n")) or [""]


def repeated(parts: Sequence[str]) -> tuple[int, int]:
    """Returns how many parts occurred before, and the characters in them."""
    seen = set(parts)
    if len(seen) == len(parts):
        return 0, 0
    count = chars = 0
    for part in parts:
        if part in seen:
            seen.remove(part)
        else:
            count += 1
            chars += len(part)

    return count, chars


class _NGrams:
    """The n-grams of a text, n = 1, 2, ..., of which those that occur once are let go: no longer
    one that begins with them occurs twice.
    """

    def __init__(self, tokens: np.ndarray):
        self._n = 1
        self._count = len(tokens)
        self._numbers = tokens["number"].astype(np.uint64)
        self._ends = np.zeros(len(tokens) + 1, np.int64)
        np.cumsum(tokens["chars"], out=self._ends[1:])

        # Where those that are left begin, and which n-gram each of them is.
        self._places = np.arange(len(tokens))
        self._which = self._numbers
        self._top = (0, 1)  # where the most frequent one begins first, and how often it occurs

    def grow(self) -> None:
        """Goes on to the next n."""
        places = self._places
        if len(places) and places[-1] + self._n == self._count:
            places = places[:-1]
        following = self._numbers[places + self._n]
        keys = (self._which[: len(places)] << np.uint64(32)) | following
        self._n += 1
        self._top = (0, 1)

        order = keys.argsort()
        ordered = keys[order]
        begins = (ordered[1:] != ordered[:-1]).nonzero()[0] + 1
        counts = np.concatenate([begins, [len(keys)]])
        counts[1:] -= begins
        most = int(counts.max())
        if most <= 1:
            self._places, self._which = places[:0], keys[:0]
            return

        # The first of those that are the most frequent.
        is_top = (counts == most).repeat(counts)
        self._top = (int(places[order[is_top].min()]), most)
        which = np.empty_like(keys)
        which[order] = np.arange(len(counts), dtype=np.uint64).repeat(counts)
        is_left = (counts > 1)[which]
        self._places, self._which = places[is_left], which[is_left]

    def top_chars(self) -> int:
        """Characters in all occurrences of the most frequent n-gram, the first of several."""
        if self._count < self._n:
            return 0
        place, times = self._top
        chars = int(self._ends[place + self._n] - self._ends[place])
        return (chars + self._n - 1) * times  # with the spaces between them

    def repeated_chars(self) -> int:
        """Characters in n-grams that occurred before, none counted twice."""
        seen = set()
        chars = end = 0
        sizes = self._ends[self._places + self._n] - self._ends[self._places]
        for place, which, size in zip(*map(np.ndarray.tolist, (self._places, self._which, sizes))):
            # Within one that is counted.
            if place < end:
                continue
            if which in seen:
                chars += size
                end = place + self._n
            seen.add(which)

        return chars


# --- FineWeb and code ---


def fineweb(text: Text, settings: Mapping) -> str:
    """See `lm.prepare.config.FineWeb`."""
    lines = [line for line in text.text.split("\n") if line.strip()]
    if not lines:
        return "empty"
    punctuated = sum(line.endswith(_TERMINAL) for line in lines)
    if punctuated / len(lines) < settings["min_punctuated_lines"]:
        return "punctuated_lines"
    short = sum(len(line) <= settings["short_line"] for line in lines)
    if short / len(lines) > settings["max_short_lines"]:
        return "short_lines"
    newlines = text.text.count("\n")
    _, chars = repeated(lines)
    if chars / (len(text.text) - newlines) > settings["max_repeated_line_chars"]:
        return "repeated_line_chars"
    return "newlines" if newlines / len(text.tokens) > settings["max_newlines"] else ""


def code(text: Text, settings: Mapping) -> str:
    """See `lm.prepare.config.Code`."""
    lengths = [len(line) for line in text.lines] or [0]
    if max(lengths) > settings["max_line"]:
        return "long_line"
    if sum(lengths) / len(lengths) > settings["max_mean_line"]:
        return "mean_line"
    alphanumeric = sum(map(str.isalnum, text.text)) / max(len(text.text), 1)
    return "alphanumeric" if alphanumeric < settings["min_alphanumeric"] else ""


RULES = dict(
    gopher_repetition=gopher_repetition,
    gopher_quality=gopher_quality,
    fineweb=fineweb,
    code=code,
)

"""Published rules for what text is good enough: pure functions of a text and of the rule's settings
(`lm.prepare.config`), which say the name of what was broken, or "".
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cached_property

import numpy as np

# A number, a word, an ellipsis, or one other character.
_TOKEN = re.compile(r"\d[\d.,]*\d|\w+|\.{2,}|[^\w\s]")
_PARAGRAPHS = re.compile(r"\n{2,}")
_LINES = re.compile(r"\n+")


class Text:
    """A text, and what several rules ask of it."""

    def __init__(self, text: str):
        self.text = text

    @cached_property
    def tokens(self) -> list[str]:
        """Words, numbers and punctuation marks."""
        return _TOKEN.findall(self.text)

    @cached_property
    def counts(self) -> Counter:
        """How often each token is there."""
        return Counter(self.tokens)

    @cached_property
    def lines(self) -> list[str]:
        return self.text.splitlines()


# --- C4 ---

_CITATION = re.compile(r"\[\d*\]|\[edit\]|\[citation needed\]")
_SENTENCE = re.compile(r"[.!?]+[\"'”’)\]]*(?=\s|$)")
_END_MARKS = (".", "?", "!", '"')
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
        line = line.strip()
        if settings["citations"]:
            line = _CITATION.sub("", line)
        lowered = line.lower()
        if why := _bad_line(line, lowered, settings):
            gone[why] += 1
            continue
        if settings["lorem_ipsum"] and "lorem ipsum" in lowered:
            return text, "lorem_ipsum", gone
        if settings["curly_bracket"] and "{" in line:
            return text, "curly_bracket", gone
        if settings["javascript"] and "javascript" in lowered:
            gone["javascript"] += 1
            continue
        if settings["policy"] and any(phrase in lowered for phrase in POLICY):
            gone["policy"] += 1
            continue
        num_sentences += max(len(_SENTENCE.findall(line)), 1)
        kept.append(line)

    if num_sentences < settings["min_sentences"]:
        return text, "few_sentences", gone
    cleaned = "\n".join(kept).strip()
    if settings["bad_words"]:
        words = set(_TOKEN.findall(cleaned.lower()))
        if words & set(settings["bad_words"]):
            return text, "bad_words", gone
    return cleaned, "", gone


def _bad_line(line: str, lowered: str, settings: Mapping) -> str:
    """What of a line's form is not as it should be."""
    words = line.split()
    if any(len(word) > settings["max_word_chars"] for word in words):
        return "long_word"
    if settings["terminal_punctuation"]:
        if not line.endswith(_END_MARKS) or line.endswith("..."):
            return "no_end_mark"
    if len(words) < settings["min_words_of_line"]:
        return "few_words"
    return ""


# --- Gopher ---


def gopher_quality(text: Text, settings: Mapping) -> str:
    """See `lm.prepare.config.GopherQuality`."""
    words = 0
    chars = 0
    alphabetic = 0
    for token, count in text.counts.items():
        if any(map(str.isalnum, token)):
            words += count
            chars += count * len(token)
        if any(map(str.isalpha, token)):
            alphabetic += count
    total = max(len(text.tokens), 1)

    if words < settings["min_words"]:
        return "few_words"
    if words > settings["max_words"]:
        return "many_words"
    mean = chars / max(words, 1)
    if not settings["min_mean_word"] <= mean <= settings["max_mean_word"]:
        return "mean_word"
    if text.text.count("#") / total > settings["max_symbols"]:
        return "hashes"
    ellipses = text.text.count("...") + text.text.count("…")
    if ellipses / total > settings["max_symbols"]:
        return "ellipses"
    return _gopher_lines(text, settings) or _gopher_words(text, settings, alphabetic / total)


def _gopher_lines(text: Text, settings: Mapping) -> str:
    bullets = sum(line.lstrip().startswith(("•", "-")) for line in text.lines)
    ellipses = sum(line.rstrip().endswith(("...", "…")) for line in text.lines)
    if bullets > settings["max_bullet_lines"] * len(text.lines):
        return "bullet_lines"
    if ellipses > settings["max_ellipsis_lines"] * len(text.lines):
        return "ellipsis_lines"
    return ""


def _gopher_words(text: Text, settings: Mapping, alphabetic: float) -> str:
    if alphabetic < settings["min_alphabetic_words"]:
        return "alphabetic_words"
    present = sum(word in text.counts for word in set(settings["stop_words"]))
    return "stop_words" if present < settings["min_stop_words"] else ""


def gopher_repetition(text: Text, settings: Mapping) -> str:
    """See `lm.prepare.config.GopherRepetition`."""
    chars = max(len(text.text), 1)
    for kind, splitter in (("paragraph", _PARAGRAPHS), ("line", _LINES)):
        whole = text.text.strip() if kind == "paragraph" else text.text
        parts = splitter.split(whole)
        count, repeated_chars = repeated(parts)
        if count / len(parts) > settings[f"max_{kind}s"]:
            return f"{kind}s"
        if repeated_chars / chars > settings[f"max_{kind}_chars"]:
            return f"{kind}_chars"

    grams = _NGrams(text.tokens)
    for n in (2, 3, 4):
        if grams.top_chars(n) / chars > settings[f"max_top_{n}gram"]:
            return f"top_{n}gram"
    for n in range(5, 11):
        repeated_chars = grams.repeated_chars(n)
        # Where no 5-gram occurs twice, no longer one does.
        if not repeated_chars:
            break
        if repeated_chars / chars > settings[f"max_{n}grams"]:
            return f"{n}grams"
    return ""


def repeated(parts: Sequence[str]) -> tuple[int, int]:
    """Returns how many parts occurred before, and the characters in them."""
    seen = set()
    count = chars = 0
    for part in parts:
        if part in seen:
            count += 1
            chars += len(part)
        seen.add(part)
    return count, chars


class _NGrams:
    """The n-grams of tokens, by hashes that are made of those of shorter ones."""

    def __init__(self, tokens: list[str]):
        self._tokens = tokens
        numbers: dict[str, int] = {}
        ids = [numbers.setdefault(token, len(numbers)) for token in tokens]
        self._ids = np.asarray(ids, np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(1)
        self._hashes, self._n = self._ids, 1

    def _of_length(self, n: int) -> np.ndarray:
        while self._n < n:
            shifted = self._hashes[:-1] * np.uint64(0xD6E8FEB86659FD93)
            self._hashes = (shifted ^ (shifted >> np.uint64(29))) + self._ids[self._n :]
            self._n += 1
        return self._hashes

    def top_chars(self, n: int) -> int:
        """Characters in all occurrences of the most frequent n-gram, the first of several."""
        if len(self._tokens) < n:
            return 0
        _, first, counts = np.unique(self._of_length(n), return_index=True, return_counts=True)
        begin = int(first[counts == counts.max()].min())
        return len(" ".join(self._tokens[begin : begin + n])) * int(counts.max())

    def repeated_chars(self, n: int) -> int:
        """Characters in n-grams that occurred before, none counted twice."""
        if len(self._tokens) < n:
            return 0
        hashes = self._of_length(n)
        if len(np.unique(hashes)) == len(hashes):
            return 0
        seen = set()
        chars = place = 0
        hash_list = hashes.tolist()
        while place < len(hash_list):
            if hash_list[place] in seen:
                chars += sum(map(len, self._tokens[place : place + n]))
                place += n
            else:
                seen.add(hash_list[place])
                place += 1
        return chars


# --- FineWeb and code ---

# Of Unicode's property Sentence_Terminal those of living scripts.
_TERMINAL = tuple(".!?．。｡！？﹒﹖﹗؟۔।॥։።፧᙮᠃᠉។៕၊။꓿⁇⁈⁉‼‽⸮")


def fineweb(text: Text, settings: Mapping) -> str:
    """See `lm.prepare.config.FineWeb`."""
    lines = [line for line in text.text.split("\n") if line.strip()]
    if not lines:
        return "empty"
    punctuated = sum(line.endswith(_TERMINAL) for line in lines)
    if punctuated < settings["min_punctuated_lines"] * len(lines):
        return "punctuated_lines"
    short = sum(len(line) <= settings["short_line"] for line in lines)
    if short > settings["max_short_lines"] * len(lines):
        return "short_lines"
    _, chars = repeated(lines)
    if chars > settings["max_repeated_line_chars"] * len(text.text.replace("\n", "")):
        return "repeated_line_chars"
    if text.text.count("\n") > settings["max_newlines"] * len(text.tokens):
        return "newlines"
    return ""


def code(text: Text, settings: Mapping) -> str:
    """See `lm.prepare.config.Code`."""
    lengths = [len(line) for line in text.lines] or [0]
    if max(lengths) > settings["max_line"]:
        return "long_line"
    if sum(lengths) > settings["max_mean_line"] * len(lengths):
        return "mean_line"
    alphanumeric = sum(map(str.isalnum, text.text))
    return "alphanumeric" if alphanumeric < settings["min_alphanumeric"] * len(text.text) else ""


RULES = dict(
    gopher_repetition=gopher_repetition,
    gopher_quality=gopher_quality,
    fineweb=fineweb,
    code=code,
)

"""Published rules for text: what breaks each of them alone, which key it hangs on, and the counts
against others that are written plainly.
"""

import collections
import dataclasses
import itertools
import random
import re

import pytest

from lm.prepare import config, rules, spacy_words

SETTINGS = {name: config.default()[name].to_dict() for name in ("c4", *rules.RULES)}


def broken(group: str, text: str, **keys) -> str:
    """What of a group's rules a text breaks."""
    settings = SETTINGS[group] | keys
    if group == "c4":
        return rules.c4(text, settings)[1]
    return rules.RULES[group](rules.Text(text), settings)


# Lines without three words in a row that another one has.
ADJECTIVES = "red green blue old young small large quiet loud warm".split()
FAMILY = "aunt uncle mother father sister brother nephew cousin niece friend".split()
LINES = []
SHORT = []
for adjective, person in zip(ADJECTIVES, FAMILY):
    begin = f"The {adjective} {person} of {adjective}town and {person}hood"
    LINES.append(f"{begin} met {person}s to have {adjective}er {person}liness.")
    SHORT.append(f"A {adjective} line of {person}s.")
PROSE = "\n".join(LINES)


@pytest.mark.parametrize("group", SETTINGS)
def test_prose_breaks_nothing(group):
    assert broken(group, PROSE) == ""


def unique(count: int) -> list[str]:
    """Words of which each is in one place only."""
    words = map("".join, itertools.product("xyzw", repeat=6))
    return list(itertools.islice(words, count))


def with_ngram(n: int, share: float) -> str:
    """A text in which one n-gram stands eight times, with somewhat more than a share of the
    characters. Its last word is a long one: the n-grams that are shorter have few.
    """
    gram = [*"abcdefghj"[: n - 1], "v" * 40]
    size = 8 * len(" ".join(gram)) if n < 5 else 7 * len("".join(gram))
    filler = unique(4000)
    words = []
    for _ in range(8):
        words += [*gram, filler.pop()]
    while size / len(" ".join([*words, filler[-1]])) > share:
        words.append(filler.pop())
    return " ".join(words)


def with_line(line: str, times: int, between: str) -> str:
    """A text of ten lines in which one more stands several times."""
    filler = unique(50)
    parts = [" ".join(filler[i : i + 5]) for i in range(0, 50, 5)]
    for i in range(times):
        parts.insert(2 * i + 1, line)
    return between.join(parts)


# group -> [(what is broken, by which text, because of which key, with which value nothing is)]
BREAKS = dict(
    gopher_quality=[
        ("few_words", "\n".join(LINES[:3]), "min_words", 10),
        ("many_words", PROSE, "max_words", 100_000),
        ("mean_word", "I am to be of it and so as it is. " * 6, "min_mean_word", 2),
        (
            "mean_word",
            "that incomprehensibility and uncharacteristic multiplication " * 10,
            "max_mean_word",
            20,
        ),
        ("hashes", PROSE + " # so" * 30, "max_symbols", 0.2),
        ("ellipses", PROSE + " … so" * 30, "max_symbols", 0.2),
        ("bullet_lines", "- " + PROSE.replace("\n", "\n- "), "max_bullet_lines", 1),
        ("ellipsis_lines", PROSE.replace(".", "..."), "max_ellipsis_lines", 1),
        ("alphabetic_words", PROSE + " 12" * 40, "min_alphabetic_words", 0.5),
        ("stop_words", "Some words without any others here. " * 10, "min_stop_words", 0),
        ("stop_words", "Nun das Haus der alten Frau am Fluss. " * 8, "stop_words", ("das", "der")),
    ],
    gopher_repetition=[
        ("lines", with_line("yes", 6, "\n"), "max_lines", 0.4),
        ("line_chars", with_line("v" * 150, 2, "\n"), "max_line_chars", 0.4),
    ],
    fineweb=[
        ("punctuated_lines", PROSE.replace(".", ""), "min_punctuated_lines", 0),
        ("short_lines", "\n".join(SHORT), "max_short_lines", 1),
        ("short_lines", "\n".join(SHORT), "short_line", 10),
        ("repeated_line_chars", "\n".join([*LINES, *LINES[:3]]), "max_repeated_line_chars", 0.5),
        ("newlines", PROSE + "\n" * 100, "max_newlines", 1),
    ],
    code=[
        ("long_line", "a" * 1200 + "\nb" * 100, "max_line", 2000),
        ("mean_line", "a" * 120 + "\n" + "b" * 120, "max_mean_line", 200),
        ("alphanumeric", "{ [ + ] } ( a )\n" * 10, "min_alphanumeric", 0.05),
    ],
    c4=[
        ("few_sentences", "\n".join(LINES[:2]), "min_sentences", 2),
        ("few_sentences", PROSE.replace(".", ""), "terminal_punctuation", False),
        ("few_sentences", "It was so.\n" * 9, "min_words_of_line", 3),
        ("few_sentences", f"It was so and {'o' * 1001}.\n" * 9, "max_word_chars", 2000),
        ("few_sentences", PROSE.replace(" and", " JavaScript"), "javascript", False),
        ("few_sentences", PROSE.replace(" and", " privacy policy"), "policy", False),
        ("few_sentences", PROSE.replace(" ", "[12] ").replace(".", ".[1]"), "citations", True),
        ("curly_bracket", PROSE.replace(" and", " {"), "curly_bracket", False),
        ("lorem_ipsum", PROSE.replace(" and", " Lorem ipsum"), "lorem_ipsum", False),
    ],
)
for n, threshold in ((2, 0.2), (3, 0.18), (4, 0.16)):
    BREAKS["gopher_repetition"].append(
        (f"top_{n}gram", with_ngram(n, threshold), f"max_top_{n}gram", 0.3)
    )
for n in range(5, 11):
    BREAKS["gopher_repetition"].append(
        (f"{n}grams", with_ngram(n, 0.2 - n / 100), f"max_{n}grams", 0.3)
    )
CASES = [(group, *case) for group, cases in BREAKS.items() for case in cases]
# What breaks the rule where the default doesn't: its text would be a long one.
BREAKING = {"max_words": 100, "citations": False}


@pytest.mark.parametrize("group, why, text, key, value", CASES)
def test_breaks(group, why, text, key, value):
    """A text breaks one rule, and none with another value of its key."""
    breaking = {key: BREAKING.get(key, SETTINGS[group][key])}
    assert broken(group, text, **breaking) == why
    assert broken(group, text, **{key: value}) == ""


@pytest.mark.parametrize(
    "why, line, times, key",
    [
        ("paragraphs", "yes", 6, "max_paragraphs"),
        ("paragraph_chars", "v" * 150, 2, "max_paragraph_chars"),
    ],
)
def test_paragraphs(why, line, times, key):
    """A paragraph that stands twice has lines that do: these may."""
    text = with_line(line, times, "\n\n\n")
    lines_may = dict(max_lines=1, max_line_chars=1)

    assert broken("gopher_repetition", text, **lines_may) == why
    assert broken("gopher_repetition", text, **lines_may, **{key: 0.4}) == ""


def test_every_key_has_a_text():
    """See `CASES`, `test_paragraphs` and `test_bad_words`."""
    elsewhere = {"on", "max_paragraphs", "max_paragraph_chars", "bad_words"}
    for group in SETTINGS:
        keys = {field.name for field in dataclasses.fields(config.GROUPS[group])}
        assert keys - elsewhere == {key for name, _, _, key, _ in CASES if name == group}, group


@pytest.mark.parametrize(
    "text, is_bad",
    [
        ("darned", True),
        ("Darned!", True),
        ("undarned", False),
        ("what a darn, fool", False),
        ("what a darn fool", True),
        ("darn foolish", False),
        ("d*rn", True),
    ],
)
def test_bad_words(text, is_bad):
    keys = dict(bad_words=("darned", "darn fool", "d*rn"), min_sentences=0)
    text = f"They all said this: {text}."
    assert broken("c4", text, **keys) == ("bad_words" if is_bad else "")


def test_lines_that_c4_keeps():
    lines = [
        "A line of text that stays as it is.",
        "  It has a source.[1][citation needed] And another one.[23]  ",
        "A menu without a mark",
        "A line that ends with an ellipsis...",
        "Too few words.",
        "Please switch on Javascript to see this page.",
        "By this you agree to our terms of use.",
        'And one that ends with what is "quoted"',
    ]

    text, why, gone = rules.c4("\n".join(lines), SETTINGS["c4"])

    assert why == ""
    assert text.split("\n") == [lines[0], "It has a source. And another one.", lines[-1]]
    assert gone == dict(no_end_mark=2, few_words=1, javascript=1, policy=1)


@pytest.mark.parametrize(
    "line, count",
    [
        ("", 1),
        ("One", 1),
        ("One. Two! Three?", 3),
        ('He said: "One." Then two...', 2),
        ("Mr. Bean, i.e. him, has 3.5 of them.", 1),
        ("Wait... what?! No.", 2),
        ("一。 二。", 2),
    ],
)
def test_sentences(line, count):
    assert rules.sentences(line) == count


@pytest.mark.parametrize(
    "text, tokens",
    [
        ("A word, (another) one.", "A word , ( another ) one ."),
        (
            "don't I’m you'll've cannot it's its ill",
            "do n't I ’m you 'll 've can not it 's its ill",
        ),
        ("Peter's 'quoted' rock'n'roll", "Peter 's ' quoted ' rock'n'roll"),
        ("e.g. i.e.) Mr. U.S. a.) b.", "e.g. i.e. ) Mr. U.S. a. ) b."),
        ("well-known and/or either/or a--b --foo", "well - known and/or either / or a -- b --foo"),
        ("$5 5% 10km, 3.5x 1,000.50 12:30 10-20", "$ 5 5 % 10 km , 3.5x 1,000.50 12:30 10 - 20"),
        ("http://x.org/a-b, www.a-b.com me@x.org", "http://x.org/a-b , www.a-b.com me@x.org"),
        ("Wait...what ok.Now ....", "Wait ... what ok . Now ...."),
        ("foo.bar() x=1 a=b __init__ `code`", "foo.bar ( ) x=1 a = b _ _ init _ _ ` code `"),
        ("“So — it…” °C", "“ So — it … ” ° C"),
        (
            "\u0939\u093f\u0928\u094d\u0926\u0940 \u4e2d\u6587\u3002",
            "\u0939\u093f\u0928\u094d\u0926\u0940 \u4e2d\u6587 \u3002",
        ),
    ],
)
def test_tokens_are_spacys(text, tokens):
    """spaCy 3.8's blank English model makes the same of each."""
    found = itertools.chain.from_iterable(map(spacy_words.split, text.split()))
    assert list(found) == tokens.split()
    assert len(rules.Text(text).tokens) == len(tokens.split())


@pytest.mark.parametrize(
    "chunk", ["=" * 100_000, "(" * 100_000, "a-" * 50_000, "x" * 100_000 + ")" * 1000]
)
def test_long_chunks_are_no_trouble(chunk):
    assert "".join(spacy_words.split(chunk)) == chunk


def test_a_full_vocabulary_is_let_go(monkeypatch):
    monkeypatch.setattr(rules._Vocabulary, "is_full", lambda self: len(self) > 10)
    texts = [" ".join(f"w{i * j}" for j in range(8)) + " the" for i in range(20)]
    for text in map(rules.Text, texts):
        tokens = text.tokens
        for other in texts:
            assert len(rules.Text(other).tokens) == 9
        assert text.has("the") and not text.has("be")
        assert len(tokens) == 9


# --- repetition, against plain counts ---


def plain_top(words: list[str], n: int) -> int:
    grams = collections.Counter(" ".join(words[i : i + n]) for i in range(len(words) - n + 1))
    if not grams:
        return 0
    gram, count = grams.most_common(1)[0]
    return len(gram) * count


def plain_repeated(words: list[str], n: int) -> int:
    seen = set()
    chars = place = 0
    while place + n <= len(words):
        gram = tuple(words[place : place + n])
        if gram in seen:
            chars += len("".join(gram))
            place += n
        else:
            seen.add(gram)
            place += 1
    return chars


@pytest.mark.parametrize("seed", range(60))
def test_ngrams(seed):
    draw = random.Random(seed)
    vocabulary = ["v" * size for size in range(1, draw.randint(2, 9))]
    words = draw.choices(vocabulary, k=draw.choice([0, 1, 2, 5, 11, 40, 300]))
    if draw.random() < 0.5:
        words += words[: draw.randint(0, len(words))]

    grams = rules._NGrams(rules.Text(" ".join(words)).tokens)
    for n in range(2, 11):
        grams.grow()
        assert grams.top_chars() == plain_top(words, n), n
        assert grams.repeated_chars() == plain_repeated(words, n), n


def test_parts():
    """Lines and paragraphs are what regular expressions divide, in any order."""
    draw = random.Random(0)
    for _ in range(500):
        text = "".join(draw.choices(["a", "b", " ", "\n", "\n\n"], k=draw.randint(0, 12)))
        paragraphs = re.split(r"\n{2,}", text.strip())
        lines = re.split(r"\n+", text)
        assert sorted(rules._paragraphs(text)) == sorted(paragraphs)
        assert sorted(rules._lines(text)) == sorted(lines)


def test_repeated():
    assert rules.repeated(["a", "bb", "a", "bb", "bb", ""]) == (3, 5)
    assert rules.repeated(["a", "b"]) == (0, 0)

"""Stage clean, document by document: Unicode, language, published rules, personal data. And stages
of functions of one's own.
"""

import functools
import importlib
import inspect
import ipaddress
import re
import unicodedata
from collections.abc import Callable, Mapping

from ml_collections import ConfigDict

from lm.prepare import rules, spacy_words
from lm.prepare.engine import Stage, each_shard
from lm.prepare.shards import Document, Work, read


def stages(config: ConfigDict) -> list[Stage]:
    """The stage. Rules that are off are not part of its settings."""
    groups = ["clean", "pii"]
    groups += [name for name in ("c4", *rules.RULES) if config[name].on]
    settings = {name: config[name].to_dict() for name in groups} | {"bad_input": config.bad_input}
    packages = []
    if config.clean.mojibake:
        packages.append("ftfy")
    if config.clean.identify:
        packages.append("py3langid")
    if config.pii.phone:
        packages.append("phonenumbers")
    code = [inspect.getsource(module) for module in (rules, spacy_words)]
    return [Stage("clean", clean, each_shard, settings, packages, reads=code)]


def clean(work: Work) -> None:
    """Cleans the documents of a shard."""
    with work.documents() as writer:
        for document in read(work.inputs["shard"]):
            cleaned = clean_document(document, work)
            if cleaned is not None:
                writer.write(cleaned)


def clean_document(document: Document, work: Work) -> Document | None:
    """Returns a document as it is kept; None if it is not."""
    settings = work.settings
    text = normalized(document.text, settings["clean"], work, document)
    document = document._replace(text=text)
    if not text.strip():
        work.drop("empty", document)
        return None
    if len(text) < settings["clean"]["min_chars"]:
        work.drop("min_chars", document)
        return None
    if settings["clean"]["identify"]:
        document = _identified(document, settings["clean"])
        languages = settings["clean"]["languages"]
        if languages and document.language not in languages:
            work.drop(f"language.{document.language or 'unsure'}", document)
            return None

    kept = _by_rules(document, work)
    if kept is None:
        return None
    text = masked(kept.text, settings["pii"], work, kept)
    work.measure("words", len(text.split()))
    return kept._replace(text=text)


def _by_rules(document: Document, work: Work) -> Document | None:
    """The document without the lines that no rule wants; None if a rule is broken."""
    settings = work.settings
    if "c4" in settings:
        text, broken, gone = rules.c4(document.text, settings["c4"])
        for why, count in gone.items():
            work.count(f"lines.c4.{why}", document.source, count)
        if broken:
            work.drop(f"c4.{broken}", document)
            return None
        document = document._replace(text=text)

    text = rules.Text(document.text)
    for name, rule in rules.RULES.items():
        if name in settings:
            if broken := rule(text, settings[name]):
                work.drop(f"{name}.{broken}", document)
                return None

    return document


# --- Unicode ---

# Control characters and others that nobody sees, but line ends, tabs and the joiners that scripts
# are written with: halves of pairs, marks of byte order, private bidirectional ones.
_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b\u2060\ufeff\ufff9-\ufffb]")


def normalized(text: str, settings: Mapping, work: Work, document: Document) -> str:
    """Returns a text in Unicode's normal form, repaired, with \\n as its line end."""
    if "\r" in text:
        text = text.replace("\r\n", "\n").replace("\r", "\n")
    if settings["mojibake"] and not text.isascii():
        import ftfy

        if ftfy.is_bad(text):
            # Only the wrong decoding is repaired: quotes, widths and entities are the author's.
            repaired = ftfy.fix_encoding(text)
            if repaired != text:
                work.count("repaired.mojibake", document.source)
                work.sample("repaired.mojibake", document, repaired)
                text = repaired
    if settings["controls"]:
        text, count = _CONTROLS.subn("", text)
        if count:
            work.count("repaired.controls", document.source)
    if settings["unicode"] != "none":
        # Most text is in the normal form already, which is faster to see than to make.
        if not unicodedata.is_normalized(settings["unicode"], text):
            work.count("repaired.unicode", document.source)
            text = unicodedata.normalize(settings["unicode"], text)

    return text


@functools.cache
def _identifier():
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)


def _identified(document: Document, settings: Mapping) -> Document:
    """The document with its language; "" where no language is likely enough."""
    # Its middle: pages begin with menus.
    chars = settings["language_chars"]
    begin = max(0, (len(document.text) - chars) // 2)
    language, probability = _identifier().classify(document.text[begin : begin + chars])
    if probability < settings["least_probability"]:
        language = ""
    return document._replace(language=language)


# --- personal data ---

_EMAIL = re.compile(
    r"(?<![\w.+-])[\w.+-]{1,64}@(?:[A-Za-z0-9](?:[A-Za-z0-9-]{0,62})\.){1,8}[A-Za-z]{2,24}"
    r"(?![A-Za-z0-9])",
    re.ASCII,
)
# Four numbers, but those that are a version's.
_IPV4 = re.compile(
    r"(?<![\w.])(?<![Vv]ersion )(?<![Rr]elease )(?:\d{1,3}\.){3}\d{1,3}(?![\w]|\.\d)", re.ASCII
)
_IPV6 = re.compile(
    r"(?<![\w:.])(?:[0-9a-fA-F]{0,4}:){2,7}(?:[0-9a-fA-F]{1,4}|(?<=::))(?!\w|:[\w:])", re.ASCII
)
# The addresses that are given out to hosts. Of others, such as `1::2`, most are slices, or names.
_UNICAST = ipaddress.ip_network("2000::/3")

# What may hold phone numbers: seven digits or more on a line, with little between them.
_DIGITS = re.compile(
    r"(?<!\w)[+(]{0,2}\d"
    r"(?:(?:[^\S\n]{1,2}|[^\S\n]{0,2}[().\-/\u2010-\u2015\u2212]{1,2}[^\S\n]{0,2})?\d){6,60}"
)
_MOST_NUMBERS = 10  # with spaces between them; more are a row of a table
# Digits of other kinds.
_OTHER_DIGITS = re.compile(
    # dates
    r"(?<![\w.+-])(?:(?:19|20)\d\d(?P<a>[-/.])\d\d?(?P=a)|\d\d?(?P<b>[-/.])\d\d?(?P=b)(?:19|20))"
    r"\d\d?(?!\w|[-.]\d)"
    # decimal numbers
    r"|(?<![\w.)])(?!\d{3}\.\d{4}(?!\d))(?:0|[1-9]\d*)\.\d+(?!\d|\.\d|[-/]\d+(?![.\d]))"
    # addresses
    r"|(?<![\w.])(?:\d{1,3}\.){3}\d{1,3}(?!\w|\.\d)"
    # thousands by thousands
    r"|(?<![\w+])(?<!\d )[1-9]\d{0,2}(?: \d{3}){2,}(?!\w| \d)"
    # names of books, issues and articles
    r"|\bIS[BS]N(?:-1[03])?:? ?[\d -]{8,16}[\dX]|\b10\.\d{4,9}/\S+"
)


def masked(text: str, settings: Mapping, work: Work, document: Document) -> str:
    """Returns a text with e-mail addresses, public IP addresses and phone numbers replaced."""
    found: dict[str, int] = {}
    if settings["email"] and "@" in text:
        text, found["email"] = _EMAIL.subn(settings["email"], text)
    if settings["ip"]:
        for pattern in (_IPV4, _IPV6):
            text, count = _replaced(pattern, _is_public_address, settings["ip"], text)
            found["ip"] = found.get("ip", 0) + count
    if settings["phone"]:
        text, found["phone"] = _without_phones(text, settings)

    for kind, count in found.items():
        if count:
            work.count(f"pii.{kind}", document.source, count)
            work.sample(f"pii.{kind}", document._replace(text=text))

    return text


def _replaced(
    pattern: re.Pattern, is_one: Callable[[str], bool], by: str, text: str
) -> tuple[str, int]:
    """The text with those matches replaced that are one, and how many these are."""
    parts = []
    end = 0
    for match in pattern.finditer(text):
        if is_one(match[0]):
            parts += [text[end : match.start()], by]
            end = match.end()

    return "".join([*parts, text[end:]]), len(parts) // 2


def _is_public_address(text: str) -> bool:
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return False

    return address.is_global and (address.version == 4 or address in _UNICAST)


def _without_phones(text: str, settings: Mapping) -> tuple[str, int]:
    """The text with its phone numbers replaced, and how many these are."""
    if not _DIGITS.search(text):
        return text, 0
    plain = _OTHER_DIGITS.sub(_blank, text)
    parts = []
    end = 0
    for match in _DIGITS.finditer(plain):
        if sum(map(str.isdigit, match[0].split())) > _MOST_NUMBERS:
            continue
        # What stands around digits can say that they are none, or are a time, or have an extension.
        begin = max(match.start() - 1, 0)
        around = plain[begin : match.end() + 12]
        for first, last in _phones_in(around, match.end() - begin, tuple(settings["regions"])):
            if begin + first >= end:
                parts += [text[end : begin + first], settings["phone"]]
                end = begin + last

    return "".join([*parts, text[end:]]), len(parts) // 2


def _blank(match: re.Match) -> str:
    return "=" * len(match[0])


# Where the next number may begin: there are enough digits for both.
_NEXT_NUMBER = re.compile(r"(?:\d\D*){9,}?[^\S\n](?=[+(0](?:\D*\d){8})")


@functools.lru_cache(maxsize=1 << 14)
def _phones_in(text: str, end: int, regions: tuple[str, ...]) -> list[tuple[int, int]]:
    """Where in a text the valid phone numbers are that begin before `end`, in order."""
    spans = _phones_between(text, 0, len(text), regions)
    return sorted(span for span in spans if span[0] < end)


def _phones_between(
    text: str, begin: int, end: int, regions: tuple[str, ...]
) -> list[tuple[int, int]]:
    """Where in a part of a text valid phone numbers are. Of several with nothing but spaces between
    them some are found only by themselves.
    """
    spans = _valid_phones(text, begin, end, regions)
    if spans:
        edges = [begin, *(edge for span in spans for edge in span), end]
        parts = list(zip(edges[::2], edges[1::2]))
    else:
        cuts = [match.end() for match in _NEXT_NUMBER.finditer(text, begin, end)]
        edges = [begin, *cuts, end]
        parts = list(zip(edges, edges[1:])) if cuts else []

    for first, last in parts:
        if last - first >= 7:
            spans += _phones_between(text, first, last, regions)

    return spans


def _valid_phones(
    text: str, begin: int, end: int, regions: tuple[str, ...]
) -> list[tuple[int, int]]:
    """Where in a part of a text valid phone numbers of the first region with any are."""
    import phonenumbers

    # A bracket that ends behind the number is the sentence's.
    if ")" not in text[begin:end]:
        begin = text.find("(", begin, end) + 1 or begin
    spans = []
    for region in regions:
        for match in phonenumbers.PhoneNumberMatcher(text[begin:end], region):
            found = match.raw_string
            is_open = found.count("(") > found.count(")")
            number = found.lstrip("( ") if is_open else found.lstrip()
            spans.append((begin + match.end - len(number), begin + match.end))
        if spans:
            break

    return spans


# --- functions of one's own ---


def own_stage(name: str, config: ConfigDict) -> Stage:
    """A stage that applies the function that a dotted path names to each document.

    Raises:
      ValueError: no such function.
    """
    function = _imported(name)
    short = name.rpartition(".")[2]
    settings = {
        "function": name,
        "keys": config.functions.get(short, ConfigDict()).to_dict(),
        "bad_input": config.bad_input,
    }
    source = inspect.getsource(inspect.getmodule(function))
    return Stage(short, apply_function, each_shard, settings, reads=source)


def _imported(name: str) -> Callable[[Document, Mapping], Document | None]:
    module, _, function = name.rpartition(".")
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"config.stages: {name!r} can't be imported: {error}") from None


def apply_function(work: Work) -> None:
    """Applies a function to the documents of a shard."""
    function = _imported(work.settings["function"])
    with work.documents() as writer:
        for document in read(work.inputs["shard"]):
            changed = function(document, work.settings["keys"])
            if changed is None:
                work.drop(work.settings["function"], document)
            else:
                writer.write(changed)

"""Words and punctuation marks as spaCy's English tokenizer divides them, but for smileys.

The published rules were applied with its tokens: datatrove's filters count them, by which FineWeb
was made. A few marks more or less decide verdicts, so these are the same tokens, 15 times as fast.
"""

import re
import string

# What is taken from the ends of words, and what divides them.
_LETTERS = "".join(filter(str.isalpha, map(chr, range(0x530))))
_UNCASED = "\u0590-\u1fff\u3040-\ud7ff"  # scripts whose letters are neither small nor capital
_SMALL = "".join(filter(str.islower, _LETTERS)) + _UNCASED
_CAPITAL = "".join(filter(str.isupper, _LETTERS)) + _UNCASED
_QUOTES = "'\"”“`‘´’‚„»«「」『』（）〔〕【】《》〈〉⟦⟧"
_MARKS = "…,:;!?¿؟¡()[]{}<>_#*&。？！，、；：～·।،۔؛٪—–" + _QUOTES
_CURRENCY = "$£€¥฿₠-₿"
_ICONS = "¦©®°℀-℆℈℉℔№℗℞-℩℮↕-⇿⌀-⏿␀-➿⠀-⣿⬀-⯿⺀-⿿㈀-㏿\ufffd\U0001f000-\U0001faff"
_UNITS = (
    "km[²³]?|m[²³]?|dm[²³]?|cm[²³]?|mm[²³]?|ha|µm|nm|yd|in|ft|kg|g|mg|µg|t|lb|oz|m/s|km/h|kmh|mph|"
    "hPa|Pa|mbar|mb|MB|kb|KB|gb|GB|tb|TB|T|G|M|K|%"
)
_PREFIX = re.compile(rf"\.\.+|[§%={_CURRENCY}{_ICONS}]|\+(?![0-9])|(?:US|C|A)\$")
_PERIOD = re.compile(
    rf"(?<=[0-9{_SMALL}%²+|\-{re.escape(_MARKS)}])\.|(?<=[{_CAPITAL}][{_CAPITAL}])\."
)
_SUFFIX = re.compile(rf"(?:['’][sS]|[{_ICONS}]|(?<=[0-9])(?:\+|[{_CURRENCY}]|{_UNITS}))$")
# First what it may begin with, which a search looks for fast; then what must be around that.
_INFIX = re.compile(
    rf"[-.…,+*^–—~:<>=/{_ICONS}](?:(?<=\.)\.+|(?<=[…{_ICONS}])|(?<=[0-9][+\-*^])(?=[0-9-])"
    rf"|(?<=[{_SMALL}{_QUOTES}]\.)(?=[{_CAPITAL}{_QUOTES}])|(?<=[^\W\d_],)(?=[^\W\d_])"
    r"|(?<=[^\W_][-–—~:<>=/])(?:(?<=-)--?|(?<=—)—)?(?=[^\W\d_]))"
)
_URL = re.compile(
    rf"(?:[\w+\-.]{{2,}}://)?(?:[^@]+@)?(?:[^\W_][\w-]*\.)+[{_SMALL}]{{2,}}(?::\d+)?(?:[/?#].*)?"
)
# What contractions consist of: first words, and the parts that may follow each of them.
_ASKING = "who what when where why how there that this these those"
_PRONOUNS = "i you he she it we they"
_CONTRACTIONS = (
    ("ca could do does did had may might must need ought sha should wo would", "n't n't+'ve"),
    ("ai are is was were have has dare", "n't"),
    ("could might must should would not i you we they " + _ASKING, "'ve"),
    (f"{_PRONOUNS} {_ASKING}", "'ll 'll+'ve 'd 'd+'ve"),
    (f"you we they {_ASKING}", "'re"),
    (f"he she it {_ASKING}", "'s"),
    ("i", "'m"),
    ("can", "not"),
    ("gon", "na"),
    ("got", "ta"),
)
_NO_CONTRACTIONS = "ill its hell shell shed were well whore".split()
_ABBREVIATIONS = (
    "Mt. Ak. Ala. Apr. Ariz. Ark. Aug. Calif. Colo. Conn. Dec. Del. Feb. Fla. Ga. Ia. Id. Ill. "
    "Ind. Jan. Jul. Jun. Kan. Kans. Ky. La. Mar. Mass. Mich. Minn. Miss. N.C. N.D. N.H. N.J. N.M. "
    "N.Y. Neb. Nebr. Nev. Nov. Oct. Okla. Ore. Pa. S.C. Sep. Sept. Tenn. Va. Wash. Wis. a.m. p.m. "
    "Adm. Bros. co. Co. Corp. D.C. Dr. e.g. E.g. E.G. Gen. Gov. i.e. I.e. I.E. Inc. Jr. Ltd. Md. "
    "Messrs. Mo. Mont. Mr. Mrs. Ms. Ph.D. Prof. Rep. Rev. Sen. St. vs. v.s. and/or w/o ma'am "
    "o'clock 'em 'll 'nuff 's 'S ’s ’S ‘s ‘S 're 'd 'cause 'Cause 'cos 'cuz 'bout C++ ' ''"
)


def _exceptions() -> dict[str, list[str]]:
    """The tokens of each abbreviation and contraction."""
    exceptions = {"let's": ["let", "'s"], "Let's": ["Let", "'s"]}
    for firsts, followings in _CONTRACTIONS:
        for first in firsts.split():
            for following in followings.split():
                for apostrophe in ("'", "’", ""):
                    parts = [first, *following.replace("'", apostrophe).split("+")]
                    exceptions["".join(parts)] = parts

    for word in _NO_CONTRACTIONS:
        exceptions.pop(word, None)
    for first, *rest in list(exceptions.values()):
        exceptions["".join([first.title(), *rest])] = [first.title(), *rest]
    letters = [f"{letter}." for letter in string.ascii_lowercase + "äöü"]
    return exceptions | {word: [word] for word in [*_ABBREVIATIONS.split(), *letters]}


_EXCEPTIONS = _exceptions()
_LONGEST = max(map(len, _EXCEPTIONS))


def split(chunk: str) -> list[str]:
    """Returns the tokens of what lies between two spaces.

    Punctuation is taken from both ends until none is there, or until what is left is an exception.
    """
    if chunk.isalpha():
        return _EXCEPTIONS.get(chunk) or [chunk]
    before = []
    after = []
    begin, end = 0, len(chunk)
    while begin < end:
        if exception := _exception(chunk, begin, end):
            return [*before, *exception, *after[::-1]]
        inner = _prefix_end(chunk, begin, end)
        if inner > begin:
            before.append(chunk[begin:inner])
            if exception := _exception(chunk, inner, end):
                return [*before, *exception, *after[::-1]]
        outer = _suffix_begin(chunk, inner, end)
        if outer < end:
            after.append(chunk[outer:end])
            if exception := _exception(chunk, begin, outer):
                return [*before[: len(before) - (inner > begin)], *exception, *after[::-1]]
        elif inner == begin:
            break
        begin, end = inner, outer

    return [*before, *_divided(chunk[begin:end]), *after[::-1]]


def _exception(chunk: str, begin: int, end: int) -> list[str] | None:
    return _EXCEPTIONS.get(chunk[begin:end]) if end - begin <= _LONGEST else None


def _prefix_end(chunk: str, begin: int, end: int) -> int:
    """Where the first punctuation mark ends; `begin` if there is none."""
    first = chunk[begin]
    if first in _MARKS:
        return begin + 1
    if first.isalnum() and first not in "UCA":
        return begin
    match = _PREFIX.match(chunk, begin, end)
    return match.end() if match else begin


def _suffix_begin(chunk: str, begin: int, end: int) -> int:
    """Where the last punctuation mark begins; `end` if there is none."""
    if begin == end:
        return end
    if chunk[end - 1] in _MARKS:
        return end - 1
    place = end
    while place > begin and chunk[place - 1] == ".":
        place -= 1
    if end - place > 1:
        return place
    if place < end:
        return place if _PERIOD.match(chunk, place, end) else end

    # The longest suffix is mbar, after a digit.
    place = max(begin, end - 5)
    if chunk[end - 1].isdecimal() or chunk[place:end].isalpha():
        return end
    match = _SUFFIX.search(chunk, place, end)
    return match.start() if match else end


def _divided(word: str) -> list[str]:
    """The tokens of a word that has no punctuation at its ends."""
    tokens = []
    place = 0
    for match in _INFIX.finditer(word):
        begin = match.start()
        if not begin:
            continue
        if not tokens and "." in word and _URL.fullmatch(word):
            break
        # Two of them may stand side by side.
        tokens += [word[place:begin], match[0]] if begin > place else [match[0]]
        place = match.end()

    return [*tokens, word[place:]] if place < len(word) else tokens

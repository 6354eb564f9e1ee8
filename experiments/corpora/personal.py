"""Makes sentences with personal data, and others with what looks like it and must stay."""

from collections.abc import Iterator, Sequence

import phonenumbers

from experiments.corpora.writing import Writer
from lm.prepare.config import Pii

# Groups of digits of numbers without their country code. N is 2 to 9, D any digit.
DIGITS = {"N": "23456789", "D": "0123456789"}
_US = ("212 NDD DDDD", "415 NDD DDDD", "617 NDD DDDD", "773 NDD DDDD", "305 NDD DDDD")
_GB = ("20 7NDD DDDD", "20 8NDD DDDD", "121 NDD DDDD", "161 NDD DDDD")
_DE = ("30 NDDDDDDD", "40 NDDDDDDD", "89 NDDDDDDD", "221 NDDDDDD", "171 NDDDDDD", "160 NDDDDDDD")
# Of a form: its country, its numbers, how it is written with {0}, {1}, ... for the groups.
PHONES = {
    "US (area)": ("US", _US, "({0}) {1}-{2}"),
    "US dashes": ("US", _US, "{0}-{1}-{2}"),
    "US dots": ("US", _US, "{0}.{1}.{2}"),
    "US spaces": ("US", _US, "{0} {1} {2}"),
    "US without spaces": ("US", _US, "{0}{1}{2}"),
    "US 1-": ("US", _US, "1-{0}-{1}-{2}"),
    "US hard hyphens": ("US", _US, "{0}\u2011{1}\u2011{2}"),
    "US en dashes": ("US", _US, "{0}\u2013{1}\u2013{2}"),
    "US international": ("US", _US, "+1 {0} {1} {2}"),
    "US E.164": ("US", _US, "+1{0}{1}{2}"),
    "GB national": ("GB", _GB, "0{0} {1} {2}"),
    "GB (area)": ("GB", _GB, "(0{0}) {1} {2}"),
    "GB without spaces": ("GB", _GB, "0{0}{1}{2}"),
    "GB international": ("GB", _GB, "+44 {0} {1} {2}"),
    "GB (0)": ("GB", _GB, "+44 (0){0} {1} {2}"),
    "DE national": ("DE", _DE, "0{0} {1}"),
    "DE slash": ("DE", _DE, "0{0}/{1}"),
    "DE (area)": ("DE", _DE, "(0{0}) {1}"),
    "DE international": ("DE", _DE, "+49 {0} {1}"),
    "DE 00": ("DE", _DE, "0049 {0} {1}"),
    "FR international": ("FR", ("1 4D DD DD DD", "6 NN DD DD DD"), "+33 {0} {1} {2} {3} {4}"),
    "JP international": ("JP", ("3 3DDD DDDD", "3 5DDD DDDD"), "+81 {0}-{1}-{2}"),
    "BR international": ("BR", ("11 9NDDD DDDD", "21 9NDDD DDDD"), "+55 {0} {1}-{2}"),
    "IN international": ("IN", ("98DDD DDDDD", "99DDD DDDDD"), "+91 {0} {1}"),
}
EMAILS = {
    "plain": "{name}@{domain}.com",
    "dots": "{name}.{other}@{domain}.co.uk",
    "plus": "{name}+{other}@{domain}.org",
    "upper case": "{NAME}@{DOMAIN}.COM",
    "digits": "{name}{n}@{domain}-{n}.net",
    "subdomain": "{name}_{other}@mail.{domain}.de",
    "long ending": "{name}@{domain}.photography",
    "underscore before": "_{name}@{domain}.com",
}
_PLACES = ("Write to {} by Monday.", "It is {}.", "One way ({}) is enough.", "Old: {}, and so on.")


def _phone_groups(country: str, patterns: Sequence[str], writer: Writer) -> list[str]:
    """The groups of a valid number's digits."""
    code = phonenumbers.country_code_for_region(country)
    while True:
        drawn = [writer.choice(DIGITS.get(char, char)) for char in writer.choice(patterns)]
        groups = "".join(drawn).split()
        number = phonenumbers.parse(f"+{code}{''.join(groups)}")
        if phonenumbers.is_valid_number_for_region(number, country):
            return groups


def phone(form: str, writer: Writer) -> str:
    country, patterns, template = PHONES[form]
    return template.format(*_phone_groups(country, patterns, writer))


def email(form: str, writer: Writer) -> str:
    words = dict(name=writer.rare(), other=writer.rare(), domain=writer.rare())
    upper = {key.upper(): word.upper() for key, word in words.items()}
    return EMAILS[form].format(n=writer.number(1, 1000), **words, **upper)


def ipv4(writer: Writer) -> str:
    """A public address."""
    first = writer.choice((8, 23, 45, 52, 81, 93, 104, 134, 151, 185, 199, 212))
    return ".".join(map(str, (first, writer.number(20, 256), *writer.rng.integers(0, 256, 2))))


def _hex(writer: Writer) -> str:
    return f"{writer.number(4096, 65536):x}"


def ipv6(writer: Writer) -> str:
    """A public address, long or short, some in capitals."""
    parts = [writer.choice(("2a00", "2606", "2400", "2604", "2a02"))]
    parts += [_hex(writer) for _ in range(writer.choice((2, 7)))]
    if len(parts) == 3:
        parts += ["", _hex(writer)]
    address = ":".join(parts)
    return writer.choice((address, address, address.upper()))


def masked_sentences(writer: Writer) -> Iterator[tuple[str, str, str]]:
    """Yields (kind, sentence, what it should become) for each form of personal data."""
    for kind, form, secret, mask in _secrets(writer):
        place = writer.choice(_PLACES)
        yield kind, place.format(form.format(secret)), place.format(form.format(mask))
    # Two in a row.
    for joint in (" ", ", ", " / ", " or "):
        place = writer.choice(_PLACES)
        both = [phone(writer.choice(("US dashes", "GB national")), writer) for _ in range(2)]
        shown, wanted = joint.join(both), joint.join([Pii.phone] * 2)
        yield f"phone, two with {joint!r}", place.format(shown), place.format(wanted)


def _secrets(writer: Writer) -> Iterator[tuple[str, str, str, str]]:
    """(kind, what stands around it, what must go, what must stand there)."""
    for form in EMAILS:
        yield f"email, {form}", "{}", email(form, writer), Pii.email
    for form in ("<{}>", "mailto:{}", "{}_", "{}-or-not", '"{}"', "mail={};"):
        yield f"email, as {form}", form, email("plain", writer), Pii.email
    for form in ("{}", "http://{}/a", "{}:8080", "[{}]", "{}/24", "::ffff:{}"):
        yield f"IPv4, as {form}", form, ipv4(writer), Pii.ip
    for form in ("{}", "http://[{}]:443/", "{}/64", "{}: refused"):
        yield f"IPv6, as {form}", form, ipv6(writer), Pii.ip
    for form in PHONES:
        yield f"phone, {form}", "{}", phone(form, writer), Pii.phone
    for form in ("tel:{}", "Tel. {}", "2024-05-17 {}", "{}; 12 km"):
        yield f"phone, as {form}", form, phone("US dashes", writer), Pii.phone
    yield "phone, with an extension", "{}", f"{phone('US dashes', writer)} ext. 12", Pii.phone


def look_alikes(writer: Writer) -> Iterator[tuple[str, str]]:
    """Yields (kind, sentence) for each form of what is no personal data."""
    for kind, shown in _others(writer):
        yield kind, writer.choice(_PLACES).format(shown)


def _others(writer: Writer) -> Iterator[tuple[str, str]]:
    n = writer.number
    day, month, year = n(1, 29), n(1, 13), n(1980, 2030)
    yield "private IPv4", f"192.168.{n(0, 256)}.{n(0, 256)}"
    yield "private IPv4", f"10.{n(0, 256)}.{n(0, 256)}.{n(0, 256)}"
    yield "private IPv4", f"172.{n(16, 32)}.{n(0, 256)}.{n(0, 256)}"
    yield "loopback IPv4", f"127.0.0.{n(1, 256)}"
    yield "local IPv6", f"fe80::{_hex(writer)}"
    yield "local IPv6", f"2001:db8::{_hex(writer)}"
    yield "MAC address", ":".join(f"{b:02x}" for b in writer.rng.integers(0, 256, 6))
    yield "slice", f"x[{n(1, 10)}::{n(2, 10)}]"
    yield "C++ name", f"{writer.choice(('a', 'be', 'dead', 'ace'))}::{writer.choice('abcdef')}"
    yield "C++ name", f"std::{writer.rare()}"
    yield "time", f"{n(10, 24)}:{n(10, 60)}:{n(10, 60)}"
    yield "version", f"v{n(1, 10)}.{n(0, 30)}.{n(0, 30)}.{n(1, 10)}"
    yield "version", f"{n(1, 10)}.{n(0, 30)}.{n(0, 100)}"
    yield "version", f"{n(1, 10)}.{n(0, 30)}.{n(0, 30)}.{n(1, 10)}.{n(1, 10)}"
    yield "version and its word", f"version {n(1, 10)}.{n(0, 30)}.{n(0, 30)}.{n(1, 10)}"
    yield "date, ISO", f"{year}-{month:02}-{day:02}"
    yield "date, German", f"{day:02}.{month:02}.{year}"
    yield "date, slashes", f"{month:02}/{day:02}/{year}"
    yield "date, two", f"{year}-{month:02}-{day:02}/{year}-{month:02}-{day + 1:02}"
    yield "date and time", f"{year}-{month:02}-{day:02} {n(10, 24)}:{n(10, 60)}:{n(10, 60)}"
    yield "date and time", f"{year}-{month:02}-{day:02} {n(10, 24)}:{n(10, 60)}"
    yield "years", f"{year}-{year + n(1, 20)}"
    for grouped in _isbns(writer):
        yield "ISBN", f"ISBN {grouped}"
    yield "decimal number", f"0.{n(10**9, 10**10)}"
    yield "decimal number", f"0.{n(0, 10**7):07}"
    yield "decimal number", f"{n(1, 1000)}.{n(0, 10**7):07}"
    yield "decimal numbers", " ".join(f"{x:.6f}" for x in writer.rng.random(5))
    yield "grouped number", f"{n(1, 10)},{n(0, 1000):03},{n(0, 1000):03},{n(0, 1000):03}"
    yield "grouped number", f"{n(1, 10)} {n(0, 1000):03} {n(0, 1000):03} {n(0, 1000):03}"
    yield "hash", "".join(writer.choice("0123456789abcdef") for _ in range(40))
    yield "identifier", f"a{n(2 * 10**9, 10**10)}b"
    yield "file name", f"IMG_{n(2 * 10**9, 10**10)}"
    yield "price", f"${n(10, 1000)},{n(0, 1000):03}.{n(0, 100):02}"
    yield "arXiv and DOI", f"arXiv {n(10, 25)}{month:02}.{n(0, 10**5):05}"
    yield "arXiv and DOI", f"10.1145/{n(10**6, 10**7)}.{n(10**6, 10**7)}"
    yield "at sign", f"@{writer.rare()}"
    yield "at sign", f"root@{writer.rare()}"
    yield "table of numbers", " ".join(map(str, writer.rng.integers(0, 100, 12)))


def _isbns(writer: Writer) -> Iterator[str]:
    """An ISBN-13 and an ISBN-10 of the same book, with their check digits."""
    groups = [writer.choice("013"), f"{writer.number(100, 1000)}", f"{writer.number(0, 10**5):05}"]
    digits = [int(digit) for digit in "".join(groups)]
    weighted = sum(digit * weight for digit, weight in zip(digits, range(10, 1, -1)))
    yield "-".join([*groups, "0123456789X"[-weighted % 11]])
    long = [9, 7, 8, *digits]
    weighted = sum(digit * (1, 3)[place % 2] for place, digit in enumerate(long))
    yield "-".join(["978", *groups, str(-weighted % 10)])

"""Text that a stranger or a model wrote, where it is shown: on a terminal, and in Markdown."""

import html
import re

# Control characters but tab and newline, and what turns the direction of the text around it.
_UNPRINTABLE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")


def printable(text: str) -> str:
    r"""Returns the text with control characters spelt out (\x1b): a terminal would obey them."""
    return _UNPRINTABLE.sub(_spelt_out, text)


def _spelt_out(match: re.Match) -> str:
    return match.group().encode("unicode_escape").decode()


def inline(text: str) -> str:
    """Returns the text as a part of a line, or of a table, of Markdown: it is no markup there."""
    line = " ".join(printable(text).split())
    return html.escape(line, quote=False).replace("\\", "\\\\").replace("|", "\\|")


def fenced(text: str) -> str:
    """Returns the text as a code block of Markdown that nothing in the text ends."""
    longest_run = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest_run + 1)
    return f"{fence}\n{text}\n{fence}\n"

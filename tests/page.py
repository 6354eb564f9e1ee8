"""Measures the page: `python tests/page.py [FOLDER ...]` prints the figures of each folder.

tests/test_structure.py holds lm/ to the ceilings and floors among them. All shares are per 100 code
lines: lines with code on them, so neither blank ones nor comments nor docstrings.
"""

import ast
import io
import sys
import tokenize
from pathlib import Path
from typing import NamedTuple

WIDTH = 100
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
LAYOUT = (tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)


class Function(NamedTuple):
    name: str
    line: int
    length: int  # lines, without its docstring
    parameters: int  # without self and cls


class Page(NamedTuple):
    """The figures of a file, or of several together."""

    lines: int
    code: int
    too_long: int  # lines over WIDTH; those excused by a named noqa are not counted
    comments: int  # on lines of their own
    blanks: int  # inside functions
    comprehensions: int
    lambdas: int
    tangles: list[int]  # lines of nested or long comprehensions, and of lambdas of several lines
    functions: list[Function]

    def per_100(self, count: int) -> float:
        return 100 * count / max(self.code, 1)


def docstring(node: ast.AST) -> ast.Expr | None:
    """The docstring of a module, class or function, as a statement."""
    first = node.body[0] if node.body else None
    if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
        return first if isinstance(first.value.value, str) else None
    return None


def span(node: ast.AST) -> range:
    return range(node.lineno, node.end_lineno + 1)


def measure_function(node: ast.FunctionDef) -> Function:
    doc = docstring(node)
    a = node.args
    names = [argument.arg for argument in a.posonlyargs + a.args + a.kwonlyargs]
    parameters = len(names) + bool(a.vararg) + bool(a.kwarg)
    parameters -= bool(names) and names[0] in ("self", "cls")
    length = len(span(node)) - (len(span(doc)) if doc else 0)
    return Function(node.name, node.lineno, length, parameters)


def is_tangled(node: ast.AST) -> bool:
    """Whether an expression should be a statement: a comprehension in a comprehension or over more
    than three lines, a lambda over more than one.
    """
    if isinstance(node, ast.Lambda):
        return len(span(node)) > 1
    if not isinstance(node, COMPREHENSIONS):
        return False
    inner = [child for child in ast.walk(node) if isinstance(child, COMPREHENSIONS)]
    return len(inner) > 1 or len(span(node)) > 3


def measure(source: str) -> Page:
    """The figures of a file's text."""
    lines = source.split("\n")
    tree = ast.parse(source)
    nodes = list(ast.walk(tree))

    # A line is code if a token other than a comment or a docstring touches it.
    documented = [n for n in nodes if isinstance(n, (ast.Module, ast.ClassDef, *FUNCTIONS))]
    docs = [doc for doc in map(docstring, documented) if doc]
    doc_lines = {line for doc in docs for line in span(doc)}
    code_lines, comment_lines, noqa_lines = set(), set(), set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        touched = range(token.start[0], token.end[0] + 1)
        if token.type == tokenize.COMMENT:
            comment_lines.update(touched)
            if "noqa: E501" in token.string:
                noqa_lines.update(touched)
        elif token.type not in LAYOUT:
            code_lines.update(touched)
            # A directive behind a string of several lines excuses all of them.
            if "noqa: E501" in lines[token.end[0] - 1]:
                noqa_lines.update(touched)
    code_lines -= doc_lines

    functions = [node for node in nodes if isinstance(node, FUNCTIONS)]
    inside = {line for node in functions for line in span(node)} - doc_lines
    return Page(
        lines=len(lines) - 1,
        code=len(code_lines),
        too_long=sum(
            len(line) > WIDTH and number not in noqa_lines for number, line in enumerate(lines, 1)
        ),
        comments=len(comment_lines - code_lines),
        blanks=sum(not lines[line - 1].strip() for line in inside),
        comprehensions=sum(isinstance(node, COMPREHENSIONS) for node in nodes),
        lambdas=sum(isinstance(node, ast.Lambda) for node in nodes),
        tangles=[node.lineno for node in nodes if is_tangled(node)],
        functions=[measure_function(node) for node in functions],
    )


def together(pages: list[Page]) -> Page:
    """The sums of several files' figures."""
    total = Page(*[0] * 7, tangles=[], functions=[])
    for page in pages:
        total = Page(*(mine + theirs for mine, theirs in zip(total, page)))
    return total


def row(name: str, page: Page) -> str:
    lengths = sorted(f.length for f in page.functions) or [0]
    most = max((f.parameters for f in page.functions), default=0)
    shares = (page.comments, page.blanks, page.comprehensions, page.lambdas)
    cells = [
        name,
        page.lines,
        page.code,
        page.too_long,
        *(f"{page.per_100(n):.1f}" for n in shares),
    ]
    cells += [f"{lengths[len(lengths) * 9 // 10]} / {lengths[-1]}", most]
    return "| " + " | ".join(map(str, cells)) + " |"


HEAD = """| | lines | code lines | over 100 | comments / 100 | blank lines in functions / 100 \
| comprehensions / 100 | lambdas / 100 | function p90 / longest | most parameters |
|---|---|---|---|---|---|---|---|---|---|"""


def main(folders: list[str]) -> None:
    print(HEAD)
    for folder in folders:
        files = sorted(Path(folder).rglob("*.py")) if Path(folder).is_dir() else [Path(folder)]
        print(row(folder, together([measure(file.read_text()) for file in files])))


if __name__ == "__main__":
    main(sys.argv[1:] or ["lm", "lm/evals", "tests", "configs"])

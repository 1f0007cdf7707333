r"""Answers that are expressions, `\frac{\sqrt{3}}{2}` or `[1, 2)`, which math-verify compares where it is installed."""

from __future__ import annotations

import re

from rlhf_dist.scoring.answers import NOT_UNITS, ORDINALS, answer_numeral, marked
from rlhf_dist.scoring.latex import plain
from rlhf_dist.scoring.numerals import EXPRESSION, RANGE, numerals

LONGEST = 1000
"""Characters of an expression."""
MATH = re.compile(r"\$|\\\(|\\\[")
AROUND = re.compile(r"^(?:\s|\$|\\\(|\\\[)+|(?:\s|\$|\\\)|\\\]|(?<!\\)\.)+$")
SYMBOLS = {
    "\u2212": "-",
    "\u2013": "-",
    "π": r"\pi ",
    "±": r"\pm ",
    "×": r"\times ",
    "·": r"\cdot ",
    "÷": r"\div ",
    "∞": r"\infty ",
    "≤": r"\le ",
    "≥": r"\ge ",
    "∪": r"\cup ",
    "∩": r"\cap ",
    "∈": r"\in ",
}
ROOT = re.compile(r"√[ \t]*(?:\(([^()]*)\)|([0-9]+|[A-Za-z]))")
SUPERSCRIPT = re.compile(r"(?<=[\w)\]}])([⁺⁻]?[⁰¹²³⁴⁵⁶⁷⁸⁹]+)")
LEVEL = str.maketrans("⁺⁻⁰¹²³⁴⁵⁶⁷⁸⁹", "+-0123456789")
PI = re.compile(r"(?<![A-Za-z\\])pi(?![A-Za-z])")
UNIT = re.compile(r"(?<=[^\s{])\s*\\(?:text|mathrm|mbox)\s*\{\s*([A-Za-z]+)\s*\}(?:\^\{?[23]\}?)?$")
COMMAND = re.compile(r"\\(?:begin|end)\s*\{[A-Za-z]+\*?\}|\\[A-Za-z]+")
OF_MATH = re.compile(r"\\(?!(?:text[a-z]*|mathrm|mathbf|mbox|left|right|quad|qquad)(?![A-Za-z]))[A-Za-z]+")
"""A command that is not for text."""
NO_RANGE = re.compile(rf"{OF_MATH.pattern}|(?<![A-Za-z])[ixyz](?![A-Za-z])")
"""What makes `6 - 5i` a subtraction."""
RUN = re.compile(r"[A-Za-z]{2,}")
PRODUCTS = frozenset(("abc", "xyz", "sqrt"))
"""Runs of three and more letters that are no words."""
WORDS = (
    NOT_UNITS | ORDINALS | {"no", "na", "is", "of", "in", "at", "as", "an", "on", "if", "it", "be", "so", "up", "ok"}
)
"""Of two letters."""
STRUCTURE = re.compile(r"\\[A-Za-z{]|[\^!*+|()\[\]]|[A-Za-z]")
"""What a list of plain numbers, `1,23`, does not have."""
NOT_MATH = re.compile(r"[A-Za-z][0-9]|[0-9]\s*[xX]\s*[0-9]|(?<![_0-9])[0-9]+\s+[0-9]|\?|[-+*/^=]$|^[Nn]/[Aa]$")
"""`H2O`, `2 x 3`, `1 2`, `C++`, `n/a`: read as products they would be something else."""
AROUND_LETTERS = re.compile(r"[\s()\[\]{}.,;:'\"]")


def expression(answer: str) -> str | None:
    """The LaTeX of an answer that may be an expression, for math-verify; None for a number and for what is no
    mathematics: words, dates, times, ranges, one letter."""
    part = marked(answer)[0]
    latex = AROUND.sub("", _latex(part))
    if not latex or len(latex) > LONGEST or not latex.isascii() or answer_numeral(answer) is not None:
        return None
    allowed = (EXPRESSION, RANGE) if NO_RANGE.search(latex) else (EXPRESSION,)
    if any(numeral.value is None and numeral.reason not in allowed for numeral in numerals(plain(part))):
        return None
    unit = UNIT.search(latex)
    if unit and unit[1].lower() not in WORDS:
        latex = latex[: unit.start()]
    bare = COMMAND.sub(" ", latex)
    words = [run for run in RUN.findall(bare) if (len(run) > 2 and run not in PRODUCTS) or run.lower() in WORDS]
    letters = AROUND_LETTERS.sub("", bare)
    choice = not OF_MATH.search(latex) and (not letters or letters.isalpha())  # `(B)`
    return None if words or choice or not STRUCTURE.search(latex) or NOT_MATH.search(bare) else latex


def given(response: str) -> str:
    """The part of a response that math-verify looks for an expression in: after the last `####`, else in the last
    `\\boxed{}`, else the whole text. It is between `$` where all of it is mathematics."""
    part, mark = marked(response)
    if not mark and expression(response) is None:
        return response
    latex = _latex(part).strip()
    return latex if MATH.search(latex) else f"${latex}$"


def _latex(text: str) -> str:
    """Symbols of Unicode as LaTeX."""
    if not text.isascii():
        for symbol, command in SYMBOLS.items():
            text = text.replace(symbol, command)
        text = ROOT.sub(lambda found: rf"\sqrt{{{found[1] or found[2]}}}", text)
        text = SUPERSCRIPT.sub(lambda found: f"^{{{found[1].translate(LEVEL)}}}", text)
    return PI.sub(r"\\pi ", text)

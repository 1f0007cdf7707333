"""Numbers in a text, as exact fractions: what is one number, and what only looks like one."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction

from rlhf_dist.scoring.latex import UNREAD

MOST_DIGITS = 1000
"""Of one number; longer ones are not read."""
EXPONENT_DIGITS = 3
"""Of 1e999 and 10^999; larger exponents are not read."""

DATE = "a date"
TIME = "a time or a ratio"
VERSION = "a version or an address"
RANGE = "a range or a subtraction"
EXPRESSION = "an expression, not a number"
TOO_LARGE = f"too long or too large: the rule reads {MOST_DIGITS} digits and exponents of {EXPONENT_DIGITS}"

ATOM = re.compile(
    r"0[xX][0-9a-fA-F]+"
    r"|(?:(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)*|(?<![\w)\]}.])\.[0-9]+)(?:[eE][+-]?[0-9]+)?"
    rf"|{UNREAD}"
)
PLAIN = re.compile(r"(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+")
SCIENTIFIC = re.compile(r"(?P<mantissa>[^eE]+)(?:[eE](?P<exponent>[+-]?[0-9]+))?")
SIGN = re.compile(r"(?:(?<![\w.)\]}%])[-+±])?[$€£¥₹]?(?:(?<![\w.)\]}%])[-+±])?$")
BETWEEN = re.compile(
    r"(?P<slash>[ \t]*/[ \t]*)[-+]?"
    r"|(?P<colon>:)"
    r"|(?P<dash>-|[ \t]+-[ \t]+)"
    r"|(?P<power>[ \t]*(?:\^|\*\*)[ \t]*\{?[ \t]*)[-+]?\(?"
    r"|(?P<times>[ \t]*[×xX·*÷][ \t]*)[-+]?"
    r"|(?P<plus>[ \t]*\+[ \t]*)"
    r"|(?P<glued>[_'’])"
)
MIXED = re.compile(r"[ \t]+(?:and[ \t]+)?")
PART_OF_A_WORD = re.compile(r"(?:[A-Za-z)}\]]\^\{?|[A-Za-z})]_\{?|[A-Za-z])[-+]?$")
ROOT = re.compile(r"(?:√[ \t]*|\bsqrt[ \t]*\(?[ \t]*)$")
AFTER = re.compile(r"[ \t]*[π√\ufffc]|\^")
SCALE = re.compile(
    r"[ \t]*(?P<percent>%|per[ \t]?cent\b)|(?P<k>[kK])(?![A-Za-z])"
    r"|[ \t]*-?(?P<word>dozen|hundred|thousand|million|billion|trillion)s?\b",
    re.IGNORECASE,
)
SCALES = {
    "percent": Fraction(1, 100),
    "k": Fraction(1000),
    "dozen": Fraction(12),
    "hundred": Fraction(100),
    "thousand": Fraction(1000),
    "million": Fraction(10**6),
    "billion": Fraction(10**9),
    "trillion": Fraction(10**12),
}


@dataclass(frozen=True, slots=True)
class Numeral:
    """One number as it stands in a text, with its sign, `$`, percent sign and word of scale."""

    start: int
    """Of the plain text."""
    end: int
    value: Fraction | None
    """None: not read, see `reason`."""
    scale: Fraction = Fraction(1)
    """What a percent sign or a word such as million multiplies the value by; 1 without one."""
    reason: str = ""
    """Why there is no value, as in `a time or a ratio`."""

    @property
    def skipped(self) -> bool:
        """Whether it is a date, a time or a version: no number at all, so that an earlier one is the last."""
        return self.reason in (DATE, TIME, VERSION)


def numerals(text: str) -> list[Numeral]:
    """The numbers of a text that `latex.plain` made plain, in order."""
    found = [_numeral(text, *parts) for parts in _parts(text)]
    return [numeral for numeral in found if numeral is not None]


def last_numeral(text: str) -> Numeral | None:
    """The last of `numerals` that is not skipped, without reading the others."""
    found = (_numeral(text, *parts) for parts in reversed(_parts(text)))
    return next((numeral for numeral in found if numeral is not None and not numeral.skipped), None)


def same_value(one: Numeral, other: Numeral) -> bool:
    """Whether two numbers are equal in value. Where one of them alone has a percent sign or a word of scale, that may
    be its unit or not: 50% equals 50 and 0.5, 3 million equals 3 and 3,000,000."""
    if one.value is None or other.value is None:
        return False
    whole = one.value * one.scale == other.value * other.scale
    return whole or (1 in (one.scale, other.scale) and one.value == other.value)


@dataclass(frozen=True, slots=True)
class _Group:
    """Atoms joined by signs of calculation, `3/4` or `2024-01-05`."""

    atoms: tuple[re.Match[str], ...]
    joins: tuple[re.Match[str], ...]
    """One fewer than atoms."""


def _parts(text: str) -> list[tuple[_Group, _Group | None]]:
    """Groups of atoms; a mixed number has its fraction beside it."""
    groups = list(_groups(text))
    parts: list[tuple[_Group, _Group | None]] = []
    at = 0
    while at < len(groups):
        mixed = at + 1 < len(groups) and _is_mixed(text, groups[at], groups[at + 1])
        parts.append((groups[at], groups[at + 1] if mixed else None))
        at += 2 if mixed else 1
    return parts


def _groups(text: str) -> Iterator[_Group]:
    atoms: list[re.Match[str]] = []
    joins: list[re.Match[str]] = []
    for atom in ATOM.finditer(text):
        join = BETWEEN.fullmatch(text, atoms[-1].end(), atom.start()) if atoms else None
        if atoms and join is None:
            yield _Group(tuple(atoms), tuple(joins))
            atoms, joins = [], []
        if join is not None:
            joins.append(join)
        atoms.append(atom)
    if atoms:
        yield _Group(tuple(atoms), tuple(joins))


def _is_mixed(text: str, whole: _Group, part: _Group) -> bool:
    """`1 1/2`: a whole number and a proper fraction."""
    if len(whole.atoms) != 1 or not whole.atoms[0][0].isdecimal() or len(part.joins) != 1 or not part.joins[0]["slash"]:
        return False
    value, _ = _value(part)
    between = MIXED.fullmatch(text, whole.atoms[0].end(), part.atoms[0].start())
    return bool(between) and value is not None and 0 < value < 1


def _numeral(text: str, group: _Group, part: _Group | None) -> Numeral | None:
    """A group with what stands around it; None for digits that belong to a word, as in `H2O`, `x^2` or `m2`."""
    first = group.atoms[0]
    before = text[max(0, first.start() - 12) : first.start()]
    if first[0] != UNREAD and PART_OF_A_WORD.search(before):
        return None
    found = SIGN.search(before)
    sign = found[0] if found else ""
    start, end = first.start() - len(sign), _end(text, part or group)
    size, reason = _value(group)
    if part is not None and size is not None:
        size += _value(part)[0] or 0
    if size is not None and (ROOT.search(before) or AFTER.match(text, end) or "±" in sign):
        size, reason = None, EXPRESSION
    if size is None:
        return Numeral(start, end, None, reason=reason)
    scale = Fraction(1)
    while scale >= 1 and (after := SCALE.match(text, end)):  # nothing follows a percent sign
        word = after["word"] or after.lastgroup or ""
        scale, end = scale * SCALES[word.lower()], after.end()
    return Numeral(start, end, -size if sign.count("-") % 2 else size, scale)


def _end(text: str, group: _Group) -> int:
    """Where a group ends, with the brace of 10^{3}."""
    end = group.atoms[-1].end()
    closing = (
        "}" if group.joins and "{" in group.joins[-1][0] else ")" if group.joins and "(" in group.joins[-1][0] else ""
    )
    return end + 1 if closing and text[end : end + 1] == closing else end


def _value(group: _Group) -> tuple[Fraction | None, str]:
    """(the group's value without its sign, "") or (None, why it has none)."""
    kinds = [next(kind for kind, part in join.groupdict().items() if part is not None) for join in group.joins]
    texts = [atom[0] for atom in group.atoms]
    if len(texts) == 1:
        return _atom(texts[0])
    if "colon" in kinds:
        return None, TIME
    if len(kinds) >= 2 and set(kinds) in ({"slash"}, {"dash"}):
        return None, DATE
    if kinds == ["slash"]:
        return _fraction(texts[0], texts[1], group.joins[0][0])
    if kinds[-1] == "power" and texts[-2] == "10" and kinds[:-1] in ([], ["times"]):
        return _times_ten(texts, group.joins)
    return None, RANGE if kinds == ["dash"] else EXPRESSION


def _fraction(top: str, bottom: str, join: str) -> tuple[Fraction | None, str]:
    above, below = _atom(top), _atom(bottom)
    if above[0] is None or below[0] is None:
        return None, above[1] or below[1]
    if below[0] == 0:
        return None, "a division by zero"
    value = above[0] / below[0]
    return (-value if "-" in join else value), ""


def _times_ten(texts: list[str], joins: tuple[re.Match[str], ...]) -> tuple[Fraction | None, str]:
    """10^3 or 2.5 × 10^-3."""
    if (len(joins) == 2 and ("÷" in joins[0][0] or "-" in joins[0][0])) or not texts[-1].isdecimal():
        return None, EXPRESSION
    if len(texts[-1]) > EXPONENT_DIGITS:
        return None, TOO_LARGE
    exponent = -int(texts[-1]) if "-" in joins[-1][0] else int(texts[-1])
    mantissa, reason = _atom(texts[0]) if len(texts) == 3 else (Fraction(1), "")
    return (None, reason) if mantissa is None else (mantissa * Fraction(10) ** exponent, "")


def _atom(text: str) -> tuple[Fraction | None, str]:
    """One run of digits, commas and dots, perhaps with an exponent."""
    found = SCIENTIFIC.fullmatch(text)
    if text == UNREAD or text[:2] in ("0x", "0X") or found is None:
        return None, EXPRESSION
    mantissa, exponent = found["mantissa"], found["exponent"] or "0"
    if not PLAIN.fullmatch(mantissa):
        return None, VERSION
    if len(mantissa) > MOST_DIGITS or len(exponent.lstrip("+-")) > EXPONENT_DIGITS:
        return None, TOO_LARGE
    return Fraction(mantissa.replace(",", "")) * Fraction(10) ** int(exponent), ""

"""Which answers of data rows a reward can compare with, and the number that a response ends in."""

from __future__ import annotations

import re

from rlhf_dist.config.reward_kinds import KINDS
from rlhf_dist.scoring.latex import boxed, plain
from rlhf_dist.scoring.numerals import EXPRESSION, Numeral, last_numeral, numerals

FINAL = "####"
"""GSM8K's mark before the final answer."""
SHOWN = 60
BEFORE = re.compile(r"[\s$]*(?:[A-Za-z]\w{0,20}\s*=\s*)?(?:(?:US|CA|AU|HK|A|C)?[$€£¥₹]|USD|EUR|GBP|Rs\.?)?\s*")
AFTER = re.compile(
    r"\s*[$€£¥₹¢°]?"
    r"(?:[ \t]*(?:[^\W\d_]+[.'’]?(?:\(s\))?(?:\^?\{?[23]\}?|[²³])?|°[CF]?|[-/·*](?=[ \t]*[^\W\d_])))*"
    r"[ \t]*[.$]*\s*"
)
WORD = re.compile(r"[^\W\d_]+")
NOT_UNITS = frozenset(
    (
        "or",
        "and",
        "to",
        "than",
        "plus",
        "minus",
        "times",
        "by",
        "half",
        "quarter",
        "remainder",
        "am",
        "pm",
        "oclock",
        "pi",
    )
)
"""Words after a number that change what it means."""
ORDINALS = frozenset(("st", "nd", "rd", "th"))
LETTERS = frozenset("mgslhdtLAVWKCFNJBb")
"""Units of one letter."""
WRITE = "write one number as the answer: 12, -3.5, 1,234, 3/4, 50% or 12 km"


def unreadable_answer(kind: str, answer: str) -> str | None:
    """Why a reward of this kind cannot compare with the answer, as in `it is a time or a ratio; write ...`; None where
    it can, and for kinds that compare with nothing."""
    if kind in KINDS and not KINDS[kind].compares:
        return None
    if not answer.strip():
        return "it is empty"
    if kind.startswith("rouge"):
        return _unread_words(answer, needed=2 if kind == "rouge2" else 1)
    return _unread_number(answer) if kind == "number" else None


def answer_numeral(answer: str) -> Numeral | None:
    """The number that an answer is; None where `unreadable_answer` has a reason."""
    return None if _unread_number(answer) else numerals(plain(marked(answer)[0]))[0]


def final_numeral(response: str) -> Numeral | None:
    r"""What a response gives as its answer: the first number after the last `####`, else the one number of the last
    `\boxed{}`, else the last number of the text. None without one, or where it is no single value."""
    part, mark = marked(response)
    text = plain(part)
    if not mark:
        last = last_numeral(text)
        return last if last and last.value is not None else None
    found = numerals(text)
    single = bool(found) and not _goes_on(text, found[0]) if mark == FINAL else len(found) == 1
    return found[0] if single and found[0].value is not None else None


def _goes_on(text: str, numeral: Numeral) -> bool:
    """Whether a list follows, as in 1,2,3."""
    return re.match(r",[0-9]", text[numeral.end : numeral.end + 2]) is not None


def marked(text: str) -> tuple[str, str]:
    """(the part that holds the final answer, its mark; the whole text and "" without one)."""
    _, mark, rest = text.rpartition(FINAL)
    if mark:
        return rest, FINAL
    inner = boxed(text)
    return (text, "") if inner is None else (inner, "boxed")


def _unread_number(answer: str) -> str | None:
    part, _ = marked(answer)
    text = plain(part)
    found = numerals(text)
    if not found:
        return f"it has no number; {WRITE}"
    wrong = next((numeral for numeral in found if numeral.value is None), None)
    if wrong is not None:
        shown = part.strip() if wrong.reason == EXPRESSION else text[wrong.start : wrong.end]
        return f"{_shown(shown)} is {wrong.reason}; {WRITE}"
    if len(found) > 1:
        shown = " and ".join(_shown(text[numeral.start : numeral.end]) for numeral in found[:2])
        return f"it has {len(found)} numbers, {shown}{', ...' if len(found) > 2 else ''}; {WRITE}"
    before, after = text[: found[0].start], text[found[0].end :]
    left = before if not BEFORE.fullmatch(before) else after if not _is_unit(after) else ""
    return f"{_shown(left.strip())} beside the number is not a unit; {WRITE}" if left else None


def _unread_words(answer: str, needed: int) -> str | None:
    """ROUGE reads English: whatever is not a-z or a digit separates words for it."""
    words = re.findall(r"[a-z0-9]+", answer.lower())
    if len(words) >= needed:
        return None
    has = f"it has {len(words)} of the {needed} words that it needs" if words else "it has no word"
    return f"{has}: ROUGE reads a-z and digits only, and any response would get 0; use bleu or chrf"


def _is_unit(text: str) -> bool:
    words = WORD.findall(text)
    good = all(word in LETTERS if len(word) == 1 else word.lower() not in NOT_UNITS | ORDINALS for word in words)
    return bool(AFTER.fullmatch(text)) and good


def _shown(text: str) -> str:
    return repr(text if len(text) <= SHOWN else text[: SHOWN - 3] + "...")

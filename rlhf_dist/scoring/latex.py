"""LaTeX and typography of numbers as plain text: `\\frac{3}{4}` is 3/4, `1{,}234` is 1,234, `½` is 1/2."""

from __future__ import annotations

import re
import unicodedata

UNREAD = "\ufffc"
"""Stands for a part that is an expression: a root, a fraction of letters."""
COMMAND = re.compile(r"\\(?:(?P<fraction>[dtc]?frac)(?![A-Za-z])|sqrt(?![A-Za-z])(?:[ \t]*\[[^\]]{0,20}\])?)")
SIMPLE = re.compile(r"[ \t]*([-+]?(?:[0-9]+(?:[.,][0-9]+)*|\.[0-9]+))[ \t]*")
REPLACED = (
    (re.compile(r"[\u2212\u2010-\u2013\ufe63\uff0d]"), "-"),
    (re.compile(r"\u2044|\u2215"), "/"),
    (re.compile(r"(?<=[0-9])(?:\{,\}|\\,|\\!,?|,\\!)(?=[0-9]{3})"), ","),
    (re.compile(r"\\(?:text|mathrm|mathbf|mathit|textbf|textit|mbox|operatorname)[ \t]*\{([^{}]*)\}"), r" \1"),
    (re.compile(r"\\(?:left|right|displaystyle|quad|qquad)(?![A-Za-z])|\\[,;:! ]|\\\\"), " "),
    (re.compile(r"\^[ \t]*(?:\\circ|\{[ \t]*\\circ[ \t]*\})"), "°"),
    (re.compile(r"\\([%$#&{}_])"), r"\1"),
    (re.compile(r"\\times(?![A-Za-z])"), "×"),
    (re.compile(r"\\cdot(?![A-Za-z])"), "·"),
    (re.compile(r"\\div(?![A-Za-z])"), "÷"),
    (re.compile(r"\\pm(?![A-Za-z])"), "±"),
    (re.compile(r"\\pi(?![A-Za-z])"), "π"),
    (re.compile(r"\\degree(?![A-Za-z])"), "°"),
    (re.compile(r"\\[()\[\]]"), " "),
)
SUPERSCRIPT = re.compile(r"(?<=[0-9])([⁺⁻]?[⁰¹²³⁴⁵⁶⁷⁸⁹]+)")
LEVEL = str.maketrans("⁺⁻⁰¹²³⁴⁵⁶⁷⁸⁹", "+-0123456789")
VULGAR = re.compile(r"[¼-¾⅐-⅞]")


def plain(text: str) -> str:
    """The text with fractions, minus signs, thin spaces and units of LaTeX and typography in plain characters."""
    if not text.isascii():
        text = VULGAR.sub(lambda found: " " + unicodedata.normalize("NFKC", found[0]), text)
        text = SUPERSCRIPT.sub(lambda found: f"^{found[1].translate(LEVEL)}", text)
    for pattern, by in REPLACED[: 2 if "\\" not in text and "{" not in text else None]:
        text = pattern.sub(by, text)
    return _without_commands(text) if "\\" in text else text


def boxed(text: str) -> str | None:
    r"""What stands in the last `\boxed{...}` or `\fbox{...}`; "" where its brace is not closed, None without one."""
    start = max(text.rfind("\\boxed{"), text.rfind("\\fbox{"))
    if start < 0:
        return None
    inner, _ = _argument(text, text.index("{", start))
    return inner or ""


def _without_commands(text: str) -> str:
    """`\\frac` of two plain numbers as a/b; other fractions and roots as UNREAD."""
    parts: list[str] = []
    at = 0
    while found := COMMAND.search(text, at):
        parts.append(text[at : found.start()])
        top, at = _argument(text, found.end())
        bottom = None
        if found["fraction"]:
            bottom, at = _argument(text, at)
        apart = " " if text[found.start() - 1 : found.start()].isalnum() else ""  # 1\\frac{1}{2} is mixed
        if top is not None and bottom is not None and SIMPLE.fullmatch(top) and SIMPLE.fullmatch(bottom):
            parts.append(f"{apart}{top.strip()}/{bottom.strip()}")
        else:
            parts.append(UNREAD)
    return "".join([*parts, text[at:]])


def _argument(text: str, at: int) -> tuple[str | None, int]:
    """(a command's argument at `at`: what is in braces, or one character; None where it does not end, what follows)."""
    while at < len(text) and text[at] in " \t":
        at += 1
    if at >= len(text):
        return None, at
    if text[at] != "{":
        return text[at], at + 1
    depth = 0
    for place in range(at, len(text)):
        depth += {"{": 1, "}": -1}.get(text[place], 0)
        if depth == 0:
            return text[at + 1 : place], place + 1
    return None, len(text)

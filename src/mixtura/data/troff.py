"""Manual pages as plain text: macros and escapes of troff are taken away, words stay."""

from __future__ import annotations

import re

_TEXT_MACROS = re.compile(r"^\.\s*(?:SH|SS|B|I|SM|SB|BR|IR|RB|RI|BI|IB|TP|IP)\b[ \t]*(.*)")
_ARGUMENT_IS_WIDTH = re.compile(r"^\.\s*(?:TP|IP)\b")
_NAMED = {"aq": "'", "oq": "'", "cq": "'", "lq": '"', "rq": '"', "dq": '"', "bu": "*", "em": "-", "en": "-", "rs": "\\"}
_NAMED |= {"ha": "^", "ti": "~", "co": "(c)", "Fo": "\u00ab", "Fc": "\u00bb", "..": "..."}
_ESCAPES = (
    (re.compile(r"\\\*\((\w\w)|\\\((\S\S)|\\\[(\S+?)\]"), lambda m: _NAMED.get(m[1] or m[2] or m[3], "")),
    (re.compile(r"\\f(?:\[\w*\]|\(\w\w|\w)"), ""),
    (re.compile(r"\\s[-+]?\d+|\\[hvwlL]'[^']*'|\\[&%:/,|^)]|\\c$"), ""),
    (re.compile(r"\\-"), "-"),
    (re.compile(r"\\[ ~0]"), " "),
    (re.compile(r"\\\".*$"), ""),
    (re.compile(r"\\e"), r"\\"),
    (re.compile(r"\\(['`])"), r"\1"),
)


def plain_text(page: str) -> str:
    """The words of a manual page, one line for each of its lines; tables and preprocessor input are left out."""
    lines: list[str] = []
    skipping = False
    for line in page.splitlines():
        if line.startswith((".TS", ".EQ", ".de", ".ig")):
            skipping = True
        elif line.startswith((".TE", ".EN", "..")):
            skipping = False
        elif not skipping and (text := _line(line)) is not None:
            lines.append(text)
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip()


def _line(line: str) -> str | None:
    """Text of a line; None if it has none, "" where a paragraph begins."""
    if line.startswith(("'", ".")):
        match = _TEXT_MACROS.match(line)
        if match is None:
            return "" if re.match(r"^\.\s*(?:PP|P|LP|sp|RS|RE|br)\b", line) else None
        has_width = _ARGUMENT_IS_WIDTH.match(line)
        line = match[1].replace('"', "")
        line = re.sub(r"(^|\s+)\d+[a-z]?$", "", line) if has_width else line
    for pattern, by in _ESCAPES:
        line = pattern.sub(by, line)
    return line.rstrip()

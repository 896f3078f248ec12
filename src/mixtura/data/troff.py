"""Manual pages as plain text: macros and escapes of troff are taken away, words stay."""

from __future__ import annotations

import re

_TEXT_MACROS = re.compile(r"^\.\s*(?:SH|SS|B|I|SM|SB|BR|IR|RB|RI|BI|IB|TP|IP)\b[ \t]*(.*)")
_ARGUMENT_IS_WIDTH = re.compile(r"^\.\s*(?:TP|IP)\b")
_NAMED = {"aq": "'", "oq": "'", "cq": "'", "lq": '"', "rq": '"', "dq": '"', "bu": "*", "em": "-", "en": "-", "rs": "\\"}
_NAMED |= {"ha": "^", "ti": "~", "co": "(c)", "Fo": "\u00ab", "Fc": "\u00bb", "..": "...", "hy": "-", "ga": "`"}
_NAMED |= {"Aq": "'", "C'": "'", "C`": "`", 'L"': '"', 'R"': '"', "``": '"', "''": '"', "--": "-", "C+": "C++"}
_NAMED |= {"Gt": ">", "Lt": "<", "Am": "&", "+-": "\u00b1", "mc": "\u00b5", "mu": "\u00d7", ">=": "\u2265", "at": "@"}
_ESCAPE = re.compile(
    r"""\\(?:
      \*?(?:\((?P<two>\S\S)|\[(?P<long>[^]\s]*)\])  # a character or a string by its name
    | (?P<itself>['`.])
    | (?P<minus>-) | (?P<backslash>[e\\]) | (?P<space>[ ~0])
    | \*[^\s\\]?                                    # a string by one letter
    | [fmM](?:\[[^]]*\]|\(\S\S|\w)                  # font, color, color behind
    | s(?:[-+]?\d+|\[[^]]*\]) | [hvwlL]'[^']*'      # size, motions, lines
    | [&%:/,|^){}du] | c$ | ".*$
    )""",
    re.VERBOSE,
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
    return _ESCAPE.sub(_text, line).rstrip()


def _text(match: re.Match[str]) -> str:
    if name := match["two"] or match["long"]:
        return _NAMED.get(name, "")
    signs = {"minus": "-", "backslash": "\\", "space": " "}
    return match["itself"] or signs.get(match.lastgroup or "", "")

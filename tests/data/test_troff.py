import pytest

from mixtura.data.troff import plain_text

PAGE = r"""'\" t
.\" A comment
.TH LS 1 "Mai 2024" "GNU" "Dienstprogramme"
.SH BEZEICHNUNG
ls \- Verzeichnisinhalte auflisten
.SH "ÜBERSICHT UND MEHR"
.B ls
[\fIOPTION\/\fP]\&... [\f[I]DATEI\f[R]]\|...  \" the rest is a comment
.de XX
hidden \$1
..
.PP
Die Datei \(lqx\(rq ist \(aqda\(aq\(en immer.
.TP 12n
\fB\-a\fR, \fB\-\-all\fR
auch Einträge, die mit .\& beginnen
.TS
l l.
not	shown
.TE
.IP \(bu 2
.BR chmod (1)
.EX
a = b\en
.EE
"""

TEXT = r"""BEZEICHNUNG
ls - Verzeichnisinhalte auflisten
ÜBERSICHT UND MEHR
ls
[OPTION]... [DATEI]...

Die Datei "x" ist 'da'- immer.

-a, --all
auch Einträge, die mit . beginnen
*
chmod (1)
a = b\n"""


def test_a_page():
    assert plain_text(PAGE) == TEXT


@pytest.mark.parametrize(
    ("line", "text"),
    [
        (r"\m[blue]Systemd\m[]\&\u[1]\d, \M[red]x\M[]", "Systemd[1], x"),
        (r'\*(L"quoted\*(R" in \*(C+', '"quoted" in C++'),
        (r"\*(``so\*(''", '"so"'),
        (r"\*(xxunknown\*[also]\*x strings", "unknown strings"),
        (r"it\(aqs \*(Aqx\*(Aq \[lq]y\[rq] \*[Gt]", "it's 'x' \"y\" >"),
        (r"\(xxunknown \[nothing]characters", "unknown characters"),
        (r"\-\-option=\-1", "--option=-1"),
        (r"\*\-\*\-version", "--version"),
        (r"\fBbold\fP \f(CWcode\fR \f[CR]x\f[]", "bold code x"),
        (r"\s-2small\s0 \s+1big\s[10]", "small big"),
        (r"\h'2n'a\v'1'b\w'abc'", "ab"),
        (r"a\ b\~c\0d", "a b c d"),
        (r"a\|b\^c\&d\%e\:f\/g\,h\)i", "abcdefghi"),
        (r"printf \(dqa\en\(dq", r'printf "a\n"'),
        (r"\e(aq is how to write \e\-", r"\(aq is how to write \-"),
        (r"a backslash \\ and a dot \.", r"a backslash \ and a dot ."),
        (r"joined\c", "joined"),
        (r"\c inside stays", r"\c inside stays"),
        (r"text \" comment", "text"),
        (r"\'accent\` \{block\}", "'accent` block"),
        ("no escape at all: [x] (y) *z*", "no escape at all: [x] (y) *z*"),
        ("ends in a backslash \\", "ends in a backslash \\"),
    ],
)
def test_escapes(line, text):
    assert plain_text(line) == text


@pytest.mark.parametrize(
    ("line", "text"),
    [
        (".SH NAME", "NAME"),
        ('.SS "two words"', "two words"),
        (".B bold words", "bold words"),
        ('.BI "\\-x " value', "-x  value"),
        (".TP 8", ""),
        (".TP", ""),
        (".IP \\(bu 4n", "*"),
        (".IP word", "word"),
        (".IP 3", ""),
        (". B indented", "indented"),
        (".Bold is no macro of ours", ""),
        (".TH NAME 1", ""),
        ('.\\" comment', ""),
        ("'br", ""),
        (".", ""),
    ],
)
def test_macros(line, text):
    assert plain_text(line) == text


@pytest.mark.parametrize("macro", [".PP", ".P", ".LP", ".sp", ".sp 2", ".br", ".RS 4", ".RE", ". PP"])
def test_macros_that_break_a_paragraph(macro):
    assert plain_text(f"one\n{macro}\n{macro}\n{macro}\ntwo").split("\n") == ["one", "", "two"]


@pytest.mark.parametrize(("begin", "end"), [(".TS", ".TE"), (".EQ", ".EN"), (".de Me", ".."), (".ig", "..")])
def test_what_is_no_text_is_left_out(begin, end):
    assert plain_text(f"before\n{begin}\ninside\n.SH inside\n{end}\nafter") == "before\nafter"


@pytest.mark.parametrize("page", ["", "\n\n", ".TH X 1\n", ".TS\nnever closed"])
def test_pages_without_text(page):
    assert plain_text(page) == ""

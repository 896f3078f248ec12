"""Tables in files: delimited text or .npy, as names and numbers. N rows, D columns."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mixtura.core.errors import FileFormatError, OptionError, unknown_name

Floats = NDArray[np.floating]
DELIMITERS = (";", "\t", "|", ",")  # a comma last: it may be a decimal sign
MISSING = {"", "na", "n/a", "nan", "null", "none", "?", "-"}


@dataclass(frozen=True)
class Table:
    """Numbers of a file.

    Attributes:
        names: of the D columns.
        data_ND: their values; NaN where one is missing.
        left_out: why a column of the file is not here, by name.
        notes: how the file was understood, where it could be otherwise.
    """

    names: list[str]
    data_ND: Floats
    left_out: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def column(self, name: str) -> int:
        """Index of a column.

        Raises:
            UnknownNameError, OptionError: if it is not there, or was left out.
        """
        if name in self.left_out:
            raise OptionError(f"column {name!r} cannot be used: it {self.left_out[name]}")
        if name not in self.names:
            raise unknown_name("column", name, self.names)
        return self.names.index(name)

    def only(self, names: Sequence[str]) -> Table:
        """The table of some columns, in the order given.

        Raises:
            UnknownNameError, OptionError: as ``column``, or if one is named twice.
        """
        twice = next((name for name in names if list(names).count(name) > 1), None)
        if twice is not None:
            raise OptionError(f"column {twice!r} is named twice")
        index = [self.column(name) for name in names]
        return Table(list(names), self.data_ND[:, index], notes=self.notes)

    def without(self, reasons: dict[str, str]) -> Table:
        """The table without some columns, and why."""
        kept = [name for name in self.names if name not in reasons]
        index = [self.names.index(name) for name in kept]
        return Table(kept, self.data_ND[:, index], {**self.left_out, **reasons}, self.notes)


def read_table(path: str | Path) -> Table:
    """Read a .npy array (mapped, not loaded), or delimited text with or without a line of names.

    Columns that hold anything but numbers are left out by name. Empty cells, NA, NaN, null and ? are missing values;
    a row of nothing else is a row, an empty line is none. Where the delimiter is no comma, a comma may be the decimal
    sign.

    Raises:
        FileFormatError: if it is neither, is empty, has no column of numbers, or lines of different numbers of cells.
    """
    path = Path(path)
    return _read_array(path) if path.suffix == ".npy" else _read_text(path)


def _read_array(path: Path) -> Table:
    try:
        data_ND = np.load(path, mmap_mode="r", allow_pickle=False)
    except ValueError as error:
        raise FileFormatError(f"{str(path)!r} is no array of numbers: {error}") from error
    if data_ND.ndim != 2 or data_ND.dtype.kind not in "iuf" or not data_ND.size:
        raise FileFormatError(f"{str(path)!r} must hold a table of numbers, got {data_ND.dtype} {data_ND.shape}")
    table = Table([f"column {d}" for d in range(data_ND.shape[1])], data_ND)
    infinite = _infinite(data_ND) if data_ND.dtype.kind == "f" else {}
    return _not_empty(path, table.without(infinite) if infinite else table)


def _infinite(data_ND: Floats) -> dict[str, str]:
    """Columns of an array with an infinite value, and why they are left out."""
    infinite_D = np.isinf(np.fmax.reduce(data_ND, axis=0)) | np.isinf(np.fmin.reduce(data_ND, axis=0))
    rows = {int(d): int(np.isinf(data_ND[:, d]).argmax()) for d in np.flatnonzero(infinite_D)}
    return {f"column {d}": f"holds an infinite value in row {row}, counted from 0" for d, row in rows.items()}


def _not_empty(path: Path, table: Table) -> Table:
    if not table.names:
        reasons = [f"{name!r} {reason}" for name, reason in table.left_out.items()]
        more = f"; and {len(reasons) - 3} more" if len(reasons) > 3 else ""
        raise FileFormatError(f"no column of {str(path)!r} holds finite numbers: {'; '.join(reasons[:3])}{more}")
    return table


def _read_text(path: Path) -> Table:
    try:
        lines = path.read_text("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise FileFormatError(f"{str(path)!r} is not text in UTF-8: {error.reason} at byte {error.start}") from error
    delimiter = _delimiter(lines)
    try:
        numbers, rows = _cells(path, lines, delimiter)
    except csv.Error as error:
        raise FileFormatError(f"{str(path)!r} is no table: {error}") from error
    names, begin, notes = _head(path, rows, comma=delimiter != ",")
    columns, left_out = _columns(names, rows[begin:], numbers[begin:], comma=delimiter != ",")
    table = Table(list(columns), np.array(list(columns.values())).reshape(-1, len(rows) - begin).T, left_out, notes)
    used = [d for d, name in enumerate(names) if name in columns]
    if delimiter != "," and any("," in row[d] for row in rows[begin:] for d in used):
        notes.append("Commas in numbers were read as decimal signs.")
    return _not_empty(path, table)


def _columns(
    names: list[str], rows: list[list[str]], numbers: list[int], *, comma: bool
) -> tuple[dict[str, Floats], dict[str, str]]:
    """Values of the columns that hold numbers, and why others cannot be used."""
    columns, left_out = {}, {}
    for d, name in enumerate(names):
        values, reason = _column([row[d] for row in rows], numbers, comma)
        if reason:
            left_out[name] = reason
        else:
            columns[name] = values
    return columns, left_out


def _head(path: Path, rows: list[list[str]], *, comma: bool) -> tuple[list[str], int, list[str]]:
    """Names of the columns, where the rows begin, and what must be said of it; a line with a number holds no names."""
    first = next((i for i, row in enumerate(rows) if any(cell.strip() for cell in row)), None)
    if first is None:
        raise FileFormatError(f"{str(path)!r} is empty")
    numbers = [_number(cell, comma) for cell in rows[first]]
    text = any(number is None for number in numbers)
    if not text or any(number is not None and np.isfinite(number) for number in numbers):
        notes = ["The first line was read as a row, not as names of columns: it holds numbers."] if text else []
        return [f"column {d}" for d in range(len(numbers))], 0, notes
    if len(rows) == first + 1:
        raise FileFormatError(f"{str(path)!r} holds names of columns, and no row")
    return _unique([cell.strip() for cell in rows[first]]), first + 1, []


def _cells(path: Path, lines: list[str], delimiter: str) -> tuple[list[int], list[list[str]]]:
    """Cells of the lines that are not blank, and the numbers of those lines."""
    numbers, rows = [], []
    for number, row in _rows(lines, delimiter):
        numbers.append(number)
        rows.append(row)
        if len(row) != len(rows[0]):
            raise FileFormatError(
                f"{str(path)!r} has {len(row)} cells in line {number}, and {len(rows[0])} in the first"
            )
    return numbers, rows


def _rows(lines: list[str], delimiter: str) -> Iterator[tuple[int, list[str]]]:
    reader = csv.reader(lines, delimiter=delimiter, skipinitialspace=True)
    return ((reader.line_num, row) for row in reader if len(row) > 1 or lines[reader.line_num - 1].strip())


def _delimiter(lines: list[str]) -> str:
    """The first delimiter that splits all lines alike, or else the one that most evenly splits the first lines."""
    return next((one for one in DELIMITERS if _splits(lines, one)), None) or _nearest_delimiter(lines)


def _splits(lines: list[str], delimiter: str) -> bool:
    """Whether all rows have the same number of cells, of at least two."""
    try:
        widths = (len(row) for _, row in _rows(lines, delimiter))
        first = next(widths, 0)
        return first > 1 and all(width == first for width in widths)
    except csv.Error:
        return False


def _nearest_delimiter(lines: list[str]) -> str:
    first = [line for line in lines[:50] if line.strip()]

    def least(delimiter: str) -> int:
        return min((line.count(delimiter) for line in first), default=0)

    return max(reversed(DELIMITERS), key=least)


def _number(cell: str, comma: bool) -> float | None:
    """The number of a cell, NaN where it is missing, None where it is text."""
    cell = cell.strip()
    if cell.lower() in MISSING:
        return np.nan
    try:
        return float(cell.replace(",", ".") if comma else cell)
    except ValueError:
        return None


def _column(cells: list[str], numbers: list[int], comma: bool) -> tuple[Floats, str]:
    """Values of a column, and why it cannot be used, or ""."""
    values = np.empty(len(cells))
    for i, cell in enumerate(cells):
        number = _number(cell, comma)
        if number is None:
            return values, f"holds text such as {cell.strip()[:40]!r} in line {numbers[i]}"
        values[i] = number
    if np.isinf(values).any():
        return values, f"holds an infinite value in line {numbers[int(np.isinf(values).argmax())]}"
    return values, ""


def _unique(names: list[str]) -> list[str]:
    """Names without doubles; empty ones are numbered."""
    out: list[str] = []
    for d, name in enumerate(names):
        name = name or f"column {d}"
        count = sum(other == name or other.startswith(f"{name} (") for other in out)
        out.append(f"{name} ({count + 1})" if name in out else name)
    return out

"""The counts of a profile as a table, in text and in HTML."""

from __future__ import annotations

import html
from collections.abc import Iterable
from typing import Any

CountsByKind = dict[str, dict[str, dict[str, Any]]]  # by function, kind and column

_HEADER = (
    "function", "kind", "calls", "elements", "runs", "body", "overhead", "in", "out",
    "exceptions", "from tape", "reran", "compiling", "tapes"
)  # fmt: skip


def text_of(counts: CountsByKind) -> str:
    """The table with aligned columns."""
    table = [list(_HEADER), *_rows(counts)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = [
        "  ".join(
            cell.ljust(width) if i < 2 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in table
    ]
    return "\n".join([*lines, *_reasons(counts)])


def html_of(counts: CountsByKind) -> str:
    """The table as notebooks show it."""

    def row(cells: Iterable[str], tag: str) -> str:
        return "".join(
            f'<{tag} style="text-align: {"left" if i < 2 else "right"}">'
            f"{html.escape(cell)}</{tag}>"
            for i, cell in enumerate(cells)
        )

    body = "".join(f"<tr>{row(cells, 'td')}</tr>" for cells in _rows(counts))
    return (
        f"<table><thead><tr>{row(_HEADER, 'th')}</tr></thead>"
        f"<tbody>{body}</tbody></table>"
        + "".join(f"<p>{html.escape(reason)}</p>" for reason in _reasons(counts))
    )


def _rows(counts: CountsByKind) -> list[list[str]]:
    return [
        [
            function if i == 0 else "",
            kind,
            f"{row['calls']:,}",
            f"{row['elements']:,}",
            f"{row['runs']:,}",
            _seconds(row["body_seconds"]),
            _seconds(row["overhead_seconds"]),
            _bytes(row["bytes_in"]),
            _bytes(row["bytes_out"]),
            f"{row['exceptions']:,}",
            f"{row['from_tape']:,}",
            f"{row['reran']:,}",
            _seconds(row["compile_seconds"]),
            _bytes(row["tape_bytes"]),
        ]
        for function, kinds in counts.items()
        for i, (kind, row) in enumerate(kinds.items())
    ]


def _reasons(counts: CountsByKind) -> list[str]:
    return [
        f"{function}, {kind}, ran one by one: {row['one_by_one']}"
        for function, kinds in counts.items()
        for kind, row in kinds.items()
        if row["one_by_one"]
    ] + [
        f"{function}, {kind}, waited {_seconds(row['wait_seconds'])} for its executor"
        for function, kinds in counts.items()
        for kind, row in kinds.items()
        if row["wait_seconds"]
    ]


def _seconds(value: float) -> str:
    for scale, unit in ((1, "s"), (1e3, "ms")):
        if value * scale >= 1:
            return f"{value * scale:.2f} {unit}"
    return f"{value * 1e6:.1f} us"


def _bytes(value: float) -> str:
    for scale, unit in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if value >= scale:
            return f"{value / scale:.1f} {unit}"
    return f"{value} B"

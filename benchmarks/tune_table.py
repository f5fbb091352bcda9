"""Write measured rows into the source of the launch table, `TUNED` in hiera_kernels/kernels/launch_table.py.

A row is one line of Python below one line of comment that says where it was measured, so that a reviewer reads a diff.
Rows of other keys stay as they are, with their comments.
"""

import ast
from pathlib import Path
from typing import NamedTuple

from benchmarks.tune_space import Key
from hiera_kernels.kernels import launch_table
from hiera_kernels.kernels.launch_table import Tiles

TABLE = Path(launch_table.__file__)


class Row(NamedTuple):
    """Fields in which a configuration differs from the rules (none: the rules are the best), and what was measured."""

    fields: dict[str, int]
    comment: str


def difference(tile: Tiles, own: Tiles) -> dict[str, int]:
    """The fields of `tile` that are not those of the rules."""
    return {name: value for name, value in tile._asdict().items() if value != getattr(own, name)}


def line(key: Key, row: Row) -> list[str]:
    """The source lines of a row; none where the rules are the best."""
    if not row.fields:
        return []
    fields = ", ".join(f'"{name}": {value}' for name, value in row.fields.items())
    head = ", ".join(f'"{part}"' if isinstance(part, str) else str(part) for part in key)
    return [f"    # {row.comment}", f"    ({head}): {{{fields}}},"]


def rewritten(source: str, rows: dict[Key, Row]) -> str:
    """The source of the launch table with these rows in `TUNED`: replaced in place, removed, or added at its end.

    Raises:
        ValueError: `source` has no dictionary TUNED of one row a line, the brace below it on a line of its own.
    """
    table = _table(source)
    lines = source.splitlines()
    first, last = table.lineno, table.end_lineno  # of the line behind the opening brace; of the closing brace
    body, new, waiting = [], dict(rows), []
    entries = {}
    for key, value in zip(table.keys, table.values, strict=True):
        if key.lineno != value.end_lineno:
            raise ValueError(f"TUNED must have one row a line, see line {key.lineno}")
        entries[key.lineno - 1] = ast.literal_eval(key)
    if table.end_lineno == table.lineno:
        lines[first - 1 : first] = [lines[first - 1].replace("{}", "{"), "}"]
        last = first + 1
    for i in range(first, last - 1):
        if i not in entries:
            waiting.append(lines[i])  # the comment above a row goes with it
            continue
        if entries[i] in new:
            body += line(entries[i], new.pop(entries[i]))
        else:
            body += [*waiting, lines[i]]
        waiting = []
    body += waiting
    for key in sorted(new):
        body += line(key, new[key])
    return "\n".join([*lines[:first], *body, *lines[last - 1 :]]) + "\n"


def _table(source: str) -> ast.Dict:
    for node in ast.parse(source).body:
        targets = [node.target] if isinstance(node, ast.AnnAssign) else getattr(node, "targets", [])
        if any(isinstance(t, ast.Name) and t.id == "TUNED" for t in targets) and isinstance(node.value, ast.Dict):
            return node.value
    raise ValueError("the source has no dictionary TUNED")


def write(path: Path, rows: dict[Key, Row]) -> None:
    """Write the launch table with these rows to `path`; where it does not exist, beginning from the package's own."""
    source = (path if path.exists() else TABLE).read_text()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(rewritten(source, rows))

"""Write docs/commands.md anew from the commands' own help, and docs/bench.schema.json: `make docs`.

What lies above the mark in the page is written by hand and stays. So does docs/serving.md, apart
from its tables of fields and limits.
"""

from collections.abc import Iterable, Iterator
from dataclasses import fields
from pathlib import Path
from textwrap import indent
from typing import Any

import click

from varedit_export.cli import main as export_main
from varedit_runtime.bench_report import schema
from varedit_runtime.cli import main as run_main
from varedit_serve.cli import main as serve_main
from varedit_serve.fields import fields_of
from varedit_serve.limits import Limits

PAGE = Path(__file__).parent.parent / "docs" / "commands.md"
SERVING = PAGE.with_name("serving.md")
MARK = "<!-- All below is written by `make docs`. -->\n"
COMMANDS: dict[str, click.Command] = {
    "varedit-run": run_main,
    "varedit-export": export_main,
    "varedit-serve": serve_main,
}
WIDTH = 80


def helps() -> Iterator[tuple[str, str]]:
    """Yield every command and its help."""
    for name, whole in COMMANDS.items():
        context = click.Context(whole, info_name=name, terminal_width=WIDTH)
        yield name, whole.get_help(context)
        for own, command in getattr(whole, "commands", {}).items():
            if not command.hidden:
                inner = click.Context(command, context, own, terminal_width=WIDTH)
                yield f"{name} {own}", command.get_help(inner)


def refreshed(page: str) -> str:
    """Return the page with the commands' current help."""
    written, mark, _ = page.partition(MARK)
    assert mark, f"{PAGE} has lost its mark: {MARK}"
    return written + MARK + "".join(f"\n## {n}\n\n{indent(h, '    ')}\n" for n, h in helps())


def refreshed_tables(page: str) -> str:
    """Return the page about serving with the current tables of fields and limits."""
    table = fields_of(Limits(), scales=7)
    rows = [
        (
            f"`{f.name}`",
            _values(f.schema),
            "" if f.default is None else f"`{str(f.default).lower()}`",
            (f.help + " Required." * f.required).replace("7 scales", "the scales"),
        )
        for f in table.values()
    ]
    page = _replaced(page, "table", ("field", "values", "default", "meaning"), rows)
    limits = [
        (f"`--{f.name.replace('_', '-')}`", f"{f.default:,}".removesuffix(".0"), f.metadata["help"])
        for f in fields(Limits)
    ]
    return _replaced(page, "limits", ("option", "default", "meaning"), limits)


def _values(schema: dict[str, Any]) -> str:
    """Return what a schema allows, in words."""
    match schema:
        case {"format": "binary"}:
            return "a file"
        case {"enum": choices}:
            return ", ".join(f"`{choice}`" for choice in choices)
        case {"type": "boolean"}:
            return "`true`, `false`"
        case {"maxLength": most}:
            return f"text, at most {most:,} characters"
        case {"minimum": least, "maximum": most}:
            return f"{least:,} to {most:,}"
        case {"oneOf": [one, _]}:
            return f"{_values(one)}, or a list"
    return "`auto`, or `WIDTHxHEIGHT`"


def _replaced(page: str, name: str, head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    before, start, rest = page.partition(f"<!-- The {name} ")
    mark, _, rest = rest.partition("-->\n")
    _, end, after = rest.partition(f"<!-- End of the {name}. -->")
    assert end, f"{SERVING} has lost the marks of its {name}"
    lines = [head, ["---"] * len(head), *rows]
    table = "".join(f"| {' | '.join(line)} |\n" for line in lines).replace("| --- ", "|---")
    return f"{before}{start}{mark}-->\n\n{table}\n{end}{after}"


if __name__ == "__main__":
    PAGE.write_text(refreshed(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    PAGE.with_name("bench.schema.json").write_bytes(schema())
    SERVING.write_text(refreshed_tables(SERVING.read_text(encoding="utf-8")), encoding="utf-8")

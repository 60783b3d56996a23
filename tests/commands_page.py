"""Write docs/commands.md anew from the commands' own help, and docs/bench.schema.json: `make docs`.

What lies above the mark in the page is written by hand and stays.
"""

from collections.abc import Iterator
from pathlib import Path
from textwrap import indent

import click

from varedit_export.cli import main as export_main
from varedit_runtime.bench_report import schema
from varedit_runtime.cli import main as run_main
from varedit_serve.cli import main as serve_main

PAGE = Path(__file__).parent.parent / "docs" / "commands.md"
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


if __name__ == "__main__":
    PAGE.write_text(refreshed(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    PAGE.with_name("bench.schema.json").write_bytes(schema())

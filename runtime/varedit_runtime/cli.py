"""The `varedit-run` command; what its subcommands do is in `commands/`."""

from collections.abc import Iterator

import click
from click.shell_completion import CompletionItem

from varedit_runtime.commands.bench import bench
from varedit_runtime.commands.bundles import bundles
from varedit_runtime.commands.edit import EDIT, edit
from varedit_runtime.commands.prepare import grids, prepare
from varedit_runtime.terminal.command import CommandGroup, debug_option


class EditGroup(CommandGroup):
    """A group that edits a picture where the first argument names no other command."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        own = {name for option in self.get_params(ctx) for name in option.opts}
        first = next((i for i, arg in enumerate(args) if arg not in own), None)
        if first is not None and args[first] not in self.commands:
            args = [*args[:first], EDIT, *args[first:]]
        return super().parse_args(ctx, args)

    def format_usage(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        formatter.write_usage(ctx.command_path, "IMAGE... INSTRUCTION [OPTIONS]")
        formatter.write_usage(ctx.command_path, "COMMAND [ARGS]...", prefix="       ")

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        edit = self.commands[EDIT]
        rows = {row: None for command in (edit, self) for row in _option_rows(command, ctx)}
        with formatter.section("Options"):
            formatter.write_dl(list(rows))
        self.format_commands(ctx, formatter)

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        options = self.commands[EDIT].shell_complete(ctx, incomplete)
        return [
            *super().shell_complete(ctx, incomplete),
            *options,
            CompletionItem(incomplete, type="file"),
        ]


def _option_rows(command: click.Command, ctx: click.Context) -> Iterator[tuple[str, str]]:
    for parameter in command.get_params(ctx):
        row = parameter.get_help_record(ctx)
        if isinstance(parameter, click.Option) and row is not None:
            yield row


@click.group(cls=EditGroup)
@click.version_option(package_name="varedit-export")
@debug_option
def main() -> None:
    """Edit pictures as instructed, with an exported VAREdit model.

    \b
    varedit-run photo.png "add a hat"
    varedit-run photo.jpg "make it night" -o night.jpg --seed 7
    varedit-run photo.png "add a hat" --bundle bundles/2b-512 --compare both.png
    varedit-run photo.png "add a hat" --mask head.png
    varedit-run photo.png "add a hat" --then "make it night" --keep-steps
    varedit-run a.png b.jpg photos "add a hat" -o edited
    varedit-run --list edits.csv -o edited
    varedit-run photo.png "add a hat" --guidance-scale 4 --temperature 1,1,1,.5,.5,.5,.5
    varedit-run bench bundles/2b-512 --repeat 5

    The result goes beside the picture, as photo-edited.png, or photo-edited-2.png if that exists.
    Results of several pictures go into the folder that -o names; run again, the command goes on
    where it was interrupted. For IMAGE, - is standard input, and -o - standard output. The bundle
    is the one named by --bundle or the environment variable VAREDIT_BUNDLE, else your default,
    which `bundles` shows and sets, else nano, a small model for drawn scenes that comes with this
    program. X is a number or one per scale, coarse to fine, separated by commas; by default the
    bundle's own. For a picture named like a command, write ./bench.
    """


for command in (edit, bundles, bench, prepare, grids):
    main.add_command(command)

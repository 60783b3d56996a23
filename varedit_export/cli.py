"""The `varedit-export` command."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from varedit_runtime.bundle import Bundle
from varedit_runtime.command import CommandGroup, debug_option
from varedit_runtime.errors import CheckpointError, ConfigError, needs_extra
from varedit_runtime.locate import default_root, remember
from varedit_runtime.manifest import ParityLine

if TYPE_CHECKING:
    from varedit_export.build import Progress
    from varedit_export.sources import Sources
    from varedit_reference.config import ModelConfig

_PATH = click.Path(path_type=Path)
_checkpoint = click.option(
    "--checkpoint",
    type=_PATH,
    help="The transformer: a .pth or .safetensors file, or a folder of shards.",
)
_tokenizer = click.option(
    "--tokenizer", type=_PATH, help="The picture tokenizer: infinity_vae_*.pth."
)
_text_encoder = click.option("--text-encoder", type=_PATH, help="The flan-t5-xl folder.")


@click.group(cls=CommandGroup)
@click.version_option(package_name="varedit-export")
@debug_option
def main() -> None:
    """Export VAREdit models to bundles that `varedit-run` edits pictures with.

    \b
    varedit-export build --size 2b --res 512 --checkpoint 2B-512.pth \\
        --tokenizer infinity_vae_d32reg.pth --text-encoder flan-t5-xl
    varedit-export build --size tiny-2b --res 256 --random-weights 0
    """


@main.command()
@click.option("--size", help="The model: 2b or 8b, or a small one for tests (125m, tiny-2b, ...).")
@click.option("--res", "resolution", type=int, help="256, 512 or 1024 px.")
@click.option(
    "--aspect", default="1:1", show_default=True, help="Height:width; see varedit-run grids."
)
@_checkpoint
@_tokenizer
@_text_encoder
@click.option("--random-weights", "seed", type=int, help="A seed, in place of checkpoints.")
@click.option(
    "--config", type=_PATH, help="A recording's config.json, in place of --size and --res."
)
@click.option(
    "--precision", type=click.Choice(["fp32", "fp16", "bf16"]), default="fp32", show_default=True
)
@click.option("--batch", type=int, default=1, show_default=True, help="Pictures at a time.")
@click.option(
    "--text-tokens", type=int, default=128, show_default=True, help="Longest instruction."
)
@click.option("--no-guidance", is_flag=True, help="Leave out the unconditional rows.")
@click.option("-o", "--output", type=_PATH, help="The bundle's folder; by default one of yours.")
def build(output: Path | None, **options: Any) -> None:
    """Build a bundle, prove its parity with the reference, and publish it.

    What an interrupted build had finished is kept for the next one.
    """
    with needs_extra("export"):
        from varedit_export.build import Plan, Request
        from varedit_export.build import build as build_bundle

    config, resolution = _config(options)
    sources = _sources(config, options)
    name = f"{config.name}-{resolution}" + _suffix(options["precision"])
    request = Request(
        config=config,
        resolution=resolution,
        aspect=options["aspect"],
        precision=options["precision"],
        batch=options["batch"],
        guided=not options["no_guidance"],
        text_tokens=options["text_tokens"],
        target=output or default_root() / name,
    )
    plan = Plan(request, sources)
    click.echo(str(plan), err=True)
    with _progress() as progress:
        parity = build_bundle(plan, progress)
    remember(request.target)
    click.echo(_summary(parity), err=True)
    click.echo(request.target)


@main.command()
@click.argument("bundle", type=_PATH)
@click.option("--golden", type=_PATH, help="A recording, of which the bundle was built.")
@click.option("--report", type=_PATH, help="Write all measures here, as JSON.")
def verify(bundle: Path, golden: Path | None, report: Path | None) -> None:
    """Compare every graph with the reference, teacher-forced; exit 1 on a failed measure.

    The reference takes the bundle's own weights. With a recording of the released implementation,
    of which the bundle was built, its numbers are compared as well.
    """
    with needs_extra("export"):
        from varedit_export.verify import compare, compare_recording, gate, reference_of
        from varedit_reference.golden import open_recording

    opened = Bundle.open(bundle)
    opened.verify_weights()
    lines = list(compare(opened, reference_of(opened)))
    if golden is not None:
        lines += compare_recording(opened, open_recording(golden))
    for line in lines:
        click.echo(_parity_row(line))
    if report is not None:
        rows = [{n: getattr(line, n) for n in ParityLine.__struct_fields__} for line in lines]
        report.write_text(json.dumps(rows, indent=1) + "\n")
    gate(iter(lines))


@main.command()
@click.argument("bundle", type=_PATH)
def inspect(bundle: Path) -> None:
    """Say what is in a bundle: model, variants, graphs, sizes, precision, parity."""
    opened = Bundle.open(bundle)
    manifest, model = opened.manifest, opened.manifest.model
    click.echo(f"{manifest.name}  {opened.digest}")
    click.echo(f"  model      {model.size}: {model.depth} blocks of width {model.width}")
    click.echo(f"  weights    {model.weights}")
    click.echo(
        f"  precision  {manifest.precision}; in fp32: "
        f"{'; '.join(manifest.fp32_exceptions) or 'everything'}"
    )
    click.echo(
        f"  defaults   guidance {manifest.guidance_scale}, temperature {manifest.temperature}"
    )
    for variant in manifest.variants:
        click.echo(
            f"  variant    {variant.name}: {variant.picture[0]} x {variant.picture[1]} px, "
            f"{len(variant.grids)} scales, batch {variant.batch}, rows {variant.rows}, "
            f"{variant.text_tokens} text tokens"
        )
    for name, entry in sorted(manifest.files.items()):
        click.echo(f"  {name:<52} {entry.size / 1e6:10.2f} MB")
    click.echo(f"  built with {', '.join(f'{k} {v}' for k, v in manifest.tools.items())}")
    click.echo(_summary(manifest.parity))


@main.command()
@click.option("--size", required=True, help="2b or 8b: the size of the model.")
@_checkpoint
@_tokenizer
@_text_encoder
@click.option("-o", "--output", type=_PATH, required=True, help="The folder to write into.")
def convert(
    size: str,
    checkpoint: Path | None,
    tokenizer: Path | None,
    text_encoder: Path | None,
    output: Path,
) -> None:
    """Write one safetensors file per component of the released checkpoints."""
    with needs_extra("export"):
        from varedit_reference.convert import convert as convert_checkpoints

    if checkpoint is None or tokenizer is None or text_encoder is None:
        raise CheckpointError("converting needs --checkpoint, --tokenizer and --text-encoder")
    for path in convert_checkpoints(size, checkpoint, tokenizer, text_encoder, output):
        click.echo(path)


def _config(options: dict[str, Any]) -> tuple["ModelConfig", int]:
    from varedit_reference.config import preset
    from varedit_reference.golden import RESOLUTIONS, model_config

    if options["config"] is not None:
        if options["size"] is not None or options["resolution"] is not None:
            raise ConfigError("--config says the size and resolution: leave out --size and --res")
        try:
            settings = json.loads(options["config"].read_text())
            name = options["config"].resolve().parent.name
            return model_config(name, settings), RESOLUTIONS[settings["pn"]]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{options['config']} is no recording's config.json") from error
    if options["size"] is None or options["resolution"] is None:
        raise ConfigError("give --size and --res, such as --size 2b --res 512, or --config")
    config = preset(options["size"], options["resolution"], options["aspect"])
    return config, options["resolution"]


def _sources(config: "ModelConfig", options: dict[str, Any]) -> "Sources":
    from varedit_export.sources import checkpoint_sources, missing_weights, random_sources

    checkpoint, tokenizer = options["checkpoint"], options["tokenizer"]
    text_encoder = options["text_encoder"]
    if options["seed"] is not None:
        if checkpoint or tokenizer or text_encoder:
            raise ConfigError("--random-weights takes the place of all checkpoints: give one kind")
        return random_sources(config, options["seed"])
    needs_text = options["config"] is None
    if not (checkpoint and tokenizer and (text_encoder or not needs_text)):
        raise CheckpointError(missing_weights(config.name))
    return checkpoint_sources(config, checkpoint, tokenizer, text_encoder)


def _suffix(precision: str) -> str:
    return "" if precision == "fp32" else f"-{precision}"


@contextmanager
def _progress() -> Iterator["Progress"]:
    """A bar on a terminal, nothing elsewhere."""
    from tqdm import tqdm

    with tqdm(total=1, disable=None, bar_format="{l_bar}{bar}| {elapsed}") as bar:

        def show(what: str, done: int, steps: int) -> None:
            bar.total, bar.n = steps, done
            bar.set_description(what)

        yield show


def _summary(parity: tuple[ParityLine, ...] | list[ParityLine]) -> str:
    """Each measure's worst line."""
    worst: dict[str, ParityLine] = {}
    for line in parity:
        kind = f"{line.stage.split('_0')[0].split('_1')[0]} {line.measure.split(' of scale')[0]}"
        kind = kind.split(" after scale")[0]
        if kind not in worst or line.value > worst[kind].value:
            worst[kind] = line
    return "\n".join(
        ["parity with the reference, worst of each:", *map(_parity_row, worst.values())]
    )


def _parity_row(line: ParityLine) -> str:
    verdict = "ok" if line.value <= line.tolerance else "EXCEEDED"
    measure = f"{line.stage}: {line.measure}"
    return f"  {measure:<76} {line.value:9.2e} <= {line.tolerance:7.1e}  {verdict}"

"""Describe a bundle and its parity in lines for a person."""

from collections.abc import Iterator, Sequence

from varedit_runtime.bundle import Bundle
from varedit_runtime.errors import readable_size
from varedit_runtime.manifest import ParityLine


def described(bundle: Bundle) -> str:
    """Return what is in a bundle: model, variants, files, precision, parity."""
    return "\n".join(_lines(bundle))


def _lines(bundle: Bundle) -> Iterator[str]:
    from varedit_runtime.backends.engines.memory import budget, set_budgets, with_offload
    from varedit_runtime.backends.onnxruntime.memory import host_budget

    manifest, model = bundle.manifest, bundle.manifest.model
    yield f"{manifest.name}  {bundle.digest}"
    sizes = f"{model.depth} blocks of width {model.width}"
    yield f"  model      {model.size}: {sizes}, conditioning {model.conditioning}"
    yield f"  weights    {model.weights}"
    for origin in model.origins or ():
        yield f"             {origin.file} of {origin.repository} at {origin.commit}"
    for lora in model.loras or ():
        yield f"  lora       {lora.file} times {lora.scale:g}, sha256 {lora.sha256}"
    exceptions = "; ".join(manifest.fp32_exceptions) or "everything"
    yield f"  precision  {manifest.precision}; in fp32: {exceptions}"
    yield f"  defaults   guidance {manifest.guidance_scale}, temperature {manifest.temperature}"
    for variant in manifest.variants:
        yield (
            f"  variant    {variant.name}: {variant.picture[0]} x {variant.picture[1]} px, "
            f"{len(variant.grids)} scales, batch {variant.batch}, rows {variant.rows}, "
            f"{variant.text_tokens} text tokens"
        )
        if manifest.policy.no_gpu is None:
            offloaded = with_offload(budget(bundle, variant, offload="text"))
            yield f"             on a GPU: {budget(bundle, variant)}{offloaded}"
        if manifest.policy.onnxruntime:
            yield f"             on a CPU: {host_budget(bundle, variant)}"
        for name, needed in set_budgets(bundle, variant):
            yield f"             on a GPU, {name}: {needed}"
    for name, entry in sorted(manifest.files.items()):
        yield f"  {name:<52} {readable_size(entry.size):>8}"
    yield f"  built with {', '.join(f'{k} {v}' for k, v in manifest.tools.items())}"
    yield parity_summary(manifest.parity)


def parity_summary(parity: Sequence[ParityLine]) -> str:
    """Return the worst line of each measure."""
    worst: dict[str, ParityLine] = {}
    for line in parity:
        kind = f"{line.stage.split('_0')[0].split('_1')[0]} {line.measure.split(' of scale')[0]}"
        kind = kind.split(" after scale")[0]
        if kind not in worst or line.value > worst[kind].value:
            worst[kind] = line
    rows = map(parity_row, worst.values())
    return "\n".join(["parity with the reference, worst of each:", *rows])


def parity_row(line: ParityLine) -> str:
    """Return a measure, its value and tolerance, and whether it is within it."""
    verdict = "ok" if line.value <= line.tolerance else "EXCEEDED"
    measure = f"{line.stage}: {line.measure}"
    return f"  {measure:<76} {line.value:9.2e} <= {line.tolerance:7.1e}  {verdict}"

"""Say whether the graphs of another bundle are those of a build, so that its weights alone are new.

No graph contains a weight: each names bytes of the weights files. So graphs fit if the model, its
variants and its precision are the same, and every weight will lie where it lies there.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict

from msgspec import structs

from varedit_export.components import Component
from varedit_export.manifest_model import sources_of
from varedit_export.plan import BundlePlan, VariantRequest
from varedit_export.sources import TextSource
from varedit_reference.config import ModelConfig
from varedit_reference.weights_file import read_header
from varedit_runtime.bundle import Bundle, readable
from varedit_runtime.editing.swapping import SHAPES, differences
from varedit_runtime.errors import ConfigError

MOST_LISTED = 3  # tensors of a file


def check_requests(bundle: Bundle, requests: Sequence[VariantRequest]) -> None:
    """Raise ConfigError, listing what differs, unless a bundle has just the variants of a build."""
    manifest = bundle.manifest
    config, _ = sources_of(bundle)
    there = {"precision": manifest.precision, "variants": [v.name for v in manifest.variants]}
    asked = {"precision": requests[0].precision, "variants": [r.name for r in requests]}
    there |= _sizes(config)
    asked |= _sizes(requests[0].config)
    for variant in manifest.variants:
        there |= {f"{variant.name}'s {name}": getattr(variant, name) for name in SHAPES}
    for request in requests:
        asked |= {f"{request.name}'s {name}": value for name, value in request.fields.items()}
    # The names of variants say which there are: those that one alone has are not listed again.
    both = asked.keys() & there.keys()
    _refuse(bundle, differences(*({n: of[n] for n in of if n in both} for of in (asked, there))))


def check_weights_fit(bundle: Bundle, plan: BundlePlan) -> None:
    """Raise ConfigError, listing what differs, unless a bundle's graphs find a plan's weights.

    The plan's requests must have passed `check_requests`. Raises BundleError if the bundle cannot
    be read.
    """
    asked: dict[str, object] = {"components": sorted(c.name for c in plan.components)}
    there: dict[str, object] = {"components": sorted(bundle.components)}
    _, sources = sources_of(bundle)
    if plan.sources.text is not None and sources.text is not None:
        asked |= _text_sizes(plan.sources.text)
        there |= _text_sizes(sources.text)
    for variant in plan.variants:
        name = f"graphs of {variant.request.name}"
        asked[name] = sorted(graph.name for graph in variant.graphs)
        there[name] = sorted(bundle.manifest.variant(variant.request.name).graphs)
    different = differences(asked, there)
    for component in plan.components:
        if component.name in bundle.components:
            different += _moved(bundle, component)
    _refuse(bundle, different)


def _sizes(config: ModelConfig) -> Mapping[str, object]:
    """Return the sizes of a model that all of its variants share."""
    sizes = asdict(config.tokenizer) | asdict(config.transformer)
    return {name: size for name, size in sizes.items() if "grids" not in name}


def _text_sizes(text: TextSource) -> Mapping[str, object]:
    return {f"text encoder's {name}": size for name, size in structs.asdict(text.config).items()}


def _moved(bundle: Bundle, component: Component) -> list[str]:
    """Say which tensors of a component are others in a bundle's file, or lie elsewhere."""
    header, file = component.header, bundle.hold(component.file)
    with readable(file.path):
        if file.read(len(header)) == header:
            return []
    planned = {
        name: f"{tensor.dtype} {[*tensor.shape]}"
        for name, tensor in component.module.state_dict().items()
    }
    stored = {
        name: f"{tensor.dtype} {[*tensor.shape]}"
        for name, tensor in read_header(bundle.path, component.file).items()
    }
    different = [f"{component.name}'s {line}" for line in differences(planned, stored)]
    more = len(different) - MOST_LISTED
    listed = different[:MOST_LISTED] or [f"{component.file} has its tensors in other places"]
    return [*listed, *([f"{more} more of {component.name}"] if more > 0 else [])]


def _refuse(bundle: Bundle, different: Sequence[str]) -> None:
    if different:
        raise ConfigError(
            f"the graphs of {bundle.path} are not those to build ({'; '.join(different)}): give "
            "the options that it was built with, or leave out --graphs-from"
        )

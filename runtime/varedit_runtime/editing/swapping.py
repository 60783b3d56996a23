"""Say whether weights of one bundle can take the place of another's: nothing else may differ."""

from collections.abc import Mapping

from varedit_runtime.bundle import Bundle
from varedit_runtime.errors import BundleError, shown
from varedit_runtime.manifest import TOKENIZER, Model, Variant, positions, weights_file

# What a model's description tells of its name and of where its weights come from.
_OF_WEIGHTS = {"size", "weights", "origins", "loras", "random", "trained_on"}
# What else has to be equal, but for graphs and files.
_DEFAULTS = ("precision", "guidance_scale", "temperature")
SHAPES = ("resolution", "aspect", "grids", "picture", "batch", "rows", "text_tokens")  # a variant's


def check_swappable(ours: Bundle, theirs: Bundle, variant: Variant) -> None:
    """Raise BundleError, listing what differs, if more than weights does in one of our variants."""
    own, other = (
        _described(ours, variant),
        _described(theirs, theirs.manifest.variant(variant.name)),
    )
    if different := differences(own, other):
        raise BundleError(
            f"{theirs.path} differs from {ours.path} in more than its weights "
            f"({'; '.join(different)}): build it with the same options and --graphs-from"
        )


def differences(own: Mapping[str, object], other: Mapping[str, object]) -> list[str]:
    """Say which of another's facts, by their names, are not our own."""
    return [
        f"{name} is {shown(other.get(name))}, not {shown(own.get(name))}"
        for name in {**own, **other}
        if own.get(name) != other.get(name)
    ]


def _described(bundle: Bundle, variant: Variant) -> dict[str, object]:
    """Return all of a bundle that weights of another one must have been made for."""
    manifest = bundle.manifest
    files = manifest.files
    found: dict[str, object] = {name: getattr(manifest, name) for name in _DEFAULTS}
    model = (name for name in Model.__struct_fields__ if name not in _OF_WEIGHTS)
    found |= {name: getattr(manifest.model, name) for name in model}
    found |= {name: getattr(variant, name) for name in SHAPES}
    digests = {f"graph {stage}": graph.file for stage, graph in variant.graphs.items()}
    digests |= {TOKENIZER: TOKENIZER} if TOKENIZER in files else {}
    found |= {name: files[file].sha256[:16] for name, file in digests.items()}
    tables = {positions(other.name) for other in manifest.variants if other.name != variant.name}
    weights = (weights_file(name) for name in bundle.components if name not in tables)
    found |= {f"size of {file}": files[file].size for file in weights}
    return found

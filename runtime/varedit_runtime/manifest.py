"""What a bundle's manifest.json says, and everything that can be checked without its files.

Types, ranges and unknown fields are checked as the file is decoded; what fields must say about
each other, in each struct's `__post_init__`, which raises ValueError when one is constructed.
"""

import re
from collections import Counter
from collections.abc import Iterable
from typing import Annotated, Literal, TypeVar

import msgspec
from msgspec import Meta, Struct

from varedit_runtime.errors import BundleError

SCHEMA_VERSION = 1
MANIFEST = "manifest.json"
DIGEST = "manifest.sha256"
TOKENIZER = "tokenizer.json"
ENGINES = "engines"
GRAPHS = "graphs"
WEIGHTS = f"{GRAPHS}/weights"

MAX_MANIFEST_BYTES = 8 * 2**20
LARGEST_BATCH = 1024

# What names a file on every system: no separator, drive, space, `.` or `..`, nothing hidden.
_PLAIN = r"[A-Za-z0-9_][A-Za-z0-9_+-]*(?:\.[A-Za-z0-9_+-]+)*"

Count = Annotated[int, Meta(ge=1, lt=2**31)]
# What lists and arrays are made as large as before a graph runs is bounded, at some four times what
# is of use or more: the longest grid that the models know has 111 tokens, of 16 px.
Side = Annotated[int, Meta(ge=1, le=512)]  # of a grid, in tokens
Pixels = Annotated[int, Meta(ge=1, le=8192)]  # a side's
Downsampling = Annotated[int, Meta(ge=1, le=64)]  # the models have 8 and 16
Patch = Annotated[int, Meta(ge=1, le=4)]  # the models have 1 and 2
Channels = Annotated[int, Meta(ge=1, le=256)]  # of a token: the models have up to 56
Batch = Annotated[int, Meta(ge=1, le=LARGEST_BATCH)]
Rows = Annotated[int, Meta(ge=1, le=2 * LARGEST_BATCH)]  # of a batch, twice with guidance
Tokens = Annotated[int, Meta(ge=1, le=4096)]  # of a text: the released models take 512
Name = Annotated[str, Meta(pattern=rf"\A{_PLAIN}\Z", max_length=100)]
Digest = Annotated[str, Meta(pattern=r"\A[0-9a-f]{64}\Z")]
# Nothing that a terminal would obey.
PRINTABLE = r"[^\x00-\x1f\x7f-\x9f]*"
Text = Annotated[str, Meta(pattern=rf"\A{PRINTABLE}\Z", min_length=1, max_length=1000)]
Bytes = Annotated[int, Meta(ge=0, lt=2**60)]
Precision = Literal["fp32", "fp16", "bf16"]
Grid = tuple[Side, Side]

_SCALE = re.compile(r"scale_(\d{2,})")
_INSIDE = re.compile(rf"{_PLAIN}(?:/{_PLAIN})*")
_COMPONENTS = ("tokenizer", "transformer")  # whose weights all bundles have
_STAGES = {"image_encoder", "condition", "prefill", "scale", "image_decoder"}
_OPTIONAL_STAGES = {"text_encoder", "references"}


def weights_file(component: str) -> str:
    return f"{WEIGHTS}/{component}.safetensors"


def scale_name(scale: int) -> str:
    """The stage that predicts a scale, counted from 0."""
    return f"scale_{scale:02}"


def scale_of(stage: str) -> int | None:
    """The scale that a stage predicts; None for all other stages."""
    found = _SCALE.fullmatch(stage)
    return int(found[1]) if found else None


class TensorSpec(Struct, frozen=True, forbid_unknown_fields=True):
    """A graph's input or output. A dimension that is a string is symbolic.

    There is at least one, which rows are counted along, and no more than TensorRT takes.
    """

    name: Text
    dtype: Literal["float32", "float16", "bfloat16", "int64", "int32", "uint8", "bool"]
    shape: Annotated[
        tuple[Annotated[int, Meta(ge=0, lt=2**31)] | Text, ...], Meta(min_length=1, max_length=8)
    ]


class GraphSpec(Struct, frozen=True, forbid_unknown_fields=True):
    """A graph's file, and its inputs and outputs in the graph's own order."""

    file: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    def __post_init__(self) -> None:
        _refuse_repeated("inputs", (tensor.name for tensor in self.inputs))
        _refuse_repeated("outputs", (tensor.name for tensor in self.outputs))


class Variant(Struct, frozen=True, forbid_unknown_fields=True):
    """One set of static shapes over the bundle's weights.

    resolution: side in pixels of the square that the aspect ratio (height:width) is derived from;
    grids: (height, width) of every scale in tokens; picture: (height, width) in pixels;
    rows: batch, or 2·batch with guidance; graphs: by stage.
    """

    name: Name
    resolution: Count
    aspect: Text
    grids: Annotated[tuple[Grid, ...], Meta(min_length=1, max_length=99)]
    picture: tuple[Pixels, Pixels]
    batch: Batch
    rows: Rows
    text_tokens: Tokens
    graphs: dict[Name, GraphSpec]

    def __post_init__(self) -> None:
        if self.rows not in (self.batch, 2 * self.batch):
            raise ValueError(
                f"{self.rows} rows for a batch of {self.batch}, where {self.batch} or, "
                f"with guidance, {2 * self.batch} were expected"
            )
        expected = _STAGES | set(map(scale_name, range(len(self.grids))))
        missing = expected - self.graphs.keys()
        unknown = self.graphs.keys() - expected - _OPTIONAL_STAGES
        if missing or unknown:
            raise ValueError(
                f"graphs do not match {len(self.grids)} scales: missing "
                f"{', '.join(sorted(missing)) or 'none'}; not known {sorted(unknown) or 'none'}"
            )

    def graph(self, stage: str) -> GraphSpec:
        """Raises BundleError naming the stages that exist."""
        if stage not in self.graphs:
            raise BundleError(
                f"variant {self.name} has no graph {stage!r}; it has {', '.join(self.graphs)}"
            )
        return self.graphs[stage]


class Model(Struct, frozen=True, forbid_unknown_fields=True):
    """What was exported. weights: where they came from, such as "random, seed 0".

    norm_groups: of the image coders' norms; None: as many as the released ones have.
    text_distance: of tokens, from which on the text encoder takes all for equally far, and
    text_epsilon, that of its norms; None without a text encoder.
    """

    size: Name
    bits: Channels
    downsampling: Downsampling
    patch: Patch
    token_channels: Channels
    depth: Count
    width: Count
    heads: Count
    text_channels: Count
    conditioning: Literal["sar", "finest", "full"]
    rotary: Literal["released", "paper"]
    weights: Text
    norm_groups: Count | None
    text_distance: Count | None
    text_epsilon: Annotated[float, Meta(gt=0, lt=1)] | None

    def __post_init__(self) -> None:
        if self.token_channels != self.bits * self.patch**2:
            raise ValueError(
                f"tokens of {self.token_channels} channels, where {self.bits} bits in patches of "
                f"{self.patch} x {self.patch} make {self.bits * self.patch**2}"
            )


class FileEntry(Struct, frozen=True, forbid_unknown_fields=True):
    """sha256 in lower-case hexadecimal; size in bytes."""

    sha256: Digest
    size: Bytes


class FolderManifest(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What the manifests of bundles and of engine sets have in common.

    files: all files of the folder but the manifest itself, by their path in it.
    """

    schema_version: Literal[1] = SCHEMA_VERSION
    files: dict[str, FileEntry]

    def __post_init__(self) -> None:
        for file in self.files:
            if not _INSIDE.fullmatch(file):
                raise ValueError(
                    f"{file!r} is not the plain, relative path of a file in the folder"
                )
            if file in (MANIFEST, DIGEST) or file.startswith(f"{ENGINES}/"):
                raise ValueError(f"{file} cannot be one of the files that a manifest lists")


class ParityLine(Struct, frozen=True, forbid_unknown_fields=True):
    """One measure of how far a stage was from the reference when the bundle was built."""

    stage: Name
    measure: Text
    value: float
    tolerance: float


class Manifest(FolderManifest, frozen=True):
    """A bundle's manifest. Engine sets, which are added later, are not among its files.

    fp32_exceptions: what stays in fp32 whatever the precision; guidance_scale, temperature: the
    model's defaults; tools: the versions of what built it.
    """

    name: Text
    model: Model
    precision: Precision
    fp32_exceptions: tuple[Text, ...]
    guidance_scale: float
    temperature: Annotated[float, Meta(gt=0)]
    variants: Annotated[tuple[Variant, ...], Meta(min_length=1)]
    tools: dict[Text, Text]
    parity: tuple[ParityLine, ...]

    def __post_init__(self) -> None:
        super().__post_init__()
        for component in _COMPONENTS:
            if (file := weights_file(component)) not in self.files:
                raise ValueError(f"the {component}'s weights, {file}, are not in files")
        _refuse_repeated("variants", (variant.name for variant in self.variants))
        for variant in self.variants:
            self._check_variant(variant)

    def _check_variant(self, variant: Variant) -> None:
        token_pixels = self.model.downsampling * self.model.patch
        height, width = (side * token_pixels for side in variant.grids[-1])
        if variant.picture != (height, width):
            raise ValueError(
                f"variant {variant.name} draws {variant.picture[0]} x {variant.picture[1]} px, "
                f"where its finest grid makes {height} x {width}"
            )
        if "references" in variant.graphs and self.model.conditioning != "sar":
            raise ValueError(f"variant {variant.name} has references, which only sar uses")
        needed = {stage: graph.file for stage, graph in variant.graphs.items()}
        if "text_encoder" in variant.graphs:
            needed["tokenizer"] = TOKENIZER
        for stage, file in needed.items():
            if file not in self.files:
                raise ValueError(f"variant {variant.name}: {stage}'s {file} is not in files")

    def variant(self, name: str | None) -> Variant:
        """By name; without one the first. Raises BundleError naming the variants that exist."""
        for variant in self.variants:
            if name in (None, variant.name):
                return variant
        known = ", ".join(variant.name for variant in self.variants)
        raise BundleError(f"bundle {self.name} has no variant {name!r}; it has {known}")


AnyManifest = TypeVar("AnyManifest", bound=FolderManifest)


class _Versioned(Struct):
    schema_version: int


def canonical_json(value: Struct) -> bytes:
    """The same bytes for equal values, whatever order their mappings were filled in."""
    return msgspec.json.encode(value, order="deterministic")


def decode_manifest(data: bytes, kind: type[AnyManifest]) -> AnyManifest:
    """Raises BundleError on anything but a manifest of this kind and version; it names no file."""
    try:
        found = msgspec.json.decode(data, type=_Versioned).schema_version
        if found != SCHEMA_VERSION:
            advice = "upgrade varedit-export" if found > SCHEMA_VERSION else "build it again"
            raise BundleError(
                f"its schema is version {found}, and this program reads version "
                f"{SCHEMA_VERSION}: {advice}"
            )
        return msgspec.json.decode(data, type=kind)
    except RecursionError as error:
        raise BundleError("it is nested too deeply to be a manifest") from error
    except (msgspec.MsgspecError, ValueError) as error:
        raise BundleError(
            f"it is not a valid manifest, copy or build it again: {_printable(error)}"
        ) from error


def _refuse_repeated(what: str, names: Iterable[str]) -> None:
    repeated = [name for name, count in Counter(names).items() if count > 1]
    if repeated:
        raise ValueError(f"{what} called the same: {repeated}")


def _printable(error: Exception) -> str:
    """In one short line, for the message may quote the file."""
    return "".join(c if c.isprintable() else "?" for c in str(error)[:300])

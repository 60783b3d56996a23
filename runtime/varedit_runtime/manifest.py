"""A bundle's manifest.json as structs, and every check of it that needs no other file.

Decoding checks types, ranges and unknown fields. Each struct's `__post_init__` checks how its
fields agree; it raises ValueError, so that an invalid manifest can be neither read nor made.
"""

import re
from collections import Counter
from collections.abc import Iterable
from typing import Annotated, Literal, TypeVar

import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType

from varedit_runtime.errors import BundleError, shown
from varedit_runtime.grids import Conditioning
from varedit_runtime.precision import PRECISIONS, Precision

SCHEMA_VERSION = 2
MANIFEST = "manifest.json"
DIGEST = "manifest.sha256"
TOKENIZER = "tokenizer.json"
ENGINES = "engines"
GRAPHS = "graphs"
WEIGHTS = f"{GRAPHS}/weights"

MAX_MANIFEST_BYTES = 8 * 2**20
LARGEST_BATCH = 1024

# A file name that is valid on every system: no separator, drive, space, `.` or `..`, not hidden.
_PLAIN = r"[A-Za-z0-9_][A-Za-z0-9_+-]*(?:\.[A-Za-z0-9_+-]+)*"

Count = Annotated[int, Meta(ge=1, lt=2**31)]
# Sizes that memory is allocated by before a graph runs are bounded, so that a stranger's manifest
# cannot exhaust it, at four times what the models use or more (their longest grid has 111 tokens).
Side = Annotated[int, Meta(ge=1, le=512)]  # side of a grid in tokens
Pixels = Annotated[int, Meta(ge=1, le=8192)]  # side of a picture in pixels
Downsampling = Annotated[int, Meta(ge=1, le=64)]  # the models have 8 and 16
Patch = Annotated[int, Meta(ge=1, le=4)]  # the models have 1 and 2
Channels = Annotated[int, Meta(ge=1, le=256)]  # of a token; the models have up to 56
BatchSize = Annotated[int, Meta(ge=1, le=LARGEST_BATCH)]
RowCount = Annotated[
    int, Meta(ge=1, le=2 * LARGEST_BATCH)
]  # the batch, or with guidance twice that
TokenCount = Annotated[int, Meta(ge=1, le=4096)]  # of an instruction; the released models take 512
Name = Annotated[str, Meta(pattern=rf"\A{_PLAIN}\Z", max_length=100)]
Digest = Annotated[str, Meta(pattern=r"\A[0-9a-f]{64}\Z")]
# No control characters: a terminal would obey them when the text is printed.
PRINTABLE = r"[^\x00-\x1f\x7f-\x9f]*"
PrintableText = Annotated[str, Meta(pattern=rf"\A{PRINTABLE}\Z", min_length=1, max_length=1000)]
Bytes = Annotated[int, Meta(ge=0, lt=2**60)]
CheckedGrid = tuple[Side, Side]

UNGUIDED = "_unguided"  # ends the names of graphs that compute conditional rows alone
_SCALE = re.compile(rf"scale_(\d{{2,}})(?:{UNGUIDED})?")
_KEYS_OR_VALUES = re.compile(r"(past|new|source|cross|reference)_(key|value)(\.\d+)?")
_INSIDE = re.compile(rf"{_PLAIN}(?:/{_PLAIN})*")
_COMPONENTS = ("tokenizer", "transformer")  # every bundle has their weights
_STAGES = {"image_encoder", "condition", "scale", "image_decoder"}
_OPTIONAL_STAGES = {"text_encoder", "references", "fused_scale"}


def weights_file(component: str) -> str:
    return f"{WEIGHTS}/{component}.safetensors"


def positions(variant: str) -> str:
    """Return the name of the component that holds a variant's rotary table."""
    return f"positions_{variant}"


class StoredWeight(Struct, frozen=True, forbid_unknown_fields=True, array_like=True):
    """Where a weight lies: the `length` bytes from byte `offset` on of a file of the bundle.

    Graphs, engine sets, the exporter and its checks all name weights by this one record. It says
    nothing of types and shapes, which a graph and the header of a safetensors file have.

    name: in that file; file: its path in the bundle's folder.
    """

    name: PrintableText
    file: str
    offset: Bytes
    length: Bytes

    @property
    def location(self) -> str:
        """Return the file's path relative to the folder of graphs, as ONNX files name it."""
        return self.file.removeprefix(f"{GRAPHS}/")

    def part(self, name: str, offset: int, length: int) -> "StoredWeight":
        """Return some of its bytes as a weight of their own."""
        return StoredWeight(name, self.file, self.offset + offset, length)


def scale_name(scale: int) -> str:
    """Return the graph that predicts a scale; scales count from 0."""
    return f"scale_{scale:02}"


def scale_of(stage: str) -> int | None:
    """Return the scale that a graph predicts, with or without guidance; None for all others."""
    found = _SCALE.fullmatch(stage)
    return int(found[1]) if found else None


class TensorSpec(Struct, frozen=True, forbid_unknown_fields=True):
    """A graph's input or output. A dimension that is a string is symbolic.

    It has at least one dimension, along which rows are counted, and at most TensorRT's 8.
    """

    name: PrintableText
    dtype: Literal["float32", "float16", "bfloat16", "int64", "int32", "uint8", "bool"]
    shape: Annotated[
        tuple[Annotated[int, Meta(ge=0, lt=2**31)] | PrintableText, ...],
        Meta(min_length=1, max_length=8),
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
    """The graphs for one set of static shapes; a bundle's variants share its weights.

    resolution: side in pixels of the square that the grids are derived from. aspect: ratio
    height:width. grids: (height, width) of every scale in tokens. picture: (height, width) in
    pixels. batch: pictures per run. rows: batch, or 2·batch with guidance. text_tokens: the most
    tokens of an instruction. graphs: by stage; with guidance, the prefill and every scale have a
    second one, for edits or scales whose guidance is off (UNGUIDED).
    """

    name: Name
    resolution: Count
    aspect: PrintableText
    grids: Annotated[tuple[CheckedGrid, ...], Meta(min_length=1, max_length=99)]
    picture: tuple[Pixels, Pixels]
    batch: BatchSize
    rows: RowCount
    text_tokens: TokenCount
    graphs: dict[Name, GraphSpec]

    def __post_init__(self) -> None:
        if self.rows not in (self.batch, 2 * self.batch):
            raise ValueError(
                f"{self.rows} rows for a batch of {self.batch}, where {self.batch} or, "
                f"with guidance, {2 * self.batch} were expected"
            )
        static = {"prefill", *map(scale_name, range(len(self.grids)))}
        expected = _STAGES | static
        if self.guided:
            expected |= {stage + UNGUIDED for stage in static}
        missing = expected - self.graphs.keys()
        unknown = self.graphs.keys() - expected - _OPTIONAL_STAGES
        if missing or unknown:
            raise ValueError(
                f"graphs do not match {len(self.grids)} scales: missing "
                f"{', '.join(sorted(missing)) or 'none'}; not known {sorted(unknown) or 'none'}"
            )

    @property
    def guided(self) -> bool:
        """Whether there are the unconditional rows that guidance needs."""
        return self.rows > self.batch

    def graph(self, stage: str) -> GraphSpec:
        """Return a stage's graph. Raises BundleError, listing the stages, if there is none."""
        if stage not in self.graphs:
            raise BundleError(
                f"variant {self.name} has no graph {shown(stage)}; it has {', '.join(self.graphs)}"
            )
        return self.graphs[stage]


class HubOrigin(Struct, frozen=True, forbid_unknown_fields=True):
    """A file of weights that came from the Hugging Face hub.

    repository: OWNER/NAME. commit: the commit it was taken from. file: its path there.
    """

    repository: PrintableText
    commit: PrintableText
    file: PrintableText
    sha256: Digest


class MergedLora(Struct, frozen=True, forbid_unknown_fields=True):
    """A LoRA adapter that was merged into the transformer's weights.

    file: its name. scale: what its change of the weights was multiplied with.
    """

    file: PrintableText
    sha256: Digest
    scale: float


class Model(Struct, frozen=True, forbid_unknown_fields=True):
    """The exported model's sizes; see the reference's `config.py`.

    weights: where they came from, such as "random, seed 0". norm_groups: groups of the image
    coders' GroupNorms; None for the released rule. text_distance: distance in tokens from which on
    the text encoder treats all as equally far. text_epsilon: eps of its norms. Both are None
    without a text encoder. origins: of the files that came from the hub; unset if none did. loras:
    in the order of merging; unset if there are none. random: whether the weights are random; unset
    if not. trained_on: the only pictures that the model was trained on; unset for all kinds.
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
    conditioning: Conditioning
    rotary: Literal["released", "paper"]
    weights: PrintableText
    norm_groups: Count | None
    text_distance: Count | None
    text_epsilon: Annotated[float, Meta(gt=0, lt=1)] | None
    origins: tuple[HubOrigin, ...] | UnsetType = UNSET
    loras: tuple[MergedLora, ...] | UnsetType = UNSET
    random: bool | UnsetType = UNSET
    trained_on: Literal["drawn scenes"] | UnsetType = UNSET

    def __post_init__(self) -> None:
        if self.token_channels != self.bits * self.patch**2:
            raise ValueError(
                f"tokens of {self.token_channels} channels, where {self.bits} bits in patches of "
                f"{self.patch} x {self.patch} make {self.bits * self.patch**2}"
            )


class FileEntry(Struct, frozen=True, forbid_unknown_fields=True):
    """A file's sha256, in lower-case hexadecimal, and its size in bytes."""

    sha256: Digest
    size: Bytes


class FolderManifest(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The fields that the manifests of bundles and of engine sets share.

    files: all files of the folder except the manifest itself, by their path in it.
    """

    schema_version: Literal[2] = SCHEMA_VERSION
    files: dict[str, FileEntry]

    def __post_init__(self) -> None:
        for file in self.files:
            if not _INSIDE.fullmatch(file):
                raise ValueError(
                    f"{shown(file)} is not the plain, relative path of a file in the folder"
                )
            if file in (MANIFEST, DIGEST) or file.startswith(f"{ENGINES}/"):
                raise ValueError(f"{file} cannot be one of the files that a manifest lists")


class ParityLine(Struct, frozen=True, forbid_unknown_fields=True):
    """One measured difference between a stage and the reference, from when the bundle was built.

    against: the backend that another one was compared with; unset in a manifest, which has none.
    """

    stage: Name
    measure: PrintableText
    value: float
    tolerance: float
    against: Name | UnsetType = UNSET


class Manifest(FolderManifest, frozen=True):
    """A bundle's manifest. Its files do not include engine sets, which are added later.

    fp32_exceptions: what stays in fp32 whatever the precision. guidance_scale, temperature: the
    model's defaults. tools: versions of the programs that built it.
    """

    name: PrintableText
    model: Model
    precision: Name
    fp32_exceptions: tuple[PrintableText, ...]
    guidance_scale: float
    temperature: Annotated[float, Meta(gt=0)]
    variants: Annotated[tuple[Variant, ...], Meta(min_length=1)]
    tools: dict[PrintableText, PrintableText]
    parity: tuple[ParityLine, ...]

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.precision not in PRECISIONS:
            raise BundleError(
                f"its precision is {self.precision}, and this program knows only "
                f"{', '.join(PRECISIONS)}: upgrade varedit-export"
            )
        for component in _COMPONENTS:
            if (file := weights_file(component)) not in self.files:
                raise ValueError(f"the {component}'s weights, {file}, are not in files")
        _refuse_repeated("variants", (variant.name for variant in self.variants))
        for variant in self.variants:
            self._check_variant(variant)

    @property
    def policy(self) -> Precision:
        """What is computed in which type."""
        return PRECISIONS[self.precision]

    @property
    def takes_text(self) -> bool:
        """Whether there is a text encoder, so that pictures can be edited by instructions."""
        return all("text_encoder" in variant.graphs for variant in self.variants)

    @property
    def unfit(self) -> str | None:
        """Why the bundle is not for editing pictures; None if it is."""
        if not self.takes_text:
            return "it has no text encoder"
        return "its weights are random" if self.model.random else None

    def _check_variant(self, variant: Variant) -> None:
        token_pixels = self.model.downsampling * self.model.patch
        height, width = (side * token_pixels for side in variant.grids[-1])
        if variant.picture != (height, width):
            raise ValueError(
                f"variant {variant.name} draws {variant.picture[0]} x {variant.picture[1]} px, "
                f"where its finest grid makes {height} x {width}"
            )
        for stage, graph in variant.graphs.items():
            for tensor in (*graph.inputs, *graph.outputs):
                self._check_type(stage, tensor)
        if "references" in variant.graphs and self.model.conditioning != "sar":
            raise ValueError(f"variant {variant.name} has references, which only sar uses")
        needed = {stage: graph.file for stage, graph in variant.graphs.items()}
        if "text_encoder" in variant.graphs:
            needed["tokenizer"] = TOKENIZER
        for stage, file in needed.items():
            if file not in self.files:
                raise ValueError(f"variant {variant.name}: {stage}'s {file} is not in files")

    def _check_type(self, stage: str, tensor: TensorSpec) -> None:
        if _KEYS_OR_VALUES.fullmatch(tensor.name):
            fits = tensor.dtype == self.policy.type
        else:
            fits = self.policy.passes(tensor.dtype)
        if not fits:
            raise ValueError(
                f"{stage}'s {tensor.name} is {tensor.dtype}, and the bundle's precision is "
                f"{self.precision}"
            )

    def variant(self, name: str | None) -> Variant:
        """Return the named variant, or the first. Raises BundleError, listing them, if unknown."""
        for variant in self.variants:
            if name in (None, variant.name):
                return variant
        known = ", ".join(variant.name for variant in self.variants)
        raise BundleError(f"the bundle has no variant {shown(name)}; it has {known}")


AnyManifest = TypeVar("AnyManifest", bound=FolderManifest)


class _Versioned(Struct):
    schema_version: int


def canonical_json(value: Struct) -> bytes:
    """Encode a struct to JSON: equal structs give equal bytes, in whatever order they were made."""
    return msgspec.json.encode(value, order="deterministic")


def decode_manifest(data: bytes, kind: type[AnyManifest]) -> AnyManifest:
    """Decode a manifest of this kind. Raises BundleError, naming no file, if data is none."""
    try:
        found = msgspec.json.decode(data, type=_Versioned).schema_version
        if found != SCHEMA_VERSION:
            newer = found > SCHEMA_VERSION
            advice = "upgrade varedit-export" if newer else f"build it again{_command(data)}"
            raise BundleError(
                f"its schema is version {found}, and this program reads version "
                f"{SCHEMA_VERSION}: {advice}"
            )
        return msgspec.json.decode(data, type=kind)
    except RecursionError as error:
        raise BundleError("it is nested too deeply to be a manifest") from error
    except (msgspec.MsgspecError, ValueError) as error:
        raise BundleError(f"it is not a valid manifest, copy or build it again: {error}") from error


class _EarlierModel(Struct):
    size: Name
    conditioning: Conditioning = "sar"


class _EarlierVariant(Struct):
    resolution: Count
    aspect: Annotated[str, Meta(pattern=r"\A\d{1,3}:\d{1,3}\Z")]
    batch: BatchSize
    rows: RowCount
    text_tokens: TokenCount


class _EarlierManifest(Struct):
    """What tells how to rebuild a bundle of an earlier version."""

    model: _EarlierModel
    precision: Name
    variants: Annotated[tuple[_EarlierVariant, ...], Meta(min_length=1)]


def _command(data: bytes) -> str:
    """Return how to rebuild a bundle of an earlier version; "" if its manifest does not tell."""
    try:
        earlier = msgspec.json.decode(data, type=_EarlierManifest)
    except msgspec.MsgspecError:
        return ""
    first, size = earlier.variants[0], earlier.model.size
    resolutions = dict.fromkeys(variant.resolution for variant in earlier.variants)
    words = [f"--size {size}"]
    if size != "nano":  # it has a resolution of its own
        words += [f"--res {resolution}" for resolution in resolutions]
    words += [f"--aspect {first.aspect}"] if first.aspect != "1:1" else []
    if earlier.model.conditioning != "sar":
        words += [f"--conditioning {earlier.model.conditioning}"]
    words += [f"--precision {earlier.precision}"]
    words += [f"--batch {first.batch}"] if first.batch > 1 else []
    words += [f"--text-tokens {first.text_tokens}"]
    words += ["--no-guidance"] if first.rows == first.batch else []
    return f", of the same weights, with `varedit-export build {' '.join(words)}`"


def _refuse_repeated(what: str, names: Iterable[str]) -> None:
    repeated = [name for name, count in Counter(names).items() if count > 1]
    if repeated:
        raise ValueError(f"several {what} have the same name: {repeated}")

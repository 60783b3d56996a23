"""Which memory each tensor of an edit's graphs uses.

An edit is a list of steps, each a run of one graph. Graphs know only their own tensors; this module
says which of them are the same memory, a value. `View` is a tensor as a part of a value. Example, a
source of 16 tokens and scales of 1 and 4 tokens, in block 3:

    step       tensor        view of cache_key.3 (21 rows)
    prefill    source_key.3  rows 0 .. 15, written
    scale_00   past_key.3    rows 0 .. 15, read;  new_key.3  row 16, written
    scale_01   past_key.3    rows 0 .. 16, read;  new_key.3  rows 17 .. 20, written

So a cache is appended to by writing behind it, and read as its beginning: nothing is copied or
concatenated between steps, and every address is known before the first edit, which is what lets a
GPU capture the whole edit as one graph of work. Names alone decide (`_Wiring._value`).

With guidance, half of the rows are unconditional. An edit, or its last scales, may do without them
where guidance is 1. So a guided variant's steps come in two forms, the second one named UNGUIDED,
on the same values. Rows come first in what is made of the text: the second form reads the
beginning. In caches they come after tokens: [tokens, R, H, D]. There the second form reads a cache
that is half as large, from the value's start on, and whoever changes forms within an edit moves the
conditional rows together first (`Crowded`).

Graphs of symbolic lengths take texts that are padded to fewer tokens as well (`text_lengths`), and
fewer pictures. Such an edit has steps of its own, which read and write the values' beginnings.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod

import numpy as np
from msgspec import structs

from varedit_runtime.errors import BundleError, shown
from varedit_runtime.geometry import Sizes, scale_inputs, scale_sizes
from varedit_runtime.grids import Conditioning
from varedit_runtime.manifest import UNGUIDED, Model, TensorSpec, Variant, scale_name

KINDS = ("key", "value")
CACHE = "cache_"  # how the names of caches begin
# What the host gives to a scale, and what it takes from it.
CHOSEN = ("guidance_scale", "temperature", "noise", "forced_bits", "forced_mask")
PREDICTED = ("logits", "bits")
TEXT, NEGATIVE, CONDITION, PREFILL = "text_encoder", "negative_encoder", "condition", "prefill"
ENCODER, DECODER, REFERENCES, SYMBOLIC = "image_encoder", "image_decoder", "references", "scale"
TEXT_LENGTHS = 16, 32, 64, 128, 256  # besides the most tokens that a variant takes
PICTURES = "picture_of_row"  # the twins' index of pictures
FUSED = "fused_scale"  # what SYMBOLIC is, its attention in one operator, if a bundle has it


def text_lengths(most: int) -> list[int]:
    """Return the numbers of tokens that texts of at most `most` tokens are padded to, ascending."""
    return [length for length in TEXT_LENGTHS if length < most] + [most]


def item_size(dtype: str) -> int:
    """Return the bytes of one number of a type as manifests and engines name it."""
    unknown = {"bfloat16": 2, "float8_e4m3fn": 1}  # to NumPy
    return unknown.get(dtype) or np.dtype(dtype).itemsize


@dataclass(frozen=True)
class View:
    """A tensor as part of a value: entries `first` .. `first + shape[0] - 1` of its first axis."""

    value: str
    shape: tuple[int, ...]
    dtype: str
    first: int = 0

    @property
    def row(self) -> int:
        """Bytes of one entry of the first axis."""
        return prod(self.shape[1:]) * item_size(self.dtype)

    @property
    def offset(self) -> int:
        """Bytes from the value's start to the tensor's."""
        return self.first * self.row

    @property
    def size(self) -> int:
        """Bytes of the tensor."""
        return prod(self.shape) * item_size(self.dtype)


@dataclass(frozen=True)
class Step:
    """A run of a stage's graph. inputs, outputs: the graph's tensors by name, as views.

    fed, read: the values that the host writes before it and reads after it, when steps are run one
    by one. profile: which of the graph's sets of symbolic lengths it uses; engines have those of
    the largest batch, which come first. scale: the one that it
    predicts, if any. unguided: whether it is the form of a guided variant's step that computes the
    conditional rows only.
    """

    name: str
    stage: str
    inputs: Mapping[str, View]
    outputs: Mapping[str, View]
    fed: tuple[str, ...]
    read: tuple[str, ...]
    profile: int = 0
    scale: int | None = None
    unguided: bool = False

    @property
    def views(self) -> Iterator[View]:
        yield from self.inputs.values()
        yield from self.outputs.values()


@dataclass(frozen=True)
class Crowded:
    """A cache whose unconditional rows go: of all entries the first half stays, at its beginning.

    value: its name. entries: how many there are. kept: bytes of an entry that stay.
    """

    value: str
    entries: int
    kept: int

    def copies(self) -> Iterator[tuple[int, int, int]]:
        """Yield copies that do it in place: target and source, in bytes, and a number of entries.

        Entries are `kept` bytes wide, 2·kept apart in the source and kept in the target. They are
        so few at a time that none overlaps what it is copied from.
        """
        first = 1
        while first < self.entries:
            count = min(first, self.entries - first)
            yield first * self.kept, 2 * first * self.kept, count
            first += count

    def move(self, memory: np.ndarray) -> None:
        """Do it in the host's memory, uint8 from the value's start on."""
        for target, source, count in self.copies():
            apart = memory[source:][: 2 * self.kept * count].reshape(count, -1)
            memory[target:][: self.kept * count] = apart[:, : self.kept].reshape(-1)


def crowded(steps: Sequence[Step], scale: int) -> list[Crowded]:
    """Return the caches that must be moved together before a scale that is the first unguided one.

    steps: all of a variant's.
    """
    guided = _values(step for step in steps if not step.unguided)
    later = [step for step in steps if step.unguided and (step.scale or 0) >= scale]
    views: dict[str, View] = {}
    for step in later:
        if step.scale is not None:
            for view in step.inputs.values():
                views.setdefault(view.value, view)
    return [
        Crowded(name, view.shape[0], view.row)
        for name, view in views.items()
        if view.row < guided[name].row
    ]


def values_of(steps: Sequence[Step]) -> dict[str, View]:
    """Return every value as the smallest view that contains all views of it.

    Where a value has another shape without guidance, it is smaller, and that with guidance is
    returned. Raises BundleError if two graphs disagree about a value's type or shape.
    """
    values = _values(step for step in steps if not step.unguided)
    for name, view in _values(step for step in steps if step.unguided).items():
        known = values.setdefault(name, view)
        if known.dtype != view.dtype or known.size < view.size:
            raise BundleError(
                f"the bundle's graphs do not fit together: without guidance {name} is "
                f"{view.dtype} {view.shape}, and with it {known.dtype} {known.shape}; build it "
                "again"
            )
    return values


def _values(steps: Iterable[Step]) -> dict[str, View]:
    values: dict[str, View] = {}
    for step in steps:
        for view in step.views:
            known = values.setdefault(view.value, view)
            if (known.shape[1:], known.dtype) != (view.shape[1:], view.dtype):
                raise BundleError(
                    f"the bundle's graphs do not fit together: {step.name} has {view.value} as "
                    f"{view.dtype} {view.shape}, and another graph as {known.dtype} {known.shape}; "
                    "build it again"
                )
            rows = max(known.first + known.shape[0], view.first + view.shape[0])
            values[view.value] = View(view.value, (rows, *view.shape[1:]), view.dtype)
    return values


def wire(
    variant: Variant,
    model: Model,
    symbolic: bool,
    twin: str = SYMBOLIC,
    unguided: bool = True,
    text_tokens: int | None = None,
    batch: int | None = None,
) -> list[Step]:
    """Return the steps of an edit in order; then a guided variant's steps without guidance.

    symbolic: run prefill and scales on the one graph of symbolic lengths, the twin, with one
    profile each. unguided: whether to have the second form. text_tokens: what texts are padded to,
    batch: the number of pictures; by default the most, as in all static graphs. Raises BundleError
    if a graph lacks a tensor that the host gives or takes, has an input that nothing writes, or
    takes no such number of pictures or tokens.
    """
    wiring = _Wiring(variant, model, twin, text_tokens or variant.text_tokens, batch)
    steps = wiring.steps(symbolic)
    if variant.guided and unguided:
        steps += wiring.unguided_steps(symbolic)
    known = wiring.standing() if symbolic else set()
    ever = {view.value for step in steps for view in step.outputs.values()}
    for step in steps:
        _check_step(step, known, ever)
        _check_text(step, wiring.tokens)
        _check_pictures(step, wiring.variant)
        known |= {view.value for view in step.outputs.values()}
    return steps


def _check_step(step: Step, known: set[str], ever: set[str]) -> None:
    """Raise BundleError unless every input was written.

    known: values that are constant or that an earlier step wrote. ever: those that any step writes.
    """
    read = {view.value: view for view in step.inputs.values()}
    written = {view.value: view for view in step.outputs.values()}
    # An empty cache may be read before it is written.
    wanted = {name for name, view in read.items() if view.size or name not in ever}
    _refuse(step, "lacks its input", set(step.fed) - read.keys())
    _refuse(step, "lacks its output", set(step.read) - written.keys())
    _refuse(step, "has an input that nothing gives", wanted - known - set(step.fed))
    host = {**{n: read[n] for n in step.fed}, **{n: written[n] for n in step.read}}
    half = {name for name, view in host.items() if view.dtype == "bfloat16"}
    _refuse(step, "gives or takes bf16, which NumPy cannot represent, as", half)


def _check_text(step: Step, tokens: int) -> None:
    """Raise BundleError if a step takes texts of another length.

    They would be repeated to fill it.
    """
    mask = step.inputs.get("text_mask")
    if mask is not None and mask.shape[1:] != (tokens,):
        raise BundleError(
            f"the bundle's graph {step.stage} takes masks of shape {mask.shape} for texts of "
            f"{tokens} tokens: build the bundle again"
        )


def _check_pictures(step: Step, variant: Variant) -> None:
    """Raise BundleError if what the host gives or takes is of another number of pictures."""
    views = {view.value: view for view in step.views}
    count = variant.rows if step.name == CONDITION else variant.batch
    for name in (*step.fed, *step.read):
        if views[name].shape[0] != count:
            raise BundleError(
                f"the bundle's graph {step.stage} has {name} as {views[name].shape} for "
                f"{variant.batch} pictures: build the bundle again"
            )


def _refuse(step: Step, what: str, names: Iterable[str]) -> None:
    if names := sorted(names):
        raise BundleError(
            f"the bundle's graph {step.stage} {what} {shown(names[0])} (for step {step.name}): "
            "build the bundle again"
        )


def constants(variant: Variant, model: Model) -> dict[str, np.ndarray]:
    """Return the values of a symbolic wiring that are the same for every edit and not zero."""
    ones = np.ones(variant.batch, np.float32)
    found: dict[str, np.ndarray] = {f"temperature.{PREFILL}": ones}
    if variant.guided:
        found[f"guidance_scale.{PREFILL}"] = ones
        found[PICTURES] = np.arange(variant.rows) % variant.batch
    for scale in (None, *range(len(variant.grids))):
        suffix = PREFILL if scale is None else scale
        arrays = scale_inputs(variant.grids, scale, model.patch, model.conditioning)
        found |= {f"{name}.{suffix}": array for name, array in arrays.items()}
    return found


def profiles_of(
    stage: str, variant: Variant, conditioning: Conditioning, text_tokens: int | None = None
) -> list[Sizes]:
    """Return the symbolic lengths that a graph is run with, in the order of its steps' profiles.

    Of the twins: for the prefill, then for every scale. With guidance, all of these again, for the
    conditional rows only. text_tokens: see `wire`.
    """
    scales: list[Sizes] = [{}]
    if stage in (SYMBOLIC, FUSED):
        scales = [
            scale_sizes(variant.grids, k, conditioning) for k in (None, *range(len(variant.grids)))
        ]
    both = variant.guided and stage != TEXT  # which has no rows
    forms = (variant.rows, variant.batch) if both else (variant.rows,)
    all_have = {"text_tokens": text_tokens or variant.text_tokens, "batch": variant.batch}
    return [sizes | {"rows": rows} | all_have for rows in forms for sizes in scales]


def sized(spec: TensorSpec, sizes: Mapping[str, int]) -> tuple[int, ...]:
    """Return a tensor's shape, given its symbolic lengths; a dimension may be a product, "h*w".

    Raises BundleError if sizes lack a symbolic length.
    """
    try:
        return tuple(
            size if isinstance(size, int) else prod(sizes[name] for name in size.split("*"))
            for size in spec.shape
        )
    except KeyError as error:
        raise BundleError(
            f"the bundle's {spec.name} has no static shape: build the bundle again"
        ) from error


def of_batch(variant: Variant, batch: int) -> Variant:
    """Return a variant as it is for another number of pictures."""
    rows = batch * variant.rows // variant.batch
    return structs.replace(variant, batch=batch, rows=rows)


class _Wiring:
    def __init__(
        self, variant: Variant, model: Model, twin: str, text_tokens: int, batch: int | None
    ) -> None:
        self.model, self.twin, self.tokens = model, twin, text_tokens
        self.variant = variant if batch is None else of_batch(variant, batch)
        self.fewer = variant.batch - self.variant.batch
        self.sar = model.conditioning == "sar"
        self.guided = variant.guided
        self.scales = range(len(variant.grids))

    def steps(self, symbolic: bool) -> list[Step]:
        steps: list[Step] = []
        if TEXT in self.variant.graphs:
            ids, features = ("token_ids", "text_mask"), ("text_features",)
            steps.append(self._coder(TEXT, TEXT, ids, features, _PROMPT))
            if self.guided:
                negative = self._coder(NEGATIVE, TEXT, ids, features, _NEGATIVE)
                steps.append(self._behind(negative, "text_features", self.variant.batch))
        steps.append(self._coder(ENCODER, ENCODER, ("pictures",), ("source_tokens",)))
        steps += self._transformer(symbolic, False)
        last = len(self.scales)
        decoded = {"running_sum": f"sum.{last}", "pictures": "decoded"}
        steps.append(self._coder(DECODER, DECODER, ("running_sum",), ("pictures",), decoded))
        return steps

    def unguided_steps(self, symbolic: bool) -> list[Step]:
        """Return what a guided edit's steps are where only conditional rows are computed."""
        return [
            replace(step, name=step.name + UNGUIDED, unguided=True)
            for step in self._transformer(symbolic, True)
        ]

    def _transformer(self, symbolic: bool, unguided: bool) -> Iterator[Step]:
        """Make the steps that have rows."""
        form, given = int(unguided), ("text_features", "text_mask", *self.guided * ("learned",))
        yield self._coder(CONDITION, CONDITION, given, (), form=form)
        for scale in (None, *self.scales):
            name = PREFILL if scale is None else scale_name(scale)
            if not symbolic:
                yield self._scale(name, name + unguided * UNGUIDED, scale, {}, 0)
                continue
            profiles = self._profiles(self.twin)
            profile = form * (1 + len(self.scales)) + (0 if scale is None else 1 + scale)
            number = self.fewer * len(profiles) + profile
            yield self._scale(name, self.twin, scale, profiles[profile], number)
            if scale is None and self.sar:
                yield self._coder(REFERENCES, REFERENCES, (), (), form=form)

    def _behind(self, step: Step, value: str, first: int) -> Step:
        """Let a step write its output behind the first entries of a value."""
        outputs = {
            name: replace(view, first=first) if view.value == value else view
            for name, view in step.outputs.items()
        }
        return replace(step, outputs=outputs)

    def standing(self) -> set[str]:
        """Return the values of a symbolic wiring that no step writes: constants, and zeros."""
        suffixes = (PREFILL, *self.scales)
        placed = {f"{name}.{suffix}" for name in _PLACED for suffix in suffixes}
        zeros = {"tokens.0", "sum.0", f"sum.{PREFILL}"}
        return placed | zeros | {PICTURES} | {f"{name}.{PREFILL}" for name in CHOSEN}

    def _coder(
        self,
        name: str,
        stage: str,
        fed: Sequence[str],
        read: Sequence[str],
        renamed: Mapping[str, str] | None = None,
        form: int = 0,
    ) -> Step:
        """Make a step whose tensors are values of the same names, except renamed ones.

        fed, read: the tensors that the host writes and reads. form: 1 for the conditional rows
        only.
        """
        called = renamed or {}
        graph = self.variant.graph(stage)
        sizes = self._profiles(stage)[form]
        inputs, outputs = (
            {
                spec.name: View(called.get(spec.name, spec.name), sized(spec, sizes), spec.dtype)
                for spec in specs
            }
            for specs in (graph.inputs, graph.outputs)
        )
        given, taken = (tuple(called.get(n, n) for n in names) for names in (fed, read))
        return Step(name, stage, inputs, outputs, given, taken, form)

    def _scale(
        self, name: str, stage: str, scale: int | None, sizes: Mapping[str, int], profile: int
    ) -> Step:
        """Make the step of a scale, or of the prefill (None)."""
        graph = self.variant.graph(stage)
        inputs, outputs = (
            {spec.name: self._view(spec, scale, sizes) for spec in specs}
            for specs in (graph.inputs, graph.outputs)
        )
        if scale is None:
            return Step(name, stage, inputs, outputs, ("source_tokens",), (), profile)
        fed = tuple(f"{given}.{scale}" for given in CHOSEN if given in inputs)
        read = (*(f"{taken}.{scale}" for taken in PREDICTED), f"sum.{scale + 1}")
        return Step(name, stage, inputs, outputs, fed, read, profile, scale)

    def _view(self, spec: TensorSpec, scale: int | None, sizes: Mapping[str, int]) -> View:
        shape = sized(spec, sizes)
        value, first = self._value(spec.name, scale)
        return View(value, shape, spec.dtype, first)

    def _value(self, name: str, scale: int | None) -> tuple[str, int]:
        """Return the value that a tensor of a scale, or of the prefill, is part of, and `first`."""
        kind, _, block = name.partition(".")
        what, _, which = kind.partition("_")
        if which in KINDS and what in ("past", "new", "source") and _BLOCK.fullmatch(block):
            return self._cached(what, which, int(block), scale)
        if kind in ("reference_key", "reference_value"):
            return (name if block else f"{kind}.{scale or 0}"), 0
        own = PREFILL if scale is None else str(scale)
        following = "unused" if scale is None else str(scale + 1)
        names = {
            "tokens": "source_tokens" if scale is None else f"tokens.{own}",
            "next_tokens": f"tokens.{following}",
            "running_sum": f"sum.{own}",
            "running_sum_out": f"sum.{following}",
        }
        if name in names:
            return names[name], 0
        return (f"{name}.{own}" if name in _OF_A_SCALE else name), 0

    def _cached(self, what: str, kind: str, block: int, scale: int | None) -> tuple[str, int]:
        if scale is None and what == "new" and block == 0 and self.sar:
            return f"source_{kind}", 0  # the references are made from it
        cache = f"{CACHE}{kind}.{block}"
        if what != "new" or scale is None:
            return cache, 0
        before = "past_0" if self.sar and block == 0 else "past"
        return cache, scale_sizes(self.variant.grids, scale, self.model.conditioning)[before]

    def _profiles(self, stage: str) -> list[Sizes]:
        return profiles_of(stage, self.variant, self.model.conditioning, self.tokens)


# The condition reads one mask, of all rows; the text encoder is run for one half of them at a time.
_PROMPT = {"text_mask": "prompt_mask"}
_NEGATIVE = {"token_ids": "negative_ids", "text_mask": "negative_mask"}
_BLOCK = re.compile(r"[0-9]{1,4}")
_PLACED = (
    *("level", "first_position", "is_first"),
    *("up_rows", "up_columns", "down_rows", "down_columns"),
)
_OF_A_SCALE = {*CHOSEN, *PREDICTED, *_PLACED}

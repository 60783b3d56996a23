"""Build a bundle: weights, graphs, parity, manifest, published whole or not at all."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path

import onnx_ir as ir
from torch._subclasses.fake_tensor import FakeTensorMode

from varedit_engines.publish import Staging
from varedit_export.components import (
    Component,
    positions_component,
    text_encoder_component,
    tokenizer_component,
    transformer_component,
)
from varedit_export.estimate import Needs, check_memory, needs, present
from varedit_export.graphs.blocks import TRACED_BLOCKS
from varedit_export.graphs.model import GraphTransformer
from varedit_export.graphs.stages import (
    DTYPES,
    ConditionStage,
    ImageDecoderStage,
    ImageEncoderStage,
    Kind,
    PositionTable,
    PrefillStage,
    References,
    Scale,
    ScaleStage,
    Shapes,
    Stage,
    SymbolicScaleStage,
    TextEncoderStage,
    scale,
)
from varedit_export.graphs.text import GraphTextEncoder, TextEncoderConfig
from varedit_export.graphs.trace import StoredWeight, Tracer, fake_tensors
from varedit_export.parity.verify import is_large, verify_folder
from varedit_export.sources import Sources
from varedit_reference.config import ModelConfig
from varedit_reference.tokenizer import Tokenizer
from varedit_reference.weights_file import check_room
from varedit_runtime.bundle import work_folder
from varedit_runtime.errors import ConfigError
from varedit_runtime.manifest import (
    GRAPHS,
    LARGEST_BATCH,
    TOKENIZER,
    FileEntry,
    GraphSpec,
    Manifest,
    Model,
    ParityLine,
    Precision,
    TensorSpec,
    Variant,
)

TYPE_NAMES = {
    ir.DataType.FLOAT: "float32",
    ir.DataType.FLOAT16: "float16",
    ir.DataType.BFLOAT16: "bfloat16",
    ir.DataType.INT64: "int64",
    ir.DataType.BOOL: "bool",
}
# What stays in fp32 whatever the precision.
STREAM_EXCEPTIONS = (
    "transformer: residual stream, norms, softmax, AdaLN, head, sampling",
    "text_encoder: residual stream, norms, softmax",
    "image_encoder",
    "image_decoder",
)
WIDE_MLP = "text_encoder: MLP output projections (past fp16's range in T5-XL)"
TOOLS = ("varedit-export", "torch", "onnx-ir", "onnxscript", "onnxruntime")

# (what is being done, steps done, steps in all)
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Request:
    """A variant to build, and where. resolution and aspect name it; the config holds its grids."""

    config: ModelConfig
    resolution: int
    aspect: str
    precision: Precision
    batch: int
    guided: bool
    text_tokens: int
    target: Path

    def __post_init__(self) -> None:
        if self.config.transformer.conditioning == "full":
            raise ConfigError("models with full conditioning are not exported: use sar or finest")
        if not (1 <= self.batch <= LARGEST_BATCH and 1 < self.text_tokens <= 512):
            raise ConfigError(
                f"a bundle takes a batch of 1 to {LARGEST_BATCH} and 2 to 512 text tokens, not "
                f"{self.batch} and {self.text_tokens}"
            )

    @property
    def name(self) -> str:
        height, width = self.config.picture_size
        size = f"{height}" if height == width else f"{height}x{width}"
        return f"{size}-b{self.batch}" + ("" if self.guided else "-unguided")

    @property
    def shapes(self) -> Shapes:
        dtype = DTYPES[self.precision]
        return Shapes(self.config, self.batch, self.guided, self.text_tokens, dtype)


@dataclass(frozen=True)
class Graph:
    """A graph to make: a stage with few blocks, the whole model's depth, and which scale it is."""

    stage: Stage
    depth: int = 0
    scale: Scale | None = None

    @property
    def name(self) -> str:
        return self.stage.name if self.scale is None else self.scale.name


@dataclass(frozen=True)
class VariantPlan:
    """A variant's own files: the table of its positions, and its graphs."""

    request: Request
    positions: Component
    graphs: Sequence[Graph]

    def file(self, graph: Graph) -> str:
        return f"{GRAPHS}/{self.request.name}.{graph.name}.onnx"


class Plan:
    """All files of a bundle and what each is made from; nothing is computed until asked for."""

    def __init__(self, requests: Sequence[Request], sources: Sources) -> None:
        """requests: variants of one bundle. Raises ConfigError where they cannot share weights."""
        self.request, *others = requests
        _check_variants(requests)
        self.sources, self.fake = sources, fake_tensors()
        config, dtype = self.request.config, DTYPES[self.request.precision]
        with self.fake:
            tokenizer = Tokenizer(config.tokenizer)
        self.shared = [
            transformer_component(config.transformer, dtype, sources.transformer, self.fake),
            tokenizer_component(tokenizer, sources.tokenizer),
        ]
        text = sources.text
        if text is not None:
            component = text_encoder_component(text.config, dtype, text.state, self.fake)
            self.shared.append(component)
        self.variants = [
            VariantPlan(
                request,
                positions_component(request.name, request.config.transformer, self.fake),
                _graphs(request, tokenizer, text and text.config, self.fake),
            )
            for request in (self.request, *others)
        ]

    @property
    def components(self) -> list[Component]:
        return [*self.shared, *(variant.positions for variant in self.variants)]

    @property
    def graph_count(self) -> int:
        return sum(len(variant.graphs) for variant in self.variants)

    @property
    def weight_bytes(self) -> int:
        return sum(component.size for component in self.components)

    @property
    def needs(self) -> Needs:
        count = sum(t.numel() for c in self.components for t in c.module.state_dict().values())
        return needs(self, large=is_large(count))

    def __str__(self) -> str:
        """For a person to read before it begins."""
        variants = ", ".join(variant.request.name for variant in self.variants)
        lines = [f"{self.request.target}: {variants}, {self.request.precision}"]
        lines += [f"  {c.location:<44} {c.size / 1e6:10.1f} MB" for c in self.components]
        lines += [f"  {self.graph_count} graphs", f"  weights: {self.sources.description}"]
        lines += [f"  needs {self.needs}"]
        return "\n".join(lines)


def _check_variants(requests: Sequence[Request]) -> None:
    """They must differ in name, and in nothing that weights are made from."""
    names = [request.name for request in requests]
    if len(set(names)) < len(names):
        raise ConfigError(f"variants of a bundle must differ, and these are {', '.join(names)}")
    first = requests[0]
    grids, table_grids = first.config.transformer.grids, first.config.transformer.table_grids
    for request in requests:
        transformer = replace(request.config.transformer, grids=grids, table_grids=table_grids)
        config = replace(request.config, transformer=transformer)
        shared = config, request.precision, request.target
        if shared != (first.config, first.precision, first.target):
            raise ConfigError("variants of a bundle must be of one model, precision and folder")


def build(plan: Plan, progress: Progress) -> list[ParityLine]:
    """Build and publish. Returns how far each graph is from the reference.

    Raises CheckpointError when the disk has no room or the folder cannot be made, BundleError
    when another process builds the same bundle, ExportError when there is too little memory, and,
    as ParityError, when a graph does not come out as it must. What was finished before a failure or
    an interrupt, weights tensor by tensor, is kept for the next attempt; an earlier bundle of the
    same name stays until the new one is whole.
    """
    target, needed = plan.request.target, plan.needs
    check_room(target.parent, needed.disk - present(work_folder(target)))
    check_memory(needed.memory)
    steps = len(plan.components) + plan.graph_count + 2
    with Staging(target) as staging:
        work = _Work(plan, staging, progress, steps)
        shared = _merged(work.weights(component, plan.request) for component in plan.shared)
        variants = tuple(work.variant(variant, shared) for variant in plan.variants)
        if plan.sources.text is not None:
            staging.file(TOKENIZER).write_bytes(plan.sources.text.tokenizer_json)
            staging.record(TOKENIZER)
        progress("parity with the reference", steps - 2, steps)
        manifest = _manifest(plan, variants, staging.files, ())
        parity = verify_folder(staging.path, manifest, plan.sources, plan.request.config)
        progress("publishing", steps - 1, steps)
        staging.publish(_manifest(plan, variants, staging.files, tuple(parity)))
        progress("done", steps, steps)
    return parity


@dataclass
class _Work:
    """A build under way: makes what an earlier attempt left undone."""

    plan: Plan
    staging: Staging
    progress: Progress
    steps: int
    step: int = 0

    def weights(self, component: Component, request: Request) -> dict[str, StoredWeight]:
        """Write a component; where each of its weights lies."""
        self._next(f"weights of {component.name}")
        graphs, file = self.staging.path / GRAPHS, f"{GRAPHS}/{component.location}"
        key = _key(self.plan, request, component.name)
        if not self.staging.kept(file, key):
            self.staging.file(file)
            component.write(graphs, {"component": component.name}, key)
            self.staging.record(file, key)
        return component.stored(graphs)

    def variant(self, variant: VariantPlan, shared: dict[str, StoredWeight]) -> Variant:
        """Write a variant's table and graphs."""
        request = variant.request
        tracer = Tracer(self.plan.fake, shared | self.weights(variant.positions, request))
        specs = {graph.name: self._graph(variant, graph, tracer) for graph in variant.graphs}
        return Variant(
            name=request.name,
            resolution=request.resolution,
            aspect=request.aspect,
            grids=request.config.transformer.grids,
            picture=request.config.picture_size,
            batch=request.batch,
            rows=request.shapes.rows,
            text_tokens=request.text_tokens,
            graphs=specs,
        )

    def _graph(self, variant: VariantPlan, graph: Graph, tracer: Tracer) -> GraphSpec:
        several = f" of {variant.request.name}" if len(self.plan.variants) > 1 else ""
        self._next(f"graph {graph.name}{several}")
        file, key = variant.file(graph), _key(self.plan, variant.request, graph.name)
        if not self.staging.kept(file, key):
            model = tracer.graph(graph.stage, graph.depth, graph.scale)
            ir.save(model, self.staging.file(file))
            self.staging.record(file, key)
        return graph_spec(self.staging.path, file)

    def _next(self, what: str) -> None:
        self.progress(what, self.step, self.steps)
        self.step += 1


def _merged(parts: Iterable[dict[str, StoredWeight]]) -> dict[str, StoredWeight]:
    return {name: place for part in parts for name, place in part.items()}


def graph_spec(folder: Path, file: str) -> GraphSpec:
    """A written graph's inputs and outputs."""
    graph = ir.load(folder / file).graph
    inputs = tuple(_tensor_spec(value) for value in graph.inputs)
    return GraphSpec(file, inputs, tuple(_tensor_spec(value) for value in graph.outputs))


def _tensor_spec(value: ir.Value) -> TensorSpec:
    assert value.name and value.dtype is not None and value.shape is not None
    shape = tuple(s if isinstance(s, int) else str(s.value) for s in value.shape)
    return TensorSpec(value.name, TYPE_NAMES[value.dtype], shape)  # type: ignore[arg-type]


def _text_graph(request: Request, config: TextEncoderConfig, fake: FakeTensorMode) -> Graph:
    shallow_config = replace(config, depth=min(config.depth, TRACED_BLOCKS))
    with fake:
        model = GraphTextEncoder(shallow_config, request.shapes.dtype)
    return Graph(TextEncoderStage(request.shapes, model), config.depth)


def shallow(shapes: Shapes) -> Shapes:
    """The same with no more blocks than are traced."""
    transformer = shapes.config.transformer
    transformer = replace(transformer, depth=min(transformer.depth, TRACED_BLOCKS))
    return replace(shapes, config=replace(shapes.config, transformer=transformer))


def _graphs(
    request: Request,
    tokenizer: Tokenizer,
    text: TextEncoderConfig | None,
    fake: FakeTensorMode,
) -> list[Graph]:
    """All graphs, to be traced with a few blocks of the transformer and the text encoder."""
    full, shapes = request.shapes, shallow(request.shapes)
    depth, grids = full.config.transformer.depth, full.config.transformer.grids
    with fake:
        model = GraphTransformer(shapes.config.transformer, shapes.dtype)
        table = PositionTable(shapes.config.transformer)
    scales = [scale(full, index) for index in range(len(grids))]
    kinds: dict[Kind, ScaleStage] = {s.kind: ScaleStage(shapes, model, s.kind) for s in scales}
    references = References(shapes)
    return [
        *([] if text is None else [_text_graph(request, text, fake)]),
        Graph(ImageEncoderStage(shapes, tokenizer)),
        Graph(ConditionStage(shapes, model), depth),
        Graph(PrefillStage(shapes, model, table), depth),
        Graph(SymbolicScaleStage(shapes, model, table), depth),
        *([Graph(references)] if full.config.transformer.conditioning == "sar" else []),
        *(Graph(kinds[s.kind], depth, s) for s in scales),
        Graph(ImageDecoderStage(shapes, tokenizer)),
    ]


def _manifest(
    plan: Plan,
    variants: tuple[Variant, ...],
    files: dict[str, FileEntry],
    parity: tuple[ParityLine, ...],
) -> Manifest:
    request = plan.request
    config, tokenizer = request.config.transformer, request.config.tokenizer
    exceptions = {"fp32": (), "bf16": STREAM_EXCEPTIONS, "fp16": (*STREAM_EXCEPTIONS, WIDE_MLP)}
    text = plan.sources.text and plan.sources.text.config
    model = Model(
        size=request.config.name,
        bits=tokenizer.bits,
        downsampling=tokenizer.downsampling,
        patch=tokenizer.patch,
        token_channels=tokenizer.token_channels,
        depth=config.depth,
        width=config.width,
        heads=config.heads,
        text_channels=config.text_channels,
        conditioning=config.conditioning,
        rotary=config.rotary,
        weights=plan.sources.description,
        norm_groups=tokenizer.groups,
        text_distance=text and text.max_distance,
        text_epsilon=text and text.epsilon,
    )
    return Manifest(
        schema_version=1,
        name=request.target.name,
        model=model,
        precision=request.precision,
        fp32_exceptions=exceptions[request.precision],
        guidance_scale=request.config.guidance_scale,
        temperature=request.config.temperature,
        variants=variants,
        files=dict(files),
        tools={tool: version(tool) for tool in TOOLS},
        parity=parity,
    )


def _key(plan: Plan, request: Request, part: str) -> str:
    """Stands for all that a file is made from: the model, the request, the weights, the tools."""
    made_from = (
        part,
        request.config,
        request.precision,
        request.batch,
        request.guided,
        request.text_tokens,
        plan.sources.identity,
        [version(tool) for tool in TOOLS],
    )
    return sha256(repr(made_from).encode()).hexdigest()

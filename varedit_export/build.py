"""Build a bundle: weights, graphs, parity, manifest, published whole or not at all."""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path

import onnx_ir as ir
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from varedit_engines.publish import Staging
from varedit_export.blocks import TRACED_BLOCKS
from varedit_export.components import (
    positions_component,
    text_encoder_component,
    tokenizer_component,
    transformer_component,
)
from varedit_export.estimate import Needs, check_memory, needs, present
from varedit_export.graph_model import GraphTransformer
from varedit_export.graph_text import GraphTextEncoder, TextEncoderConfig
from varedit_export.sources import Sources
from varedit_export.stages import (
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
from varedit_export.trace import Tracer, fake_tensors
from varedit_export.verify import is_large, verify_folder
from varedit_reference.config import ModelConfig
from varedit_reference.tokenizer import Tokenizer
from varedit_reference.weights_file import check_room
from varedit_runtime.bundle import Bundle, file_digest, work_folder
from varedit_runtime.errors import BundleError, ConfigError
from varedit_runtime.manifest import (
    GRAPHS,
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

DTYPES: dict[str, torch.dtype] = {
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
}
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
    """What to build. resolution and aspect name the variant; the config holds its grids."""

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
        if self.batch < 1 or not 1 < self.text_tokens <= 512:
            raise ConfigError(
                f"a bundle takes a batch of at least 1 and 2 to 512 text tokens, not {self.batch} "
                f"and {self.text_tokens}"
            )

    @property
    def variant(self) -> str:
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


class Plan:
    """All files of a bundle and what each is made from; nothing is computed until asked for."""

    def __init__(self, request: Request, sources: Sources) -> None:
        self.request, self.sources = request, sources
        self.fake = fake_tensors()
        config, dtype = request.config, DTYPES[request.precision]
        with self.fake:
            tokenizer = Tokenizer(config.tokenizer)
        transformer = transformer_component(
            config.transformer, dtype, sources.transformer, self.fake
        )
        positions = positions_component(request.variant, config.transformer, self.fake)
        self.components = [
            transformer,
            tokenizer_component(tokenizer, sources.tokenizer),
            positions,
        ]
        self.graphs = _graphs(request, tokenizer, self.fake)
        if sources.text is not None:
            text = text_encoder_component(sources.text.config, dtype, sources.text.state, self.fake)
            self.components.append(text)
            self.graphs.insert(0, _text_graph(request, sources.text.config, self.fake))

    @property
    def weight_bytes(self) -> int:
        return sum(component.size for component in self.components)

    @property
    def needs(self) -> Needs:
        count = sum(t.numel() for c in self.components for t in c.module.state_dict().values())
        return needs(self, large=is_large(count))

    def __str__(self) -> str:
        """For a person to read before it begins."""
        lines = [f"{self.request.target}: {self.request.variant}, {self.request.precision}"]
        lines += [f"  {c.location:<44} {c.size / 1e6:10.1f} MB" for c in self.components]
        lines += [f"  {len(self.graphs)} graphs", f"  weights: {self.sources.description}"]
        lines += [f"  needs {self.needs}"]
        return "\n".join(lines)

    def graph_file(self, graph: Graph) -> str:
        return f"{GRAPHS}/{self.request.variant}.{graph.name}.onnx"


def build(plan: Plan, progress: Progress) -> list[ParityLine]:
    """Build and publish. Returns how far each graph is from the reference.

    Raises CheckpointError when the disk has no room or the folder cannot be made, BundleError
    when another process builds the same bundle, ExportError when there is too little memory, and,
    as ParityError, when a graph does not come out as it must. What was finished before a failure or
    an interrupt, weights tensor by tensor, is kept for the next attempt; an earlier bundle of the
    same name stays until the new one is whole.
    """
    request, needed = plan.request, plan.needs
    check_room(request.target.parent, needed.disk - present(work_folder(request.target)))
    check_memory(needed.memory)
    steps = len(plan.components) + len(plan.graphs) + 2
    with Staging(request.target) as staging:
        step = 0
        stored = {}
        for component in plan.components:
            progress(f"weights of {component.name}", step, steps)
            file = f"{GRAPHS}/{component.location}"
            key = _key(plan, component.name)
            if not staging.kept(file, key):
                staging.file(file)
                component.write(staging.path / GRAPHS, {"component": component.name}, key)
                share(staging.path / file, file, staging.record(file, key), request.target)
            stored |= component.stored(staging.path / GRAPHS)
            step += 1
        specs = {}
        tracer = Tracer(plan.fake, stored)
        for graph in plan.graphs:
            progress(f"graph {graph.name}", step, steps)
            file = plan.graph_file(graph)
            key = _key(plan, graph.name)
            if not staging.kept(file, key):
                model = tracer.graph(graph.stage, graph.depth, graph.scale)
                ir.save(model, staging.file(file))
                staging.record(file, key)
            specs[graph.name] = graph_spec(staging.path, file)
            step += 1
        if plan.sources.text is not None:
            staging.file(TOKENIZER).write_bytes(plan.sources.text.tokenizer_json)
            staging.record(TOKENIZER)
        progress("parity with the reference", step, steps)
        manifest = _manifest(plan, specs, staging.files, ())
        parity = verify_folder(staging.path, manifest, plan.sources, request.config)
        progress("publishing", step + 1, steps)
        staging.publish(_manifest(plan, specs, staging.files, tuple(parity)))
        progress("done", steps, steps)
    return parity


def share(path: Path, file: str, entry: FileEntry, target: Path) -> None:
    """Make a file one with the same file of a bundle beside the target, where there is one.

    Bundles never change, so that those of one checkpoint can have one copy of its weights. Where
    the disk has no links, the file stays as it is.
    """
    for folder in (target, *target.parent.iterdir()):
        with suppress(BundleError, OSError):
            if folder.name.startswith(".") or not folder.is_dir():
                continue
            bundle = Bundle.open(folder)
            twin = bundle.path / file
            if bundle.manifest.files.get(file) != entry or file_digest(twin) != entry.sha256:
                continue
            link = path.with_name(f".{path.name}.link")
            link.unlink(missing_ok=True)
            link.hardlink_to(twin)
            link.replace(path)
            return


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


def _graphs(request: Request, tokenizer: Tokenizer, fake: FakeTensorMode) -> list[Graph]:
    """All graphs but the text encoder's, traced with a few blocks of the transformer."""
    full, shapes = request.shapes, shallow(request.shapes)
    depth, grids = full.config.transformer.depth, full.config.transformer.grids
    with fake:
        model = GraphTransformer(shapes.config.transformer, shapes.dtype)
        table = PositionTable(shapes.config.transformer)
    scales = [scale(full, index) for index in range(len(grids))]
    kinds: dict[Kind, ScaleStage] = {s.kind: ScaleStage(shapes, model, s.kind) for s in scales}
    references = References(shapes)
    return [
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
    graphs: dict[str, GraphSpec],
    files: dict[str, FileEntry],
    parity: tuple[ParityLine, ...],
) -> Manifest:
    request = plan.request
    config, tokenizer = request.config.transformer, request.config.tokenizer
    exceptions = {"fp32": (), "bf16": STREAM_EXCEPTIONS, "fp16": (*STREAM_EXCEPTIONS, WIDE_MLP)}
    variant = Variant(
        name=request.variant,
        resolution=request.resolution,
        aspect=request.aspect,
        grids=config.grids,
        picture=request.config.picture_size,
        batch=request.batch,
        rows=request.shapes.rows,
        text_tokens=request.text_tokens,
        graphs=graphs,
    )
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
    )
    return Manifest(
        schema_version=1,
        name=request.target.name,
        model=model,
        precision=request.precision,
        fp32_exceptions=exceptions[request.precision],
        guidance_scale=request.config.guidance_scale,
        temperature=request.config.temperature,
        variants=(variant,),
        files=dict(files),
        tools={tool: version(tool) for tool in TOOLS},
        parity=parity,
    )


def _key(plan: Plan, part: str) -> str:
    """Stands for all that a file is made from: the model, the request, the weights, the tools."""
    request = plan.request
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

"""The graphs of a variant: stages with the few blocks that are traced, and what binds them."""

from dataclasses import dataclass, replace

from msgspec import structs
from torch._subclasses.fake_tensor import FakeTensorMode

from varedit_export.graphs.attention import OPERATOR
from varedit_export.graphs.blocks import TRACED_BLOCKS
from varedit_export.graphs.model import GraphTransformer
from varedit_export.graphs.scales import (
    Binding,
    FusedScaleStage,
    Kind,
    ScaleStage,
    SymbolicScaleStage,
    kind_of,
    row_binding,
    scale_binding,
)
from varedit_export.graphs.stages import (
    ConditionStage,
    ImageDecoderStage,
    ImageEncoderStage,
    PositionTable,
    PrefillStage,
    ReferencesStage,
    Shapes,
    Stage,
    TextEncoderStage,
    has_references,
)
from varedit_export.graphs.text import GraphTextEncoder
from varedit_reference.config import TextEncoderConfig
from varedit_reference.tokenizer import Tokenizer
from varedit_runtime.manifest import scale_name


@dataclass(frozen=True)
class GraphPlan:
    """A graph to make: a stage with few blocks, the model's depth, and the binding, if any."""

    stage: Stage
    depth: int = 0
    binding: Binding | None = None

    @property
    def name(self) -> str:
        return self.stage.name if self.binding is None else self.binding.name


@dataclass(frozen=True)
class VariantShapes:
    """All that the graphs of a variant are made from. text: the text encoder, None without one."""

    shapes: Shapes
    text: TextEncoderConfig | None
    fused_attention: bool = False

    def graphs(self, fake: FakeTensorMode) -> list[GraphPlan]:
        """Return all graphs, each with the few blocks that are traced."""
        full, shapes = self.shapes, shallow(self.shapes)
        depth, grids = full.config.transformer.depth, full.config.transformer.grids
        with fake:
            tokenizer = Tokenizer(full.config.tokenizer)
            model = GraphTransformer(shapes.config.transformer, shapes.precision)
            table = PositionTable(shapes.config.transformer)
        prefill = PrefillStage(shapes, model, table)
        dynamic = replace(shapes, any_batch=True)  # for ONNX Runtime, which takes any length
        indices = range(len(grids))
        own: dict[int, Kind] = {index: kind_of(full, index) for index in indices}
        kinds: dict[Kind, ScaleStage] = {k: ScaleStage(shapes, model, k) for k in own.values()}
        twins = [SymbolicScaleStage(dynamic, model, table)]
        if self.fused_attention:
            with fake:
                fused = GraphTransformer(shapes.config.transformer, shapes.precision, OPERATOR)
            twins.append(FusedScaleStage(shapes, fused, table))
        references = ReferencesStage(dynamic)
        return [
            *([] if self.text is None else [self._text_graph(self.text, fake)]),
            GraphPlan(ImageEncoderStage(dynamic, tokenizer)),
            GraphPlan(ConditionStage(dynamic, model), depth),
            *(
                GraphPlan(prefill, depth, row_binding(full, prefill.name + form, rows))
                for form, rows in full.forms.items()
            ),
            *(GraphPlan(twin, depth) for twin in twins),
            *([GraphPlan(references)] if has_references(full) else []),
            *(
                GraphPlan(
                    kinds[own[index]],
                    depth,
                    scale_binding(full, index, scale_name(index) + form, rows),
                )
                for form, rows in full.forms.items()
                for index in indices
            ),
            GraphPlan(ImageDecoderStage(dynamic, tokenizer)),
        ]

    def _text_graph(self, config: TextEncoderConfig, fake: FakeTensorMode) -> GraphPlan:
        shallow_config = structs.replace(config, depth=min(config.depth, TRACED_BLOCKS))
        with fake:
            model = GraphTextEncoder(shallow_config, self.shapes.precision)
        shapes = replace(self.shapes, any_batch=True)
        return GraphPlan(TextEncoderStage(shapes, model), config.depth)


def shallow(shapes: Shapes) -> Shapes:
    """Return the same shapes with no more blocks than are traced."""
    transformer = shapes.config.transformer
    transformer = replace(transformer, depth=min(transformer.depth, TRACED_BLOCKS))
    return replace(shapes, config=replace(shapes.config, transformer=transformer))

"""Plan a bundle: its variants, its files of weights, its graphs, and what each is made from.

Nothing is computed here. `assemble.py` makes the files, `estimate.py` says what that takes.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from varedit_export.check_options import check_limits
from varedit_export.components import Component, laid_out, positions_component, tokenizer_component
from varedit_export.graphs.layout import transformer_layout
from varedit_export.graphs.model import GraphTransformer
from varedit_export.graphs.stages import Shapes
from varedit_export.graphs.text import GraphTextEncoder, text_encoder_layout
from varedit_export.graphs.trace import fake_tensors
from varedit_export.graphs.variant_graphs import GraphPlan, VariantShapes
from varedit_export.sources import Sources
from varedit_reference.config import ModelConfig
from varedit_reference.tokenizer import Tokenizer
from varedit_runtime.bundle import Bundle
from varedit_runtime.errors import ConfigError, readable_size
from varedit_runtime.manifest import GRAPHS
from varedit_runtime.precision import Precision, named


@dataclass(frozen=True)
class VariantRequest:
    """A variant to build, and its target folder.

    config: the model, whose grids are those of resolution and aspect. batch: pictures per run.
    guided: with unconditional rows. text_tokens: the most of an instruction.
    fused_attention: with the twin for ONNX Runtime's CUDA provider. Raises ConfigError on what a
    bundle cannot have.
    """

    config: ModelConfig
    resolution: int
    aspect: str
    precision: str
    batch: int
    guided: bool
    text_tokens: int
    target: Path
    fused_attention: bool = False

    def __post_init__(self) -> None:
        check_limits(self.policy, self.batch, self.text_tokens, self.fused_attention)

    @property
    def name(self) -> str:
        height, width = self.config.picture_size
        size = f"{height}" if height == width else f"{height}x{width}"
        return f"{size}-b{self.batch}" + ("" if self.guided else "-unguided")

    @property
    def fields(self) -> dict[str, Any]:
        """The variant in the manifest, but for its name and graphs."""
        return {
            "resolution": self.resolution,
            "aspect": self.aspect,
            "grids": self.config.transformer.grids,
            "picture": self.config.picture_size,
            "batch": self.batch,
            "rows": max(self.shapes.forms.values()),
            "text_tokens": self.text_tokens,
        }

    @property
    def shapes(self) -> Shapes:
        return Shapes(self.config, self.batch, self.guided, self.text_tokens, self.policy)

    @property
    def policy(self) -> Precision:
        """Return what is computed in which type."""
        return named(self.precision)


@dataclass(frozen=True)
class VariantPlan:
    """A variant's own files: the table of its positions, and its graphs, made from `shapes`."""

    request: VariantRequest
    positions: Component
    shapes: VariantShapes
    graphs: Sequence[GraphPlan]

    def file(self, graph: GraphPlan) -> str:
        return f"{GRAPHS}/{self.request.name}.{graph.name}.onnx"


class BundlePlan:
    """All files of a bundle and what each is made from; nothing is computed until it is needed."""

    def __init__(
        self,
        requests: Sequence[VariantRequest],
        sources: Sources,
        graphs_from: Bundle | None = None,
    ) -> None:
        """Plan the variants of one bundle. Raises ConfigError if they cannot share weights.

        graphs_from: a bundle whose graphs are taken; `graphs_from.py` says whether they fit.
        """
        self.request, *others = requests
        _check_variants(requests)
        self.sources, self.fake, self.graphs_from = sources, fake_tensors(), graphs_from
        config, precision = self.request.config, self.request.policy
        with self.fake:
            tokenizer = Tokenizer(config.tokenizer)
            transformer = GraphTransformer(config.transformer, precision)
        layout, text = transformer_layout(config.transformer), sources.text
        self.shared = [
            laid_out("transformer", transformer, layout, sources.transformer, "model"),
            tokenizer_component(tokenizer, sources.tokenizer),
        ]
        if text is not None:
            with self.fake:
                encoder = GraphTextEncoder(text.config, precision)
            layout = text_encoder_layout(text.config)
            component = laid_out("text_encoder", encoder, layout, text.state, "text_encoder")
            self.shared.append(component)
        self.variants = [self._variant(request) for request in (self.request, *others)]

    def _variant(self, request: VariantRequest) -> VariantPlan:
        text = self.sources.text and self.sources.text.config
        shapes = VariantShapes(request.shapes, text, request.fused_attention)
        positions = positions_component(request.name, request.config.transformer, self.fake)
        return VariantPlan(request, positions, shapes, shapes.graphs(self.fake))

    @property
    def components(self) -> list[Component]:
        return [*self.shared, *(variant.positions for variant in self.variants)]

    @property
    def graph_count(self) -> int:
        return sum(len(variant.graphs) for variant in self.variants)

    @property
    def weight_bytes(self) -> int:
        return sum(component.size for component in self.components)

    def __str__(self) -> str:
        """Return the lines that a person reads before the build begins."""
        variants = ", ".join(variant.request.name for variant in self.variants)
        lines = [f"{self.request.target}: {variants}, {self.request.precision}"]
        for component in self.components:
            file = component.file.removeprefix(f"{GRAPHS}/")
            lines.append(f"  {file:<44} {readable_size(component.size):>8}")
        taken = "" if self.graphs_from is None else f" of {self.graphs_from.path}"
        lines += [f"  {self.graph_count} graphs{taken}", f"  weights: {self.sources.description}"]
        return "\n".join(lines)


def _check_variants(requests: Sequence[VariantRequest]) -> None:
    """Raise ConfigError if variants have the same name, or their weights would differ."""
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

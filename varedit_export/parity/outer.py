"""The reference without its blocks, for comparisons that hold one block at a time."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from varedit_export.parity.blockwise import RoundedWeights
from varedit_export.parity.edit import ComparedEdit
from varedit_reference.config import ModelConfig
from varedit_reference.scale_loop import PredictedScale, predict_scales, seeded
from varedit_reference.transformer import VAR, TextCondition
from varedit_runtime.manifest import UNGUIDED


class BlocksRecorder(nn.Module):
    """A module in place of the blocks, which keeps what they would read.

    memory: of the text. seen: the stream of the source and of every scale. given: the stream to
    return instead of it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.cross_attention = _TextRecorder()
        self.seen: list[Tensor] = []
        self.given: Tensor | None = None

    def forward(self, x_RLC: Tensor, *_: object) -> Tensor:
        self.seen.append(x_RLC)
        return x_RLC if self.given is None else self.given


class _TextRecorder(nn.Module):
    """A cross-attention that keeps the text's memory [R, T, C]."""

    memory: Tensor

    def project(self, memory: Tensor) -> tuple[Tensor, Tensor]:
        self.memory = memory
        return memory[:0], memory[:0]


@dataclass(frozen=True)
class Run:
    """The edit as the reference without its blocks predicts it.

    form: what the names of its graphs end with. rows: of one picture. seen: the stream of the
    source and of every scale.
    """

    form: str
    rows: int
    edit: ComparedEdit
    steps: Sequence[PredictedScale]
    seen: Sequence[Tensor]


class OuterReference:
    """The reference with a probe in place of its blocks. guided: with unconditional rows."""

    def __init__(
        self, config: ModelConfig, stored: RoundedWeights, edit: ComparedEdit, guided: bool
    ) -> None:
        self._config, self._edit, self._guided = config, edit, guided
        with torch.device("meta"):
            self.model = VAR(replace(config.transformer, depth=1))
        self.probe = BlocksRecorder()
        self.model.blocks = nn.ModuleList([self.probe])  # type: ignore[assignment]
        stored.load(self.model, lambda name: name)

    def text(self, edit: ComparedEdit) -> TextCondition:
        rows = self.model.text_rows([edit.text], self._guided and edit.guided)
        return self.model.condition(rows)

    def runs(self) -> list[Run]:
        """Predict the edit; with guidance, first with all rows, then without guidance."""
        forms = {"": self._edit}
        if self._guided:
            forms[UNGUIDED] = self._edit.without_guidance
        return [self._run(form, edit) for form, edit in forms.items()]

    def _run(self, form: str, edit: ComparedEdit) -> Run:
        text = self.text(edit)
        self.probe.seen = []
        scales = predict_scales(
            self.model,
            self._config,
            edit.source.flatten(1, 2),
            text,
            seeded([edit.seed]),
            edit.guidance,
            edit.temperature,
        )
        return Run(form, len(text.pooled), edit, list(scales), self.probe.seen)

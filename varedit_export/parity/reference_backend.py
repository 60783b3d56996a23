"""The PyTorch reference as a backend: arrays in and out, driven and timed like any other.

So the same code compares graphs with the reference, engines with ONNX Runtime, and the reference
with itself where its products are rounded; and the benchmark times stages of both sides alike.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from varedit_export.parity.edit import with_grids
from varedit_export.parity.rounding import reference_formats, round_products
from varedit_export.sources import Sources, TextSource, t5_encoder, tokenizer_of
from varedit_reference.checkpoint import assign, empty_transformer
from varedit_reference.config import ModelConfig
from varedit_reference.quantisation import source_tokens
from varedit_reference.sampling import draw
from varedit_reference.scale_loop import ScaleLoop
from varedit_reference.tokenizer import Tokenizer
from varedit_reference.transformer import VAR, TextCondition
from varedit_runtime.backends.base import Backend, Sampling, ScaleOutput
from varedit_runtime.errors import BackendError
from varedit_runtime.geometry import source_grid
from varedit_runtime.manifest import Variant
from varedit_runtime.precision import Precision

if TYPE_CHECKING:
    from transformers.models.t5.modeling_t5 import T5Stack


@dataclass(frozen=True)
class Reference:
    """The PyTorch model that graphs are compared with. text: None without a text encoder."""

    config: ModelConfig
    transformer: VAR
    tokenizer: Tokenizer
    text: TextSource | None

    @classmethod
    def from_sources(cls, config: ModelConfig, sources: Sources) -> "Reference":
        """Load the weights that a bundle is built from, in fp32."""
        tokenizer = tokenizer_of(config, sources.tokenizer)
        return cls(config, _var(config, sources.transformer), tokenizer, sources.text)

    def of(self, variant: Variant) -> "Reference":
        """Share the weights with a model of a variant's grids."""
        config = with_grids(variant, self.config)
        transformer = _var(config, self.transformer.state_dict())
        return replace(self, config=config, transformer=transformer)

    def rounded(self, precision: Precision) -> "Reference":
        """Compute the transformer's products, and store their weights, as a precision does."""
        transformer = _var(self.config, self.transformer.state_dict())
        round_products(transformer, reference_formats(self.config.transformer, precision))
        return replace(self, transformer=transformer)


class ReferenceBackend(Backend):
    """The reference as a backend: eager, on the device that its weights are on."""

    def __init__(self, reference: Reference, variant: Variant) -> None:
        """Take a reference with the variant's grids, as `Reference.of` makes it."""
        self.variant, self.provider, self.reference = variant, "pytorch", reference
        self._text: TextCondition | None = None
        self._loop: ScaleLoop | None = None

    def close(self) -> None:
        self._text, self._loop = None, None

    @property
    def drops_rows(self) -> bool:
        """Whether an edit may be without unconditional rows; one that has them keeps them."""
        return True

    @cached_property
    def text_encoder(self) -> "T5Stack":
        """The T5 encoder of transformers. Raises BackendError if the model has none."""
        if self.reference.text is None:
            raise BackendError("the reference has no text encoder: give it text features")
        return t5_encoder(self.reference.text)

    @torch.inference_mode()
    def encode_text(self, token_ids: np.ndarray, text_mask: np.ndarray) -> np.ndarray:
        length = int(text_mask.sum(1).max())  # eager code has no need of more padding than that
        ids, mask = (self._tensor(x[:, :length]) for x in (token_ids, text_mask))
        encoded = self.text_encoder(input_ids=ids, attention_mask=mask.long()).last_hidden_state
        features = np.zeros((*token_ids.shape, encoded.shape[-1]), np.float32)
        features[:, :length] = encoded.cpu().numpy()
        return features

    @torch.inference_mode()
    def encode_pictures(self, pictures: np.ndarray) -> np.ndarray:
        features = self.reference.tokenizer.encode(self._tensor(pictures))
        config = self.reference.config
        grids, conditioning = config.transformer.grids, config.transformer.conditioning
        tokens = source_tokens(features, grids, config.tokenizer.patch, conditioning)
        return tokens.unflatten(1, source_grid(grids, conditioning)).cpu().numpy()

    @torch.inference_mode()
    def condition(self, inputs: Mapping[str, np.ndarray]) -> None:
        model = self.reference.transformer
        rows = self._rows(inputs["text_features"], inputs["text_mask"])
        learned = inputs.get("learned", np.zeros(len(rows), np.bool_))
        text = [
            model.unconditional_text[: len(row)] if own else row
            for row, own in zip(rows, learned, strict=True)
        ]
        self._text = model.condition(text)

    @torch.inference_mode()
    def prefill(self, source_tokens: np.ndarray) -> None:
        assert self._text is not None, "the prefill reads what `condition` computes"
        source = self._tensor(source_tokens).flatten(1, 2)
        model, config = self.reference.transformer, self.reference.config
        self._loop = ScaleLoop(model, config, source, self._text)

    @torch.inference_mode()
    def predict(self, scale: int, sampling: Sampling) -> ScaleOutput:
        assert self._loop is not None, "scales read what `prefill` computes"
        noise, forced, mask = (
            x if x is None else self._tensor(x).flatten(1, 2)
            for x in (sampling.noise, sampling.forced_bits, sampling.forced_mask)
        )

        def choose(_: int, probability: Tensor) -> Tensor:
            assert noise is not None
            drawn = draw(probability, noise)
            return drawn if forced is None or mask is None else forced.where(mask, drawn)

        guidance, temperature = (
            self._tensor(np.asarray(x, np.float32)).view(-1, 1, 1, 1)
            for x in (sampling.guidance_scale, sampling.temperature)
        )
        step = self._loop.predict(scale, choose, guidance, temperature)
        logits, bits = (x.unflatten(1, self.variant.grids[scale]) for x in (step.logits, step.bits))
        return ScaleOutput(*(x.cpu().numpy() for x in (logits, bits, step.sum)))

    @torch.inference_mode()
    def decode(self, running_sum: np.ndarray) -> np.ndarray:
        return self.reference.tokenizer.decode(self._tensor(running_sum)).cpu().numpy()

    def _tensor(self, array: np.ndarray) -> Tensor:
        return torch.tensor(array, device=self.reference.transformer.start_token.device)

    def _rows(self, features: np.ndarray, mask: np.ndarray) -> list[Tensor]:
        """Leave the padding out: features [T_i, text] of every row's real tokens."""
        return [self._tensor(row[real]) for row, real in zip(features, mask, strict=True)]


def make_contiguous(module: nn.Module) -> None:
    """Copy weights into rows: restored ones are transposed views of the graphs', which are slow."""
    for parameter in module.parameters():
        parameter.data = parameter.data.contiguous()


def _var(config: ModelConfig, state: Mapping[str, Tensor]) -> VAR:
    return assign(empty_transformer(config.transformer), state).eval()

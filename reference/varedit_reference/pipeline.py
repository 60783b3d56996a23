"""One edit, from source pictures and instructions to edited pictures."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from varedit_reference.config import ModelConfig
from varedit_reference.quantisation import source_tokens
from varedit_reference.scale_loop import PredictedScale, predict_scales, seeded
from varedit_reference.text_encoder import TextEncoder
from varedit_reference.tokenizer import Tokenizer
from varedit_reference.transformer import VAR
from varedit_runtime.errors import ConfigError
from varedit_runtime.pictures import from_decoder, restore, to_square


@dataclass
class VAREdit:
    """A whole model, ready to edit. All its parts must be on one device."""

    config: ModelConfig
    tokenizer: Tokenizer
    transformer: VAR
    text_encoder: TextEncoder

    @torch.inference_mode()
    def edit(
        self,
        image: Sequence[Image.Image],
        prompt: Sequence[str],
        *,
        seed: Sequence[int],
        negative_prompt: Sequence[str] | None = None,
        guidance_scale: float | Sequence[float] | None = None,
        temperature: float | Sequence[float] | None = None,
        on_scale: Callable[[PredictedScale], None] | None = None,
    ) -> list[Image.Image]:
        """Edit RGB pictures (see `varedit_runtime.pictures`), with one prompt and seed each.

        guidance_scale, temperature: one number or one per scale, by default the model's own; with
        a guidance of 1 the unconditional rows are not computed. on_scale: called after every scale.
        Returns pictures of the sources' sizes. Raises ConfigError when the counts differ or a
        number is out of range, TextError on an instruction that is empty or too long.
        """
        negative_count = len(image) if negative_prompt is None else len(negative_prompt)
        if {len(prompt), len(seed), negative_count} != {len(image)}:
            raise ConfigError(
                f"{len(image)} pictures came with {len(prompt)} prompts, {len(seed)} seeds and "
                f"{len(negative_prompt or [])} negative prompts; give one of each per picture"
            )
        if not image:
            return []
        guidance = self.config.guidance_scale if guidance_scale is None else guidance_scale
        features = self.text_encoder.encode(prompt)
        negatives = self.text_encoder.encode(negative_prompt) if negative_prompt else None
        # Guidance 1 is the conditional row alone, at half of the work.
        rows = self.transformer.text_rows(features, guidance != 1, negatives)
        scales = predict_scales(
            self.transformer,
            self.config,
            self.read(image),
            self.transformer.condition(rows),
            seeded(seed),
            guidance,
            self.config.temperature if temperature is None else temperature,
        )
        total = torch.empty(0)
        for step in scales:
            total = step.sum  # every scale's sum could be decoded; the last is the edit
            if on_scale is not None:
                on_scale(step)
        return self.draw(total, [picture.size for picture in image])

    def read(self, image: Sequence[Image.Image]) -> Tensor:
        """Encode pictures to source tokens [B, S, c]."""
        squares = [torch.from_numpy(to_square(i, self.config.picture_size)) for i in image]
        features = self.tokenizer.encode(torch.stack(squares).to(self._device))
        transformer = self.config.transformer
        return source_tokens(
            features, transformer.grids, self.config.tokenizer.patch, transformer.conditioning
        )

    def draw(self, total: Tensor, sizes: Sequence[tuple[int, int]]) -> list[Image.Image]:
        """Decode a sum of codes [B, d, h_K, w_K] to pictures of the given (width, height)."""
        decoded = self.tokenizer.decode(total).cpu().numpy()
        return [restore(from_decoder(d), s) for d, s in zip(decoded, sizes, strict=True)]

    @property
    def _device(self) -> torch.device:
        return self.transformer.start_token.device

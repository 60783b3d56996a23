"""Small random models and edits for tests."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from varedit_reference.config import Conditioning, ModelConfig, RotaryLayout, preset
from varedit_reference.initialise import initialise
from varedit_reference.kv_cache import source_length
from varedit_reference.scale_loop import ChooseBits, PredictedScale, predict_scales
from varedit_reference.transformer import VAR
from varedit_runtime.noise import uniform_noise


def small_config(
    size: str = "tiny-2b",
    conditioning: Conditioning = "sar",
    rotary: RotaryLayout = "released",
    resolution: int = 256,
    aspect: str = "1:1",
) -> ModelConfig:
    config = preset(size, resolution, aspect)
    transformer = replace(config.transformer, conditioning=conditioning, rotary=rotary)
    return replace(config, transformer=transformer)


def random_var(
    config: ModelConfig,
    compute_dtype: torch.dtype = torch.float32,
    weight_dtype: torch.dtype | None = None,
) -> VAR:
    model = VAR(config.transformer, compute_dtype, weight_dtype)
    initialise(model, seed=3)
    return model.eval()


@dataclass
class SmallEdits:
    """Return sources and texts of several pictures; the texts differ in length."""

    config: ModelConfig
    source: Tensor
    prompts: list[Tensor]

    def run(
        self,
        model: VAR,
        choose: ChooseBits,
        pictures: Sequence[int] | None = None,
        guidance: float | Sequence[float] = 3.0,
        temperature: float | Sequence[float] = 0.5,
    ) -> list[PredictedScale]:
        chosen = range(len(self.prompts)) if pictures is None else pictures
        rows = model.text_rows([self.prompts[i] for i in chosen], guidance != 1)
        return list(
            predict_scales(
                model,
                self.config,
                self.source[list(chosen)],
                model.condition(rows),
                choose,
                guidance,
                temperature,
            )
        )


def random_edits(config: ModelConfig, lengths: Sequence[int] = (5, 2, 9)) -> SmallEdits:
    generator = torch.Generator().manual_seed(5)
    transformer = config.transformer
    shape = (len(lengths), source_length(transformer), transformer.token_channels)
    return SmallEdits(
        config,
        torch.randn(shape, generator=generator),
        [torch.randn(n, transformer.text_channels, generator=generator) for n in lengths],
    )


def noise_of(config: ModelConfig, seeds: Sequence[int], scale: int) -> Tensor:
    """Return the noise [B, L, c] that pictures of these seeds draw a scale's bits with."""
    rows, columns = config.transformer.grids[scale]
    channels = config.transformer.token_channels
    return torch.stack(
        [torch.from_numpy(uniform_noise(s, scale, rows * columns, channels)) for s in seeds]
    )

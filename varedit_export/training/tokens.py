"""Make what a model sees of pairs, by its frozen parts, and keep it on a disk."""

from collections.abc import Mapping, Sequence
from functools import partial
from hashlib import sha256
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from varedit_export.pairs.pair import Pair
from varedit_export.sources import Sources, text_encoder_of, tokenizer_of
from varedit_export.training import parallel
from varedit_export.training.learner import PairTokens
from varedit_export.training.token_cache import TokenCache
from varedit_export.weights.digest import weights_digest
from varedit_reference.config import ModelConfig
from varedit_reference.text_encoder import TextEncoder
from varedit_reference.tokenizer import Tokenizer
from varedit_runtime.decoding.to_rgb import on_white
from varedit_runtime.pictures import to_square


class CachedPairs(Sequence[PairTokens]):
    """The tokens of pairs, by their places."""

    def __init__(self, pairs: Sequence[Pair], cache: TokenCache) -> None:
        self.pairs, self._cache = pairs, cache
        # Kept, because a pair has to be read for its key; zeros are of those not asked for yet.
        self._keys = np.zeros((len(pairs), 32), np.uint8)

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, place: int) -> PairTokens:  # pyright: ignore[reportIncompatibleMethodOverride]
        key = self._keys[place]
        if not key.any():
            key[:] = bytearray.fromhex(self.pairs[place].key)
        arrays = self._cache.find(key.tobytes().hex())
        if arrays is None:
            arrays = self._cache[self.pairs[place]]
        return PairTokens(**{name: torch.from_numpy(array) for name, array in arrays.items()})


def tokens_of(
    pairs: Sequence[Pair], config: ModelConfig, sources: Sources, folder: Path, device: str
) -> tuple[CachedPairs, Tokenizer]:
    """Make the tokens of all pairs that the folder lacks; several processes share the work.

    Returns them with the picture tokenizer, which is on the CPU. Raises DatasetError, which names
    the row, on pairs that cannot be read; TextError on an instruction that is too long; ConfigError
    if the folder cannot be written or has no room.
    """
    assert sources.text is not None
    tokenizer = tokenizer_of(config, sources.tokenizer).to(device)
    text = text_encoder_of(sources.text)
    text.model.to(device)  # pyright: ignore[reportArgumentType]
    encode = partial(encode_pair, config=config, tokenizer=tokenizer, text=text)
    cache = TokenCache(folder, made_by(config, sources), encode)
    with tqdm(desc="tokens", disable=None if parallel.is_first() else True) as bar:

        def show(done: int, count: int) -> None:
            bar.total = count
            bar.update()

        cache.fill(pairs, show, parallel.rank(), parallel.processes())
    parallel.wait_for_all()
    # Beside the tokenizer: training needs the device's memory.
    text.model.to("cpu")  # pyright: ignore[reportArgumentType]
    return CachedPairs(pairs, cache), tokenizer.to("cpu")


def made_by(config: ModelConfig, sources: Sources) -> Sequence[object]:
    """Return what tokens depend on beside the pair, to tell them from others."""
    assert sources.text is not None
    return [
        weights_digest(sources.tokenizer),
        weights_digest(sources.text.state),
        sha256(sources.text.tokenizer_json).hexdigest(),
        config.picture_size,
    ]


def encode_pair(
    pair: Pair, config: ModelConfig, tokenizer: Tokenizer, text: TextEncoder
) -> Mapping[str, np.ndarray]:
    """Return the arrays of a pair's tokens. Where its mask is black, the target is the source."""
    source, target, mask = pair.source(), pair.target(), pair.mask()
    if mask is not None:
        # The colours under transparent pixels are not what a model sees.
        source, target = on_white(source), on_white(target)
        keep = Image.fromarray(~mask).resize(source.size)
        target = Image.composite(source, target.resize(source.size, Image.Resampling.LANCZOS), keep)
    squares = np.stack([to_square(picture, config.picture_size) for picture in (source, target)])
    with torch.no_grad():
        features = tokenizer.encode(torch.from_numpy(squares).to(text.model.device))
    made: dict[str, Tensor] = {"source": features[0], "target": features[1]}
    made["text"] = text.encode([pair.instruction])[0]
    return {name: tensor.float().cpu().numpy() for name, tensor in made.items()}

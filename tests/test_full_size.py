"""The released sizes at full size, with random weights."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from released import write_released_transformer

from varedit_reference.checkpoint import empty_tokenizer, empty_transformer
from varedit_reference.config import preset
from varedit_runtime.backends.host import available_memory

pytestmark = pytest.mark.fullsize

GB = 10**9
DISK, MEMORY = 8 * GB, 10 * GB

# In a process of its own, whose peak memory is then that of loading and running alone. Pages of
# the file that are mapped and read count as its memory.
LOAD_AND_PREDICT = """
import json, re, sys
from pathlib import Path
import torch
from varedit_reference.checkpoint import load_transformer
from varedit_reference.config import preset

def peak():
    return 1024 * int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])

start = peak()
config = preset("2b", 512).transformer
model = load_transformer(sys.argv[1], config, torch.float32, torch.bfloat16)
sums = [p.view(-1).view(torch.uint8)[::512].sum().item() for p in model.parameters()]
loaded = peak()

generator = torch.Generator().manual_seed(0)
features = torch.randn(4, config.text_channels, generator=generator)
source = torch.randn(1, 32 * 32, config.token_channels, generator=generator) / 32**0.5
spreads = []
with torch.inference_mode():
    text = model.condition(model.text_rows([features], guided=False))
    cache = model.prefill(source, text)
    for scale, (rows, columns) in enumerate(config.grids[:3]):
        tokens = torch.randn(1, rows * columns, config.token_channels, generator=generator)
        logits = model.predict(scale, tokens / 32**0.5 if scale else None, text, cache)
        assert logits.shape == (1, rows * columns, config.token_channels, 2)
        assert logits.isfinite().all()
        spreads.append(logits.std().item())
print(json.dumps({"start": start, "loaded": loaded, "peak": peak(), "spreads": spreads}))
"""


@pytest.mark.parametrize(
    ("size", "transformer", "tokenizer"),
    [("2b", 2_204_564_032, 110_118_051), ("8b", 8_375_791_824, 81_624_209)],
)
def test_the_released_sizes_have_their_parameters(
    size: str, transformer: int, tokenizer: int
) -> None:
    config = preset(size, 512)
    assert count(empty_transformer(config.transformer)) == transformer
    assert count(empty_tokenizer(config.tokenizer)) == tokenizer


def count(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.fixture
def checkpoint(tmp_path: Path) -> Iterator[Path]:
    """Write a 2b transformer with random bf16 weights, in the released layout."""
    if not Path("/proc/self/status").exists():
        pytest.skip("peak memory is read from /proc")
    if (free := shutil.disk_usage(tmp_path).free) < DISK:
        pytest.skip(f"needs {DISK / GB:.0f} GB of disk; {free / GB:.1f} GB are free")
    if (free := available_memory() or 0) < MEMORY:
        pytest.skip(f"needs {MEMORY / GB:.0f} GB of memory; {free / GB:.1f} GB are available")
    path = tmp_path / "2B-512.pth"
    write_released_transformer(preset("2b", 512), 0, path, torch.bfloat16)
    yield path
    path.unlink()


def test_the_2b_model_loads_in_its_own_size_and_predicts(checkpoint: Path) -> None:
    run = subprocess.run(
        [sys.executable, "-c", LOAD_AND_PREDICT, str(checkpoint)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert run.returncode == 0, run.stderr
    measured = json.loads(run.stdout)
    size = checkpoint.stat().st_size
    print(f"file {size / GB:.2f} GB;", {k: v for k, v in measured.items()})
    assert size > 2 * 2_204_564_032
    assert size < measured["loaded"] < 1.3 * size  # every weight was read
    assert all(0.1 < spread < 10 for spread in measured["spreads"])

"""Build the bundle that the runtime embeds from nano's own weights.

    python -m varedit_nano.embedded_bundle runtime/varedit_runtime/nano

`varedit-export build --size nano` builds from the embedded bundle. This is where that comes from.
"""

import sys
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

from varedit_export.assemble import assemble
from varedit_export.plan import BundlePlan, VariantRequest
from varedit_export.sources import Sources, checkpoint_sources
from varedit_nano.model import NANO, TEXT_FOLDER, TOKENIZER_FILE, TRANSFORMER_FILE, WEIGHTS
from varedit_runtime.bundle import file_digest

# The longest instruction of nano's wordings has 32 tokens; a word that is not among theirs falls
# apart into several.
TEXT_TOKENS = 48


def embedded_plan(target: Path) -> BundlePlan:
    """Return the plan of the embedded bundle: one guided picture of nano's size in fp32."""
    request = VariantRequest(
        config=NANO,
        resolution=NANO.picture_size[0],
        aspect="1:1",
        precision="fp32",
        batch=1,
        guided=True,
        text_tokens=TEXT_TOKENS,
        target=target,
    )
    return BundlePlan([request], own_sources())


def own_sources(folder: Path = WEIGHTS) -> Sources:
    """Return nano's weights. Raises CheckpointError where they are missing."""
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    # The same wherever the folder is, as the bundle made of it is to be.
    contents = "\n".join(f"{file.relative_to(folder)} {file_digest(file)}" for file in files)
    paths = [folder / name for name in (TRANSFORMER_FILE, TOKENIZER_FILE, TEXT_FOLDER)]
    return replace(
        checkpoint_sources(NANO, *paths),
        description="nano's own",
        trained_on="drawn scenes",
        identity=sha256(contents.encode()).hexdigest(),
    )


def _show(what: str, done: int, steps: int) -> None:
    print(f"{done}/{steps} {what}", file=sys.stderr)


if __name__ == "__main__":
    assemble(embedded_plan(Path(sys.argv[1])), _show)

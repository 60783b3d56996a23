"""Write a bundle as a model of Triton's Python backend: a folder of its model repository.

REPOSITORY/NAME/config.pbtxt     inputs, outputs, batching and queue
REPOSITORY/NAME/1/model.py       a copy of `model.py`
REPOSITORY/NAME/1/bundle/        the bundle

The bundle lies within, so that the folder can be moved, mounted in a container or stored elsewhere
as a whole, and stays as it is when the bundle is built anew. Its files never change, so where they
are on the same disk they are hard links, which take no room.
"""

import shutil
from collections.abc import Iterator
from pathlib import Path

from varedit_runtime.bundle import Bundle, regular_file
from varedit_runtime.errors import BundleError
from varedit_runtime.files import atomic_file, bundle_around
from varedit_runtime.manifest import DIGEST, ENGINES, MANIFEST

_CONFIG = """\
# Written by `varedit-export triton`; docs/integrations.md describes inputs and outputs.
backend: "python"
max_batch_size: {batch}
input [
  {{ name: "image" data_type: TYPE_STRING dims: [ 1 ] }},
  {{ name: "prompt" data_type: TYPE_STRING dims: [ 1 ] }},
  {{ name: "negative_prompt" data_type: TYPE_STRING dims: [ 1 ] optional: true }},
  {{ name: "mask" data_type: TYPE_STRING dims: [ 1 ] optional: true }},
  {{ name: "guidance_scale" data_type: TYPE_FP64 dims: [ -1 ] optional: true {ragged} }},
  {{ name: "temperature" data_type: TYPE_FP64 dims: [ -1 ] optional: true {ragged} }},
  {{ name: "seed" data_type: TYPE_INT64 dims: [ 1 ] optional: true }}
]
output [
  {{ name: "edited" data_type: TYPE_STRING dims: [ 1 ] }},
  {{ name: "used_seed" data_type: TYPE_INT64 dims: [ 1 ] }},
  {{ name: "warnings" data_type: TYPE_STRING dims: [ 1 ] }}
]
# The editor chooses the device.
instance_group [ {{ kind: KIND_MODEL count: 1 }} ]
dynamic_batching {{
  # What waits while a batch is edited forms the next one: nothing is gained by waiting longer.
  max_queue_delay_microseconds: 0
  default_queue_policy {{
    max_queue_size: 32
    default_timeout_microseconds: 60000000
    timeout_action: REJECT
    allow_timeout_override: true
  }}
}}
# Arguments of Editor.open.
parameters {{ key: "variant" value: {{ string_value: "{variant}" }} }}
parameters {{ key: "backend" value: {{ string_value: "{backend}" }} }}
"""


def write_repository(bundle: Bundle, variant: str | None, backend: str, repository: Path) -> Path:
    """Write a model's folder, named for the bundle, into a repository, and return it.

    The folder appears whole or not at all. variant: its name; by default the bundle's first.
    backend: a name for `Editor.open`. Raises BundleError if something is there already or it lies
    in a bundle, if the bundle takes no instructions, has no such variant, or is damaged or replaced
    meanwhile; OSError if the folder cannot be written.
    """
    bundle.check_text()
    chosen = bundle.manifest.variant(variant)
    model = repository / bundle.path.name
    if around := bundle_around(model):
        raise BundleError(f"{model} would lie in the bundle {around}, which never changes")
    if model.exists():
        raise BundleError(f"{model} exists and is not replaced: move it, or name another folder")
    repository.mkdir(parents=True, exist_ok=True)
    with atomic_file(model) as whole:
        version = whole / "1"
        version.mkdir(parents=True)
        shutil.copyfile(Path(__file__).with_name("model.py"), version / "model.py")
        (whole / "config.pbtxt").write_text(
            _CONFIG.format(
                batch=chosen.batch,
                variant=chosen.name,
                backend=backend,
                ragged="allow_ragged_batch: true",
            ),
            encoding="utf-8",
        )
        for name in _files(bundle):
            _place(regular_file(bundle.path, name), version / "bundle" / name)
        bundle.check_stands()  # its files were read by their path
        Bundle.open(version / "bundle", bundle.digest)
    return model


def _files(bundle: Bundle) -> Iterator[str]:
    """Yield the files of a bundle and of its engine sets, by their paths in it."""
    yield from (MANIFEST, DIGEST, *bundle.manifest.files)
    for path in (bundle.path / ENGINES).rglob("*"):
        if path.is_file() and not path.name.startswith("."):
            yield path.relative_to(bundle.path).as_posix()


def _place(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        target.hardlink_to(source)
    except OSError:  # on another disk, or the files are another user's
        shutil.copyfile(source, target)

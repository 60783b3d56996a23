"""Bundles as models of Triton: the folder, the code that Triton calls, and the real server."""

import json
import os
import shutil
import socket
import subprocess
import sys
import sysconfig
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from io import BytesIO
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import triton_stand_in
from click.testing import CliRunner
from PIL import Image

from varedit_export.cli import main
from varedit_export.triton import repository
from varedit_runtime.bundle import Bundle
from varedit_runtime.editing.editor import Editor
from varedit_runtime.errors import BackendError, BundleError
from varedit_runtime.locate import embedded
from varedit_runtime.pictures import encode_picture

SAMPLE = Path(__file__).parent.parent / "docs" / "samples" / "person.png"
SEEDS = (3, 2**53 - 1)


def command(*arguments: str | Path) -> Any:
    return CliRunner().invoke(main, ["triton", *map(str, arguments)])


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return nano's model in a repository."""
    folder = tmp_path_factory.mktemp("models")
    return repository.write_repository(Bundle.open(embedded()), None, "onnxruntime", folder)


def files(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


# The folder


def test_the_command_writes_a_model_with_the_bundle_in_it(model: Path, tmp_path: Path) -> None:
    done = command("nano", "--backend", "onnxruntime", "-o", tmp_path / "new" / "models")
    assert done.exit_code == 0, done.output
    written = Path(done.output.strip())
    assert written == tmp_path / "new" / "models" / "nano"
    assert files(written) == files(model)
    assert Bundle.open(written / "1" / "bundle").digest == Bundle.open(embedded()).digest
    code = Path(repository.__file__).with_name("model.py")
    assert (written / "1" / "model.py").read_bytes() == code.read_bytes()


def test_another_model_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "nano").mkdir()
    done = command("nano", "-o", tmp_path)
    assert (done.exit_code, list((tmp_path / "nano").iterdir())) == (1, [])
    assert "nano exists and is not replaced" in done.output


def test_nothing_is_written_into_a_bundle(model: Path) -> None:
    bundle = model / "1" / "bundle"
    before = files(bundle)
    done = command("nano", "-o", bundle / "models")
    assert (done.exit_code, files(bundle)) == (1, before)
    assert "would lie in the bundle" in done.output


def test_files_are_links_on_one_disk_and_else_copies(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = Bundle.open(model / "1" / "bundle")  # on the disk of tmp_path
    linked = repository.write_repository(bundle, None, "auto", tmp_path / "linked")
    name = next(iter(bundle.manifest.files))
    assert (linked / "1" / "bundle" / name).samefile(bundle.path / name)

    def other_disk(*_: object) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", other_disk)
    copied = repository.write_repository(bundle, None, "auto", tmp_path / "copied")
    assert not (copied / "1" / "bundle" / name).samefile(bundle.path / name)
    assert files(copied) == files(linked)


def test_a_failure_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = Bundle.open(embedded())

    def replaced(self: Bundle) -> None:
        raise BundleError("it was replaced")

    monkeypatch.setattr(Bundle, "check_stands", replaced)
    with pytest.raises(BundleError, match="it was replaced"):
        repository.write_repository(bundle, None, "auto", tmp_path)
    assert list(tmp_path.iterdir()) == []


# The code that Triton calls


def loaded(model: Path) -> ModuleType:
    spec = spec_from_file_location("triton_model", model / "1" / "model.py")
    assert spec and spec.loader
    module = sys.modules[spec.name] = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def running(model: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", triton_stand_in)
    monkeypatch.delitem(sys.modules, "triton_model", raising=False)
    found = loaded(model).TritonPythonModel()
    parameters = {
        "backend": {"string_value": "onnxruntime"},
        "variant": {"string_value": Bundle.open(embedded()).manifest.variants[0].name},
        "EXECUTION_ENV_PATH": {"string_value": "/opt/environment"},
    }
    found.initialize(
        {
            "model_config": json.dumps({"parameters": parameters}),
            "model_repository": str(model),
            "model_version": "1",
        }
    )
    yield found
    found.finalize()


def request(**inputs: Any) -> triton_stand_in.InferenceRequest:
    """Return a request of one row, or, where inputs are lists, of a row for each entry."""
    columns = {}
    for name, value in ({"image": SAMPLE.read_bytes()} | inputs).items():
        rows = value if isinstance(value, list) else [value]
        kind = object if isinstance(rows[0], bytes) else None
        columns[name] = np.array(rows, kind).reshape(len(rows), -1)
    return triton_stand_in.InferenceRequest(columns)


def column(response: Any, name: str) -> list[Any]:
    (tensor,) = (one for one in response.output_tensors if one.name == name)
    return tensor.array[:, 0].tolist()


def test_results_are_the_editors(running: Any, nano: Editor) -> None:
    both = request(
        image=[SAMPLE.read_bytes()] * 2, prompt=[b"add a hat", b"make it night"], seed=[*SEEDS]
    )
    scales = (4.0,) * len(nano.variant.grids)
    masked = request(
        prompt=b"add a hat", mask=mask(), negative_prompt=b"", guidance_scale=scales, seed=5
    )
    first, second = running.execute([both, masked])
    expected = [
        nano.edit(SAMPLE, "add a hat", seed=SEEDS[0]),
        nano.edit(SAMPLE, "make it night", seed=SEEDS[1]),
        nano.edit(SAMPLE, "add a hat", mask=mask(), guidance_scale=scales, seed=5),
    ]
    edited = column(first, "edited") + column(second, "edited")
    assert edited == [encode_picture(one.image) for one in expected]
    assert column(first, "used_seed") + column(second, "used_seed") == [*SEEDS, 5]
    assert column(first, "warnings") == [b"", b""]


def mask() -> bytes:
    marked = Image.new("L", Image.open(SAMPLE).size)
    marked.paste(255, (0, 0, marked.width, marked.height // 2))
    return encode_picture(marked)


def test_each_request_has_its_own_error(running: Any, nano: Editor) -> None:
    responses = running.execute(
        [
            request(image=b"no picture", prompt=b"add a hat"),
            request(prompt=b"add a hat", seed=3),
            request(prompt=b""),
            request(prompt=b"\xff"),
            request(prompt=b"add a hat", temperature=0.0),
            request(prompt=b"add a hat", seed=-1),
        ]
    )
    assert [one.error and one.error.code for one in responses] == [
        "invalid",
        None,
        *["invalid"] * 4,
    ]
    assert column(responses[1], "edited") == [
        encode_picture(nano.edit(SAMPLE, "add a hat", seed=3).image)
    ]


@pytest.mark.parametrize("kind", [BackendError, MemoryError])
def test_a_fault_fails_only_the_request_that_has_it(
    running: Any, monkeypatch: pytest.MonkeyPatch, kind: type[Exception]
) -> None:
    edit = running.editor.edit_prepared

    def failing(edits: Any, **options: Any) -> Any:
        if any(one.seed == 13 for one in edits):
            raise kind("/a/path/of/the/server failed")
        return edit(edits, **options)

    monkeypatch.setattr(running.editor, "edit_prepared", failing)
    good, bad = running.execute([request(prompt=b"add a hat", seed=s) for s in (3, 13)])
    assert good.error is None
    assert bad.error.code == "internal" and "/a/path" not in bad.error.text
    assert triton_stand_in.Logger.lines[-1] == f"{kind.__name__}: /a/path/of/the/server failed"


@pytest.mark.parametrize("after", [0, 3])
def test_an_edit_that_nobody_waits_for_ends(running: Any, after: int) -> None:
    gone = request(prompt=b"add a hat")
    gone.cancelled_after = after
    (response,) = running.execute([gone])
    assert response.error.code == "cancelled"


# The real server


def server_folder() -> Path | None:
    """Return the folder of the package nvidia-pytriton, if it has the numpy that it needs.

    Its server's Python backend reads arrays of numpy 2 wrongly, so it is installed elsewhere:
    VAREDIT_PYTRITON names its folder there.
    """
    spec = find_spec("pytriton")
    found = Path(spec.origin).parent if spec and spec.origin else ""
    folder = Path(os.environ.get("VAREDIT_PYTRITON", found))
    usable = folder.is_absolute() and any(folder.parent.glob("numpy-1.*.dist-info"))
    return folder if usable else None


SERVER = server_folder()


def server_python(folder: Path) -> Path:
    """Make an environment that the server's Python finds, with the packages of this one."""
    done = subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder])
    assert done.returncode == 0
    site = folder / "lib" / f"python{sysconfig.get_python_version()}" / "site-packages"
    assert SERVER
    (site / "these.pth").write_text("\n".join([str(SERVER.parent), *filter(None, sys.path)]))
    return folder / "bin"


@contextmanager
def served(model: Path, folder: Path) -> Iterator[str]:
    """Serve a repository with the real server; yield its address."""
    assert SERVER
    shutil.copytree(SERVER / "tritonserver" / "backends", folder / "backends")
    version = sysconfig.get_python_version()
    stub = SERVER / "tritonserver" / "python_backend_stubs" / version / "triton_python_backend_stub"
    shutil.copy(stub, folder / "backends" / "python")
    libraries = f"{SERVER.parent / 'nvidia_pytriton.libs'}:{sysconfig.get_config_var('LIBDIR')}"
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    options = {
        "model-repository": model.parent,
        "backend-directory": folder / "backends",
        "http-address": "127.0.0.1",
        "http-port": port,
        "allow-grpc": "false",
        "allow-metrics": "false",
    }
    path = f"{server_python(folder / 'environment')}:{os.environ['PATH']}"
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            [SERVER / "tritonserver" / "bin" / "tritonserver"]
            + [part for name, value in options.items() for part in (f"--{name}", str(value))],
            env=os.environ | {"PATH": path, "LD_LIBRARY_PATH": libraries},
            stdout=log,
            stderr=log,
        )
    try:
        address = f"http://127.0.0.1:{port}/v2"
        wait_until_ready(address, process, folder / "log")
        yield address
    finally:
        process.terminate()
        process.wait(60)


def wait_until_ready(address: str, process: subprocess.Popen[bytes], log: Path) -> None:
    for _ in range(600):
        assert process.poll() is None, log.read_text()
        try:
            urllib.request.urlopen(f"{address}/health/ready").close()
        except (urllib.error.URLError, ConnectionError):
            time.sleep(0.1)
        else:
            return
    pytest.fail(log.read_text())


KINDS = {"O": "BYTES", "f": "FP64", "i": "INT64"}


def asked(address: str, inputs: Mapping[str, np.ndarray]) -> dict[str, list[bytes]]:
    """Send a request with the binary data of Triton's protocol; return the answer's rows."""
    head, body = {"inputs": [], "parameters": {"binary_data_output": True}}, b""
    for name, array in inputs.items():
        data = array.tobytes()
        if array.dtype == object:
            data = b"".join(len(v).to_bytes(4, "little") + v for v in array.ravel().tolist())
        told = {"name": name, "shape": array.shape, "datatype": KINDS[array.dtype.kind]}
        head["inputs"].append(told | {"parameters": {"binary_data_size": len(data)}})
        body += data
    start = json.dumps(head).encode()
    sent = urllib.request.Request(f"{address}/models/nano/infer", start + body)
    sent.add_header("Inference-Header-Content-Length", str(len(start)))
    with urllib.request.urlopen(sent) as answer:
        length = int(answer.headers["Inference-Header-Content-Length"])
        told, content = json.loads(answer.read(length)), BytesIO(answer.read())
    return {output["name"]: list(rows(output, content)) for output in told["outputs"]}


def rows(output: Mapping[str, Any], content: BytesIO) -> Iterator[bytes]:
    for _ in range(output["shape"][0]):
        size = int.from_bytes(content.read(4), "little") if output["datatype"] == "BYTES" else 8
        yield content.read(size)


@pytest.mark.skipif(SERVER is None, reason="needs nvidia-pytriton and numpy < 2")
def test_the_real_server_edits_as_the_editor_does(
    model: Path, tmp_path: Path, nano: Editor
) -> None:
    with served(model, tmp_path) as address:
        wanted = request(prompt=b"add a hat", seed=3, guidance_scale=4.0, mask=mask())
        answer = asked(address, wanted.inputs)
        with pytest.raises(urllib.error.HTTPError) as refused:
            asked(address, request(prompt=b"").inputs)
        told = json.load(refused.value)["error"]
    expected = nano.edit(SAMPLE, "add a hat", seed=3, guidance_scale=4.0, mask=mask())
    assert answer["edited"] == [encode_picture(expected.image)]
    assert answer["used_seed"] == [(3).to_bytes(8, "little")]
    assert "instruction" in told

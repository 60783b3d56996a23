"""Where extras are not installed: wrong arguments are told first, then the extra, no package."""

import json
import subprocess
import sys
from typing import Any

import pytest
from PIL import Image

from varedit_runtime.locate import embedded

# Runs command lines, one after the other, in a process that has what the runtime needs alone.
PROGRAM = """if True:
    import json, runpy, sys
    from click.testing import CliRunner
    ABSENT = {"torch", "transformers", "huggingface_hub", "safetensors", "onnx", "onnx_ir"}
    ABSENT |= {"onnxscript", "tqdm", "tensorrt", "tensorrt_rtx", "polygraphy", "cuda"}
    ABSENT |= {"starlette", "uvicorn", "python_multipart", "prometheus_client", "c2pa", "ray"}
    class Absent:
        def find_spec(self, name, path=None, target=None):
            if name.split(".")[0] in ABSENT:
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)
    sys.meta_path.insert(0, Absent())
    from varedit_export.cli import main as export
    from varedit_reference.golden.__main__ import main as golden
    from varedit_runtime.cli import main as run
    from varedit_serve.cli import main as serve
    commands = {"export": export, "golden": golden, "run": run, "serve": serve}
    done = []
    for name, *words in json.load(sys.stdin):
        result = CliRunner().invoke(commands[name], words)
        done.append((result.exit_code, result.stderr))
    json.dump(done, sys.stdout)
    """
NANO = str(embedded())
BUILD, NANO_BUILD = ("export", "build"), ("export", "build", "--size", "nano")
EDIT = ("run", "photo.png", "red", "--bundle", NANO)
RTX = ("--backend", "tensorrt-rtx", "--architecture")
CONVERT = ("--checkpoint", "v", "--tokenizer", "t", "--text-encoder", "e", "-o", "out")

WRONG = {
    BUILD: "give both --size and --res",
    (*BUILD, "--size", "3b"): "no size is called '3b'",
    (*BUILD, "--size", "3b", *RTX, "sm89"): "no size is called '3b'",
    (*BUILD, "--size", "2b", "--res", "300"): "there is no resolution 300",
    (*BUILD, "--size", "2b", "--res", "512", "--aspect", "7:1"): "there is no aspect ratio 7:1",
    (*BUILD, "--size", "2b", "--config", "x"): "--config says the size",
    (*BUILD, "--config", "nowhere.json"): "there is no file nowhere.json",
    (*BUILD, "--size", "125m", "--res", "256"): "size 125m needs --checkpoint and",
    (*NANO_BUILD, "--res", "512"): "nano was trained at 128 px",
    (*NANO_BUILD, "--batch", "0"): "a batch of 1 to 1024",
    (*NANO_BUILD, "--text-tokens", "1"): "2 to 512 text tokens",
    (*NANO_BUILD, "--precision", "bf16", "--fused-attention"): "ONNX Runtime runs no bf16",
    (*NANO_BUILD, "--random-weights", "0", "--tokenizer", "x"): "replaces all checkpoints",
    (*NANO_BUILD, "--lora", "x:nan"): "'nan' is no scale",
    (*NANO_BUILD, "--from", "x/y"): "--from: only 2b and 8b",
    (*NANO_BUILD, "--engine-layout", "baked"): "has no engines",
    (*NANO_BUILD, *RTX, "ada"): "architecture is 'ada'; give a GPU's, such as sm89",
    ("export", "engines", "nowhere"): "there is no bundle at",
    ("export", "engines", NANO, "--variant", "x"): "no variant 'x'",
    ("export", "engines", NANO, "--architecture", "sm89"): "only tensorrt-rtx compiles for named",
    ("export", "verify", "nowhere"): "there is no bundle at",
    ("export", "verify", NANO, "--variant", "x"): "--variant: all are compared",
    ("export", "verify", NANO, "--backend", "tensorrt", "--variant", "x"): "no variant 'x'",
    ("export", "layers", "nowhere", "scale_00"): "there is no bundle at",
    ("export", "layers", NANO, "scale_99"): "no graph 'scale_99'",
    ("export", "bench", "nowhere"): "there is no bundle at",
    ("export", "bench", NANO, "--repeat", "0"): "repeat is 0",
    ("export", "bench", NANO, "--threads", "0"): "threads is 0",
    ("export", "bench", NANO, "--variant", "x"): "no variant 'x'",
    ("export", "bench", NANO, "--json", "missing/x.json"): "there is no folder missing",
    ("export", "convert", "--size", "3b", *CONVERT): "no size is called '3b'",
    ("export", "convert", "--size", "2b", "-o", "out"): "convert needs --checkpoint",
    ("run", "bench", "nowhere", "--backend", "tensorrt"): "there is no bundle at",
    (
        "run",
        "photo.png",
        "red",
        "--bundle",
        NANO,
        "--backend",
        "tensorrt",
        "--variant",
        "x",
    ): "no variant 'x'",
    ("golden",): "Missing argument",
    ("serve", "nowhere"): "there is no bundle at",
    ("serve", NANO, "--host", "0.0.0.0"): "give API keys",
    ("serve", NANO, "--max-workers", "2"): "--max-workers is for --ray",
    (*EDIT, "--ray"): "--ray is for several pictures",
    ("serve", NANO, "--batch", "0"): "--batch is 0",
    ("serve", NANO, "--digest", "0"): "is not the one asked for",
    ("serve", NANO, "--max-queue", "0"): "--max-queue is 0",
    ("serve", NANO, "--keys", "nowhere"): "nowhere cannot be read",
    ("serve", NANO, "--moderation", "nowhere"): "nowhere is no MODULE:OBJECT",
}
LACKING = {
    NANO_BUILD: "export",
    (*NANO_BUILD, "--backend", "tensorrt"): "export,tensorrt",
    (*NANO_BUILD, *RTX, "sm89"): "export,tensorrt-rtx",
    (*BUILD, "--size", "8b", "--res", "512"): "export",
    ("export", "engines", NANO): "export,tensorrt",
    ("export", "verify", NANO): "export",
    ("export", "layers", NANO, "scale_00"): "export,tensorrt",
    ("export", "bench", NANO): "export",
    ("export", "convert", "--size", "2b", *CONVERT): "export",
    ("run", "bench", NANO, "--backend", "tensorrt-rtx"): "tensorrt-rtx",
    (*EDIT, "--backend", "tensorrt"): "tensorrt",
    (*EDIT, "--ray", "-o", "out/"): "ray",
    ("golden", "nowhere"): "export",
    ("serve", NANO): "serve",
    ("serve", NANO, "--c2pa", "chain.pem", "key.pem"): "c2pa",
}
WORKING = [("export", "inspect", NANO), ("export", "doctor", NANO), ("run", "grids")]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, ...], Any]:
    folder = tmp_path_factory.mktemp("bare")
    Image.new("RGB", (8, 8), "red").save(folder / "photo.png")
    asked = [*WRONG, *LACKING, *WORKING]
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        input=json.dumps(asked),
        capture_output=True,
        text=True,
        cwd=folder,
    )
    assert done.returncode == 0, done.stderr
    assert [path.name for path in folder.iterdir()] == ["photo.png"]
    return dict(zip(asked, json.loads(done.stdout), strict=True))


@pytest.mark.parametrize(("words", "said"), WRONG.items(), ids=map(" ".join, WRONG))
def test_wrong_arguments_are_told_before_extras(
    words: tuple[str, ...], said: str, results: dict[tuple[str, ...], Any]
) -> None:
    code, told = results[words]
    assert code in (1, 2) and said in told.splitlines()[-1]


@pytest.mark.parametrize(("words", "extra"), LACKING.items(), ids=map(" ".join, LACKING))
def test_the_extra_is_told_and_not_the_package(
    words: tuple[str, ...], extra: str, results: dict[tuple[str, ...], Any]
) -> None:
    code, told = results[words]
    assert code == 1
    line = told.splitlines()[-1]
    assert line.startswith(f"Error: varedit-export[{extra}] is not installed (")
    assert line.endswith(f'); run: pip install "varedit-export[{extra}]"')


@pytest.mark.parametrize("words", WORKING, ids=" ".join)
def test_what_needs_no_extra_works(
    words: tuple[str, ...], results: dict[tuple[str, ...], Any]
) -> None:
    assert results[words] == [0, ""]

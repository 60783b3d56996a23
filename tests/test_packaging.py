"""What is installed, what importing costs, and how the commands fail."""

import json
import os
import signal
import subprocess
import sys
import tarfile
import tomllib
from pathlib import Path
from zipfile import ZipFile

import pytest
from click.testing import CliRunner
from packaging.requirements import Requirement
from PIL import Image

from varedit_runtime import pictures
from varedit_runtime.cli import main as run_main

ROOT = Path(__file__).parent.parent
PACKAGES = {
    "varedit_export",
    "varedit_reference",
    "varedit_engines",
    "varedit_runtime",
    "varedit_serve",
}
COMMANDS = ["varedit-export", "varedit-run", "varedit-serve"]


def execute(*command: str | Path, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    # Without PYTHONPATH, so that what is found is what is installed.
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment)


def python(code: str, *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return execute(sys.executable, "-c", code, *arguments, cwd=cwd)


def command(name: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return execute(Path(sys.executable).with_name(name), *arguments)


# Installing


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    done = execute(sys.executable, "-m", "hatchling", "build", "-d", folder, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return folder


def test_the_wheel_installs_five_import_names_and_three_commands(built: Path):
    (path,) = built.glob("*.whl")
    with ZipFile(path) as wheel:
        names = wheel.namelist()
        (entry_points,) = (name for name in names if name.endswith("entry_points.txt"))
        scripts = wheel.read(entry_points).decode()
    (info,) = {name.split("/")[0] for name in names} - PACKAGES
    assert info.endswith(".dist-info")
    assert {f"{package}/py.typed" for package in PACKAGES} <= set(names)
    assert f"{info}/licenses/LICENSE" in names
    assert "varedit_serve/page/index.html" in names
    assert [line.split()[0] for line in scripts.splitlines() if "=" in line] == COMMANDS


def test_the_installed_bundle_opens_where_nothing_can_be_written(built: Path, tmp_path: Path):
    (path,) = built.glob("*.whl")
    with ZipFile(path) as wheel:
        wheel.extractall(tmp_path / "site")
    files = sorted((tmp_path / "site").rglob("*"))
    for file in files:
        file.chmod(0o555 if file.is_dir() else 0o444)
    code = """if True:
        import sys
        sys.path.insert(0, sys.argv[1])
        from varedit_runtime import bundle, locate
        opened = bundle.Bundle.open(locate.embedded())
        opened.verify()
        print(opened.path)
        """
    done = python(code, str(tmp_path / "site"), cwd=tmp_path)
    assert done.stdout == f"{tmp_path / 'site' / 'varedit_runtime' / 'nano'}\n", done.stderr
    hidden = [file.name for file in files if file.name.startswith(".")]
    assert hidden == []
    for folder in [tmp_path / "site", *filter(Path.is_dir, files)]:
        folder.chmod(0o755)


def test_the_source_archive_has_the_tests_without_the_recordings(built: Path):
    (path,) = built.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = [name.split("/", 1)[1] for name in archive.getnames()]
    assert "tests/test_packaging.py" in names
    assert not [name for name in names if name.startswith("tests/golden")]


def test_the_runtime_imports_neither_torch_nor_the_other_packages(tmp_path: Path):
    code = """if True:
        import importlib, pkgutil, sys, varedit_runtime
        for module in pkgutil.walk_packages(varedit_runtime.__path__, "varedit_runtime."):
            importlib.import_module(module.name)
        print(*sorted({name.split(".")[0] for name in sys.modules}))
        """
    done = python(code, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    loaded = set(done.stdout.split())
    assert "varedit_runtime" in loaded
    assert not loaded & {"torch", "transformers", *(PACKAGES - {"varedit_runtime"})}


@pytest.mark.parametrize(
    "module",
    [
        "varedit_runtime",
        "varedit_runtime.cli",
        "varedit_export",
        "varedit_export.cli",
        "varedit_serve.cli",
    ],
)
def test_starting_a_command_is_light(module: str, tmp_path: Path):
    done = python(f"import sys, {module}; print(*sys.modules)", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    loaded = set(done.stdout.split())
    assert module in loaded
    heavy = {"torch", "PIL", "onnxruntime", "numpy", "tokenizers", "transformers"}
    assert not loaded & {*heavy, "starlette", "uvicorn", "prometheus_client"}


# What CI and the demo install


def test_locked_versions_are_in_the_declared_ranges_and_name_no_registry():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    installed = ("export", "train", "tensorrt-rtx", "dev", "audit")
    declared = [*project["dependencies"], *(line for extra in installed for line in extras[extra])]
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    locked = [Requirement(line.partition(" #")[0]) for line in lines if line[:1] not in ("#", "")]
    versions = {pin.name: str(pin.specifier).removeprefix("==") for pin in locked}
    for wanted in map(Requirement, declared):
        if wanted.name != project["name"]:
            assert wanted.specifier.contains(versions[wanted.name]), wanted
    assert "://" not in "".join(lines)
    assert versions["torch"] == "2.13.0"  # whose exporter writes nano's graphs byte for byte


# Editors find the packages as this type checker does: through the editable install.

RIGHT = """\
import varedit_engines
from varedit_export.cli import main
from varedit_reference.config import ModelConfig, preset
from varedit_runtime.grids import scale_grids

documentation: str | None = varedit_engines.__doc__
name: str | None = main.name
config: ModelConfig = preset("2b")
finest: tuple[int, int] = scale_grids(512)[-1]
"""
WRONG = {
    "config: ModelConfig": "config: int",
    "finest: tuple[int, int]": "finest: str",
    "name: str | None": "name: int",
    "documentation: str | None": "documentation: int",
}


def test_a_type_checker_outside_the_repository_follows_imports(tmp_path: Path):
    (tmp_path / "pyrightconfig.json").write_text('{"typeCheckingMode": "standard"}')
    (tmp_path / "right.py").write_text(RIGHT)
    for number, (right, wrong) in enumerate(WRONG.items()):
        (tmp_path / f"wrong{number}.py").write_text(RIGHT.replace(right, wrong))
    done = execute(
        sys.executable,
        *("-m", "basedpyright", "--outputjson", "--pythonpath", sys.executable),
        cwd=tmp_path,
    )
    found = [
        (Path(error["file"]).name, error["range"]["start"]["line"])
        for error in json.loads(done.stdout)["generalDiagnostics"]
    ]
    lines = RIGHT.splitlines()
    expected = [
        (f"wrong{number}.py", next(i for i, line in enumerate(lines) if line.startswith(right)))
        for number, right in enumerate(WRONG)
    ]
    assert sorted(found) == expected


# Commands


@pytest.mark.parametrize("name", COMMANDS)
def test_commands_tell_their_version_and_show_examples(name: str):
    version = command(name, "--version")
    assert version.returncode == 0
    assert version.stdout == f"{name}, version 0.1.0\n"
    assert f"\n  {name} " in command(name, "--help").stdout


def test_an_error_is_one_line_and_a_traceback_comes_with_debug(tmp_path: Path):
    arguments = ("prepare", tmp_path / "missing.png", "-o", tmp_path / "out.png")
    failed = command("varedit-run", *arguments)
    assert failed.returncode == 1
    assert failed.stderr == f"Error: {arguments[1]} cannot be read: No such file or directory\n"
    assert failed.stdout == ""
    debugged = command("varedit-run", "--debug", *arguments)
    assert debugged.returncode == 1
    assert "Traceback" in debugged.stderr


def test_warnings_of_libraries_do_not_add_to_the_line(tmp_path: Path):
    code = """if True:
        import warnings
        from varedit_runtime import pictures
        from varedit_runtime.cli import main
        from varedit_runtime.errors import PictureError
        def open_picture(source):
            warnings.warn("a library's warning")
            raise PictureError("no picture")
        pictures.open_picture = open_picture
        main()
        """
    arguments = ("prepare", "in.png", "-o", str(tmp_path / "out.png"))
    assert python(code, *arguments, cwd=tmp_path).stderr == "Error: no picture\n"
    debugged = python(code, "--debug", *arguments, cwd=tmp_path)
    assert "a library's warning" in debugged.stderr


CONVERT = ("--checkpoint", "v", "--tokenizer", "t", "--text-encoder", "e", "-o", "out")


def test_convert_refuses_an_unknown_size():
    failed = command("varedit-export", "convert", "--size", "3b", *CONVERT)
    assert failed.returncode == 1
    assert failed.stderr.startswith("Error: ") and "2b, 8b" in failed.stderr
    assert failed.stderr.count("\n") == 1


def test_without_torch_convert_names_the_extra_to_install(tmp_path: Path):
    code = """if True:
        import sys
        sys.modules["torch"] = None
        from varedit_export.cli import main
        main()
        """
    failed = python(code, "convert", "--size", "2b", *CONVERT, cwd=tmp_path)
    assert failed.returncode == 1
    assert failed.stderr == (
        "Error: varedit-export[export] is not installed (torch is missing); run: "
        'pip install "varedit-export[export]"\n'
    )


def test_an_interrupt_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def interrupted(source: Path) -> None:
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(pictures, "open_picture", interrupted)
    result = CliRunner().invoke(run_main, ["prepare", "in.png", "-o", str(tmp_path / "out.png")])
    assert result.exit_code == 130
    assert result.output == "Interrupted.\n"


def test_prepare_writes_what_a_model_sees(tmp_path: Path):
    source, output = tmp_path / "in.png", tmp_path / "out.png"
    Image.new("RGB", (40, 20)).save(source)
    done = command("varedit-run", "prepare", source, "-o", output, "--res", "256")
    assert done.stdout == f"{output}: 256 x 256, from 40 x 20\n"
    with Image.open(output) as written:
        assert (written.mode, written.size) == ("RGB", (256, 256))
        assert written.getpixel((255, 100)) == (0, 0, 0)
        assert written.getpixel((255, 156)) == (255, 255, 255)
    done = command("varedit-run", "prepare", source, "-o", output, "--aspect", "2:1", "--overwrite")
    assert done.stdout == f"{output}: 368 x 736, from 40 x 20\n"


def test_grids_lists_every_size():
    lines = command("varedit-run", "grids").stdout.splitlines()
    assert len(lines) == 45
    assert [line.split()[:4] for line in lines if " trained" in line] == [
        ["256", "1:1", "256x256", "trained"],
        ["512", "1:1", "512x512", "trained"],
        ["1024", "1:1", "1024x1024", "trained"],
    ]


def test_importing_the_editor_writes_nothing_to_the_home(tmp_path: Path) -> None:
    """ONNX Runtime would write a device ID there and start its telemetry."""
    code = "import varedit_runtime.editing.editor, os; print(os.environ['ORT_DISABLE_TELEMETRY'])"
    home = {"HOME": str(tmp_path), "PYTHONPATH": str(ROOT / "runtime")}
    done = subprocess.run(
        [sys.executable, "-c", code], env=home, cwd=tmp_path, capture_output=True, text=True
    )
    assert done.stdout == "1\n", done.stderr
    assert list(tmp_path.rglob("*")) == []

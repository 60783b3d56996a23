"""What `doctor` says of made-up machines, and what it finds on this one."""

import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import requires
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner
from fake_bundles import publish, publish_random, publish_textless
from test_engine_set import OF_A_MACHINE, STAGES, compile_set

from varedit_engines.engine_cache import EngineCache
from varedit_export.cli import main
from varedit_export.doctor import EXPORT, all_verdicts, can_edit, report
from varedit_runtime.backends import detect, host
from varedit_runtime.backends.detect import detect_machine
from varedit_runtime.backends.engines import engine_set
from varedit_runtime.backends.engines.engine_set import EngineRecipe
from varedit_runtime.backends.engines.memory import Budget
from varedit_runtime.backends.host import available_memory, nvidia
from varedit_runtime.backends.machine import (
    BundleFacts,
    EngineSetFacts,
    Gpu,
    Machine,
    Nvidia,
    ProbeResult,
)
from varedit_runtime.backends.onnxruntime import backend as onnx_backend
from varedit_runtime.backends.onnxruntime.backend import Session
from varedit_runtime.backends.onnxruntime.spec import WHOLE_BYTES, failed_providers
from varedit_runtime.bundle import Bundle
from varedit_runtime.errors import BackendError, BundleError
from varedit_runtime.precision import named

ADA = Gpu("NVIDIA RTX 4090", "sm89", 24 * 10**9, 20 * 10**9)
HOPPER = Gpu("NVIDIA H200", "sm90", None, None)
CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
FP32, FP16, BF16, INT8, INT7 = map(named, ("fp32", "fp16", "bf16", "int8", "int7"))
NO_VNNI = {WHOLE_BYTES: "this processor has no VNNI"}
EXTRA = dict.fromkeys(EXPORT, "1.0")
LAPTOP = Machine(
    python="3.11.7",
    nvidia=Nvidia(None, (), "nvidia-smi cannot be run"),
    packages={"varedit-export": "0.1.0", "onnxruntime": "1.21"},
    probes={"onnxruntime": ProbeResult(offers=(CPU,))},
    memory=16 * 10**9,
    disk=10**11,
)
SERVER = replace(
    LAPTOP,
    nvidia=Nvidia("570.1", (ADA,)),
    packages={"onnxruntime-gpu": "1.21", "tensorrt": "11.0", "tensorrt-rtx": "1.7", **EXTRA}
    | {"cuda-core": "1.0", "cuda-bindings": "13.0"},
    probes={
        "onnxruntime": ProbeResult(offers=(CUDA, CPU)),
        "tensorrt-rtx": ProbeResult(offers=("sm75", "sm89")),
    },
)
BUNDLE = BundleFacts(Path("bundles/2b"), FP32, 8 * 10**9, ("512-b1",), ())


def without(machine: Machine, *packages: str) -> Machine:
    left = {name: v for name, v in machine.packages.items() if name not in packages}
    return replace(machine, packages=left)


def probed(machine: Machine, backend: str, **changed: Any) -> Machine:
    probe = replace(machine.probe(backend), **changed)
    return replace(machine, probes={**machine.probes, backend: probe})


def having(machine: Machine, *packages: str) -> Machine:
    return replace(machine, packages={**machine.packages, **dict.fromkeys(packages, "1.0")})


def with_bundle(machine: Machine, **changed: Any) -> Machine:
    return replace(machine, bundle=replace(BUNDLE, **changed))


def with_engines(backend: str, gpu: str = "", needing: int = 5, offloaded: int = 0) -> Machine:
    """Make a machine; gpu: by default a server's; needing, offloaded: GB of its memory."""
    gpu = gpu or ("sm89" if backend == "tensorrt-rtx" else f"sm89 {ADA.name}")
    tools = {backend: SERVER.packages[backend]}
    recipe = EngineRecipe(backend, "512-b1", {}, {}, tools, gpu, "external", "fp16", {})
    sizes = needing * 10**9, offloaded * 10**9
    engines = EngineSetFacts(Path(f"{backend}-0"), recipe, "", *sizes)
    return with_bundle(SERVER, engines=(engines,))


SWAP = (
    '`pip uninstall onnxruntime` and `pip install --force-reinstall "onnxruntime-gpu[cuda,cudnn]"`'
)
SWAP_BACK = "`pip uninstall onnxruntime-gpu` and `pip install --force-reinstall onnxruntime`"


@pytest.mark.parametrize(
    ("machine", "backend", "word", "said"),
    [
        (LAPTOP, "onnxruntime cpu", "can run", "fp32 or int8"),
        (probed(LAPTOP, "onnxruntime", failed=NO_VNNI), "onnxruntime cpu", "can run", "int7"),
        (with_bundle(LAPTOP, precision=INT8), "onnxruntime cpu", "can run", "this bundle"),
        (
            probed(with_bundle(LAPTOP, precision=INT8), "onnxruntime", failed=NO_VNNI),
            "onnxruntime cpu",
            "cannot",
            "no VNNI: build with --precision int7",
        ),
        (
            probed(with_bundle(LAPTOP, precision=INT7), "onnxruntime", failed=NO_VNNI),
            "onnxruntime cpu",
            "can run",
            "this bundle",
        ),
        (with_bundle(SERVER, precision=INT8), "onnxruntime cuda", "cannot", "CPUs alone"),
        (with_bundle(SERVER, precision=INT7), "tensorrt", "cannot", "CPUs alone"),
        (with_bundle(SERVER, precision=INT8), "tensorrt-rtx", "cannot", "--precision fp16"),
        (
            probed(without(LAPTOP, "onnxruntime"), "onnxruntime", offers=()),
            "onnxruntime cpu",
            "cannot",
            "is not installed; run `pip install --force-reinstall onnxruntime`",
        ),
        (
            probed(LAPTOP, "onnxruntime", problem="no libgomp", offers=()),
            "onnxruntime cpu",
            "cannot",
            "(no libgomp); run `pip",
        ),
        (
            probed(having(LAPTOP, "onnxruntime-gpu"), "onnxruntime", failed={"cpu": "no symbol"}),
            "onnxruntime cpu",
            "cannot",
            f"no symbol; run {SWAP_BACK}",
        ),
        (with_bundle(LAPTOP), "onnxruntime cpu", "can run", "this bundle"),
        (
            with_bundle(LAPTOP, precision=BF16),
            "onnxruntime cpu",
            "cannot",
            "--precision fp32",
        ),
        (with_bundle(LAPTOP, memory=17 * 10**9), "onnxruntime cpu", "cannot", "17.0 GB"),
        (
            with_bundle(LAPTOP, memory=17 * 10**9, offloaded=15 * 10**9),
            "onnxruntime cpu",
            "cannot",
            "16.0 GB free: end other programs, or edit with --offload text, which takes 15.0 GB",
        ),
        (with_bundle(LAPTOP, memory=15 * 10**9), "onnxruntime cpu", "can run", "this bundle"),
        (
            with_bundle(LAPTOP, precision=FP16, memory=21 * 10**9),
            "onnxruntime cpu",
            "cannot",
            "21.0 GB",
        ),
        (
            with_bundle(LAPTOP, precision=FP16, memory=10**9),
            "onnxruntime cpu",
            "can run",
            "in fp32",
        ),
        (
            replace(with_bundle(LAPTOP, memory=10**12), memory=None),
            "onnxruntime cpu",
            "can run",
            "this bundle",
        ),
        (LAPTOP, "onnxruntime cuda", "cannot", "no NVIDIA GPU was found (nvidia-smi cannot"),
        (SERVER, "onnxruntime cuda", "can run", "GPU's memory"),
        (
            with_bundle(SERVER, precision=BF16),
            "onnxruntime cuda",
            "cannot",
            "--precision fp16",
        ),
        (
            replace(LAPTOP, nvidia=SERVER.nvidia),
            "onnxruntime cuda",
            "cannot",
            f"onnxruntime-gpu is not installed; run {SWAP}",
        ),
        (
            probed(having(SERVER, "onnxruntime"), "onnxruntime", offers=(CPU,)),
            "onnxruntime cuda",
            "cannot",
            f"installed over onnxruntime-gpu; run {SWAP}",
        ),
        (
            probed(SERVER, "onnxruntime", failed={"cuda": "cuDNN is missing"}),
            "onnxruntime cuda",
            "cannot",
            "cuDNN is missing",
        ),
        (
            with_bundle(SERVER, gpu_memory=21 * 10**9),
            "onnxruntime cuda",
            "cannot",
            "21.0 GB of GPU",
        ),
        (with_bundle(SERVER, gpu_memory=19 * 10**9), "onnxruntime cuda", "can run", "this bundle"),
        (
            with_bundle(replace(SERVER, nvidia=Nvidia("570.1", (HOPPER,)))),
            "onnxruntime cuda",
            "can run",
            "this bundle",
        ),
        (LAPTOP, "tensorrt", "cannot", 'run `pip install "varedit-export[tensorrt]"`'),
        (replace(SERVER, nvidia=LAPTOP.nvidia), "tensorrt", "cannot", "there is none"),
        (without(SERVER, "cuda-core"), "tensorrt", "cannot", "run `pip install cuda-core`"),
        (without(with_bundle(SERVER), "onnx"), "tensorrt", "cannot", '"varedit-export[export]"'),
        (
            probed(SERVER, "tensorrt", problem="no libnvinfer"),
            "tensorrt",
            "cannot",
            "no libnvinfer; run `pip install --force-reinstall tensorrt`",
        ),
        (
            with_bundle(SERVER),
            "tensorrt",
            "can compile",
            "this bundle's engines for sm89; run `varedit-export engines bundles/2b --backend "
            "tensorrt`",
        ),
        (SERVER, "tensorrt", "can run", "bundles with engines for this sm89"),
        (with_engines("tensorrt"), "tensorrt", "can run", "this bundle"),
        (with_engines("tensorrt"), "tensorrt-rtx", "can compile", "engines for sm89; run"),
        (with_engines("tensorrt-rtx"), "tensorrt-rtx", "can run", "this bundle"),
        (with_engines("tensorrt", gpu="sm89 another"), "tensorrt", "can compile", "sm89; run"),
        (
            without(with_engines("tensorrt"), "onnx"),
            "tensorrt",
            "can run",
            "this bundle",
        ),
        (with_engines("tensorrt", needing=21), "tensorrt", "cannot", "about 21.0 GB of GPU memory"),
        (
            with_engines("tensorrt", needing=21, offloaded=19),
            "tensorrt",
            "cannot",
            "20.0 GB free: end other programs, or edit with --offload text, which takes 19.0 GB",
        ),
        (LAPTOP, "tensorrt-rtx", "cannot", '"varedit-export[tensorrt-rtx]"'),
        (
            replace(SERVER, nvidia=LAPTOP.nvidia),
            "tensorrt-rtx",
            "can compile",
            "sm75, sm89: name one with --architecture",
        ),
        (
            replace(SERVER, nvidia=Nvidia("570.1", (HOPPER,))),
            "tensorrt-rtx",
            "can compile",
            "sm75, sm89, not sm90, for which there is tensorrt: name one",
        ),
        (
            with_bundle(SERVER),
            "tensorrt-rtx",
            "can compile",
            "bundles/2b --backend tensorrt-rtx --architecture sm89",
        ),
    ],
)
def test_a_verdict_says_why_and_what_helps(
    machine: Machine, backend: str, word: str, said: str
) -> None:
    (verdict,) = (found for found in all_verdicts(machine) if found.backend == backend)
    assert verdict.word == word
    assert said in str(verdict)
    assert str(verdict) in report(machine).splitlines()


@pytest.mark.parametrize("machine", [LAPTOP, SERVER, with_bundle(LAPTOP), with_bundle(SERVER)])
def test_every_backend_has_one_verdict_and_every_line_a_name(machine: Machine) -> None:
    backends = ["onnxruntime cpu", "onnxruntime cuda", "tensorrt", "tensorrt-rtx"]
    assert [verdict.backend for verdict in all_verdicts(machine)] == backends
    assert can_edit(machine)
    assert all(line[:18].strip() for line in report(machine).splitlines() if line)


@pytest.mark.parametrize(
    ("needed", "free", "said"),
    [
        (0, 16 * 10**9, "unknown how much memory editing takes"),
        (0, None, "unknown how much memory editing takes"),
        (10**9, None, "editing takes about 1.0 GB of memory, and it is unknown how much is free"),
        (10**9, 16 * 10**9, "editing fits in memory, about 1.0 GB"),
        (17 * 10**9, 16 * 10**9, "about 17.0 GB of memory are needed and 16.0 GB free: end other "),
    ],
)
def test_memory_that_is_unknown_is_no_promise(needed: int, free: int | None, said: str) -> None:
    machine = replace(with_bundle(LAPTOP, memory=needed), memory=free)
    (line,) = (line for line in report(machine).splitlines() if line.startswith("weights "))
    assert line.startswith(f"weights           8.0 GB: {said}")


def test_offloading_is_not_named_where_it_is_not_enough() -> None:
    machine = with_bundle(LAPTOP, memory=18 * 10**9, offloaded=17 * 10**9)
    assert "--offload" not in report(machine)


def test_nothing_edits_where_compiling_is_all_that_works() -> None:
    assert not can_edit(probed(replace(SERVER, nvidia=LAPTOP.nvidia), "onnxruntime", offers=()))


def test_two_packages_over_each_other_are_told_even_where_one_works() -> None:
    both = having(SERVER, "onnxruntime")
    assert f"installed over each other; run {SWAP}" in report(both)
    assert f"each other; run {SWAP_BACK}" in report(replace(both, nvidia=LAPTOP.nvidia))
    assert "over each other" not in report(SERVER)


def test_what_the_extra_lacks_is_told() -> None:
    lacking = without(SERVER, "torch", "tqdm")
    assert 'without torch, tqdm; run `pip install "varedit-export[export]"`' in report(lacking)


def test_the_extra_is_what_the_project_says() -> None:
    listed = requires("varedit-export") or []
    own = [line for line in listed if re.search("extra == .export.", line)]
    assert sorted(EXPORT) == sorted(re.split(r"[<>]", line)[0] for line in own)


# Engines


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> EngineCache:
    monkeypatch.setattr(engine_set, "data_folder", lambda: tmp_path / "data")
    monkeypatch.setattr(engine_set, "cache_folder", lambda: tmp_path / "cache")
    # The graphs of this bundle are none.
    monkeypatch.setattr(detect, "budget", lambda *_: Budget(10**9, 0, 0))
    return EngineCache(Bundle.open(publish(tmp_path / "bundle")))


def engines_line(cache: EngineCache, machine: Machine = SERVER) -> str:
    """Return the line about the bundle's only engine set."""
    facts = detect_machine(cache.bundle.path).bundle
    lines = report(replace(machine, bundle=facts)).splitlines()
    (line,) = (line for line in lines if line.startswith("engines"))
    return line


@pytest.mark.parametrize(
    ("changed", "machine", "said"),
    [
        ({}, SERVER, ": for this machine"),
        ({"gpu": "sm75+sm89"}, SERVER, ": for this machine"),
        ({"tools": {"tensorrt": "10.9"}}, SERVER, "of tensorrt 10.9, and 11.0 is installed; run"),
        ({}, without(SERVER, "tensorrt"), "of tensorrt 11.0, and none is installed"),
        ({"gpu": "sm75"}, SERVER, "for sm75, and this machine has sm89 NVIDIA RTX 4090; run `"),
        ({}, replace(SERVER, nvidia=LAPTOP.nvidia), "for sm89, and this machine has no GPU"),
        (
            {"gpu": "sm75", "layout": "baked"},
            SERVER,
            "--backend tensorrt --layout baked --variant 64`",
        ),
        (
            {"backend": "tensorrt-rtx", "tools": {"tensorrt-rtx": "1.6"}},
            SERVER,
            "--backend tensorrt-rtx --architecture sm89 --layout external --variant 64`",
        ),
    ],
)
def test_engines_are_compared_with_the_machine(
    cache: EngineCache, changed: dict[str, Any], machine: Machine, said: str
) -> None:
    recipe = cache.recipe("64", STAGES, **{**OF_A_MACHINE, "gpu": "sm89", **changed})
    folder = compile_set(cache, recipe)
    line = engines_line(cache, machine)
    assert said in line and folder.name in line


def cut_a_plan(folder: Path, home: Path) -> None:
    (folder / "condition.plan").write_bytes(b"")


def forget_who_built_it(folder: Path, home: Path) -> None:
    (home / "data").rename(home / "elsewhere")


@pytest.mark.parametrize(
    ("spoil", "said"), [(cut_a_plan, "is damaged"), (forget_who_built_it, "built elsewhere")]
)
def test_engines_that_no_machine_can_use_are_to_be_deleted(
    cache: EngineCache, tmp_path: Path, spoil: Callable[[Path, Path], None], said: str
) -> None:
    recipe = cache.recipe("64", STAGES, **{**OF_A_MACHINE, "gpu": "sm89"})
    folder = compile_set(cache, recipe)
    spoil(folder, tmp_path)
    line = engines_line(cache)
    command = f"varedit-export engines {cache.bundle.path} --backend tensorrt"
    assert said in line and line.endswith(f"run `rm -r {folder}` and `{command}`")


def test_engines_of_another_bundle_are_told(cache: EngineCache, tmp_path: Path) -> None:
    other = EngineCache(Bundle.open(publish(tmp_path / "other", seed=1)))
    folder = compile_set(other, other.recipe("64", STAGES, **OF_A_MACHINE))
    (cache.bundle.path / "engines").mkdir()
    folder.rename(cache.bundle.path / "engines" / folder.name)
    assert "of other graphs" in engines_line(cache)


def test_a_bundle_that_cannot_be_opened_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="there is no bundle"):
        detect_machine(tmp_path / "nowhere")


# Facts


def smi(stdout: str, code: int = 0) -> Callable[..., Any]:
    return lambda command, **_: subprocess.CompletedProcess(command, code, stdout, "")


def timed_out(command: list[str], timeout: float, **_: Any) -> Any:
    raise subprocess.TimeoutExpired(command, timeout)


AVAILABLE = 6 << 30
ROW = "570.1, NVIDIA RTX 4090, 8.9, 22888, 19073\n"


@pytest.mark.parametrize(
    ("run", "found"),
    [
        (smi(ROW), Nvidia("570.1", (replace(ADA, memory=22888 << 20, free=19073 << 20),))),
        (
            smi("570.1, NVIDIA GB10, 12.1, [N/A], [N/A]\n"),
            Nvidia("570.1", (Gpu("NVIDIA GB10", "sm121", None, AVAILABLE),)),
        ),
        (smi("couldn't talk to\nthe driver\n", 9), Nvidia(None, (), "couldn't talk to the driver")),
        (
            smi("540.4.0, Orin (nvgpu), [N/A], [N/A], [N/A]\n"),
            Nvidia("540.4.0", (Gpu("Orin", "sm87", None, AVAILABLE),)),
        ),
        (smi(""), Nvidia(None, (), "nvidia-smi names none")),
        (
            smi("570.1, \x1b[2J, 8.9, 22888, 19073\n"),
            Nvidia("570.1", (replace(ADA, name="\\x1b[2J", memory=22888 << 20, free=19073 << 20),)),
        ),
        (timed_out, Nvidia(None, (), "nvidia-smi gave no answer in 10 s")),
    ],
)
def test_gpus_come_from_nvidia_smi(
    run: Any, found: Nvidia, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An integrated GPU has the system's memory; the one of JetPack 6 is known to CUDA alone."""

    class Device:
        def __init__(self) -> None:
            if not any(gpu.name == "Orin" for gpu in found.gpus):
                raise RuntimeError("CUDA_ERROR_NO_DEVICE")

        name, compute_capability = "Orin", (8, 7)
        properties = SimpleNamespace(integrated=True)

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(host, "available_memory", lambda: AVAILABLE)
    monkeypatch.setitem(sys.modules, "cuda.core", SimpleNamespace(Device=Device))
    assert nvidia() == found


def test_without_nvidia_smi_there_is_a_statement(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert nvidia() == Nvidia(None, (), "nvidia-smi cannot be run: No such file or directory")


def test_a_provider_that_loads_no_graph_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(name: str, graph: bytes, folder: Path, provider: str, threads: int) -> Session:
        if provider == "cuda":
            raise BackendError("no\ncuDNN")
        return Session(name, graph, folder, provider, threads)

    assert failed_providers((CPU,)) == {}
    monkeypatch.setattr(onnx_backend, "check_provider", lambda _: None)
    monkeypatch.setattr(onnx_backend, "Session", load)
    assert failed_providers((CUDA, CPU)) == {"cuda": "no cuDNN"}


def test_a_module_that_cannot_be_imported_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tensorrt.py").write_text("raise OSError('libnvinfer.so: cannot open')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "tensorrt", raising=False)
    assert detect_machine().probe("tensorrt") == ProbeResult("libnvinfer.so: cannot open")


def test_this_machine_can_edit() -> None:
    result = CliRunner().invoke(main, ["doctor"])
    assert result.exit_code == 0, result.output
    assert "onnxruntime cpu   can run" in result.output
    memory = available_memory()
    assert memory is None or memory > 10**8


@pytest.mark.parametrize(
    ("publishing", "code", "said"),
    [
        (publish, 0, "yes"),
        (publish_random, 1, "no: its weights are random"),
        (publish_textless, 1, "no: it has no text encoder"),
    ],
)
def test_a_bundle_that_cannot_edit_is_told(
    publishing: Callable[[Path], Path], code: int, said: str, tmp_path: Path
) -> None:
    result = CliRunner().invoke(main, ["doctor", str(publishing(tmp_path / "bundle"))])
    assert f"edits pictures    {said}" in result.output.splitlines()
    assert "onnxruntime cpu   can run: this bundle" in result.output
    assert result.exit_code == code


def test_it_works_with_what_editing_needs_alone(tmp_path: Path) -> None:
    """Neither PyTorch nor TensorRT, then not even ONNX Runtime."""
    code = """if True:
        import sys
        sys.modules.update(dict.fromkeys(sys.argv.pop().split(",")))
        from varedit_export.cli import main
        main()
        """
    absent = "torch,onnx,transformers,safetensors,tensorrt,tensorrt_rtx"
    for missing, exit_code in ((absent, 0), (f"{absent},onnxruntime", 1)):
        command = [sys.executable, "-c", code, "doctor", missing]
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
        assert (done.returncode, done.stderr) == (exit_code, "")
        assert "tensorrt          cannot" in done.stdout

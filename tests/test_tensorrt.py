"""What only plain TensorRT does, with a fake of it."""

import errno
import sys
from pathlib import Path
from threading import Thread
from typing import Any, NoReturn, get_args

import fake_tensorrt
import pytest
import tensorrt_lean_bindings
from click.testing import CliRunner
from fake_bundles import publish
from fake_tensorrt import RTX, BuilderConfig, TimingCache
from filelock import FileLock

from varedit_engines import compile_set, engine_compiler, timing_cache
from varedit_engines.compile_set import CompileJob
from varedit_engines.engine_compiler import EngineCompiler, Flags, Hardware
from varedit_engines.timing_cache import kept_timings, timings_file
from varedit_export.cli import main
from varedit_runtime.backends.engines.import_tensorrt import EngineKind
from varedit_runtime.bundle import Bundle
from varedit_runtime.errors import BackendError, ConfigError

LEAN: Any = tensorrt_lean_bindings


@pytest.fixture(autouse=True)
def trt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Replace TensorRT by the fake, on a machine with a GPU."""
    module = fake_tensorrt.fake_tensorrt()
    monkeypatch.setitem(sys.modules, "tensorrt", module)
    monkeypatch.setattr(engine_compiler, "this_gpu", lambda backend: "sm90 NVIDIA H100")
    monkeypatch.setattr(timing_cache, "cache_folder", lambda: tmp_path / "cache")
    return module


def compile_graph(kernel: str, *flags: Flags) -> memoryview:
    compiler = EngineCompiler("tensorrt", (), *flags)
    return compiler.compile("graph", kernel.encode(), Path(), [], lambda *progress: None).plan


@pytest.mark.parametrize(
    ("fake", "real"),
    [
        (BuilderConfig(), RTX.IBuilderConfig),
        (TimingCache("", {}), RTX.ITimingCache),
        (TimingCache("", {}), LEAN.ITimingCache),
    ],
)
def test_the_fake_has_no_name_that_the_real_one_lacks(fake: Any, real: Any) -> None:
    names = {name for name in dir(fake) if name[0] != "_"}
    assert names - {"gpu", "refused", "timings"} <= set(dir(real))


@pytest.mark.parametrize(
    "name", ["BuilderFlag", "HardwareCompatibilityLevel", "MemoryPoolType", "ProfilingVerbosity"]
)
def test_the_real_tensorrt_has_the_settings_under_the_same_names(name: str) -> None:
    """All but the flag that only TensorRT for RTX is given."""
    names = set(getattr(RTX, name).__members__) - {"REQUIRE_USER_ALLOCATION"}
    assert names == set(getattr(LEAN, name).__members__)


# Flags


LEVELS = RTX.HardwareCompatibilityLevel
TF32, VERSION_COMPATIBLE = RTX.BuilderFlag.TF32, RTX.BuilderFlag.VERSION_COMPATIBLE


@pytest.mark.parametrize(
    ("flags", "tf32", "version", "hardware"),
    [
        (Flags(), False, False, LEVELS.NONE),
        (Flags(tf32=True), True, False, LEVELS.NONE),
        (Flags(version_compatible=True), False, True, LEVELS.NONE),
        (Flags(hardware_compatible="ampere-plus"), False, False, LEVELS.AMPERE_PLUS),
        (
            Flags(hardware_compatible="same-compute-capability"),
            False,
            False,
            LEVELS.SAME_COMPUTE_CAPABILITY,
        ),
    ],
)
def test_engines_are_compiled_with_the_flags_asked_for(
    trt: Any, flags: Flags, tf32: bool, version: bool, hardware: Any
) -> None:
    compile_graph("a", flags)
    (config,) = trt.Builder.configs
    assert (config.get_flag(TF32), config.get_flag(VERSION_COMPATIBLE)) == (tf32, version)
    assert config.hardware_compatibility_level == hardware


@pytest.mark.parametrize("flags", [Flags(), Flags(aux_streams=3)])
def test_engines_run_on_one_stream_unless_asked(trt: Any, flags: Flags) -> None:
    compile_graph("a", flags)
    (config,) = trt.Builder.configs
    assert config.max_aux_streams == flags.aux_streams


@pytest.mark.parametrize("count", [-1, 65, 1.0, None, True])
def test_a_number_of_streams_that_is_none_is_refused(count: Any) -> None:
    with pytest.raises(ConfigError, match=r"aux_streams is .*; give an integer"):
        Flags(aux_streams=count)


def test_engines_with_other_flags_are_other_engines(tmp_path: Path) -> None:
    asked = [
        *(Flags(), Flags(tf32=True), Flags(version_compatible=True), Flags(optimisation=3)),
        Flags(aux_streams=2),
        *(Flags(hardware_compatible=level) for level in get_args(Hardware)),
    ]
    bundle = Bundle.open(publish(tmp_path / "bundle"))
    keys = {
        CompileJob(bundle, "external", EngineCompiler("tensorrt", (), flags)).recipe.key
        for flags in asked
    }
    assert len(keys) == len(asked)


@pytest.mark.parametrize(
    "flags", [Flags(version_compatible=True), Flags(hardware_compatible="ampere-plus")]
)
def test_rtx_has_architectures_in_place_of_compatibility(flags: Flags) -> None:
    with pytest.raises(ConfigError, match="--architecture"):
        EngineCompiler("tensorrt-rtx", ["sm89"], flags)


def test_an_unknown_compatibility_is_refused() -> None:
    with pytest.raises(ConfigError, match="give one of ampere-plus, same-compute-capability"):
        Flags(hardware_compatible="turing-plus")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "flags"),
    [
        ((), {"tf32": "False", "version_compatible": "False", "hardware_compatible": "None"}),
        (("--tf32", "--version-compatible"), {"tf32": "True", "version_compatible": "True"}),
        (("--hardware-compatible", "ampere-plus"), {"hardware_compatible": "ampere-plus"}),
        (("--workspace", "2", "--optimisation", "1"), {"workspace": "2000000"}),
        (("--aux-streams", "2"), {"aux_streams": "2"}),
    ],
)
def test_the_command_records_the_flags(
    options: tuple[str, ...], flags: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs: list[CompileJob] = []

    def stop(job: CompileJob, *rest: Any) -> NoReturn:
        jobs.append(job)
        raise BackendError("not compiled")

    monkeypatch.setattr(compile_set, "compile_engine_set", stop)
    CliRunner().invoke(main, ["engines", str(publish(tmp_path / "bundle")), *options])
    (job,) = jobs
    assert flags.items() <= job.recipe.flags.items()


def test_the_command_refuses_compatibility_with_rtx() -> None:
    arguments = ["engines", "bundle", "--backend", "tensorrt-rtx", "--architecture", "sm89"]
    result = CliRunner().invoke(main, [*arguments, "--version-compatible"])
    assert result.exit_code == 1 and "no version- or hardware-compatible engines" in result.stderr


# Timings


def kept() -> dict[str, int]:
    config = BuilderConfig()
    timings = config.create_timing_cache(timings_file("11.0", "sm90 NVIDIA H100").read_bytes())
    assert timings
    return timings.timings


def test_what_was_measured_is_not_measured_again(trt: Any, tmp_path: Path) -> None:
    plans = [compile_graph(kernel) for kernel in ("a", "b", "a")]
    assert plans == [b"plan of a", b"plan of b", b"plan of a"]
    assert trt.Builder.measured == ["a", "b"] and kept().keys() == {"a", "b"}
    file = tmp_path / "cache" / "timings" / "tensorrt-11.0-sm90_NVIDIA_H100"
    found = sorted(path for path in tmp_path.rglob("*") if path.is_file())
    assert found == [file, file.with_name(f"{file.name}.lock")]


def test_other_versions_and_architectures_have_timings_of_their_own(
    trt: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    compile_graph("a")
    monkeypatch.setattr(trt, "__version__", "11.1")
    compile_graph("a")
    monkeypatch.setattr(engine_compiler, "this_gpu", lambda backend: "sm89 NVIDIA L4")
    compile_graph("a")
    assert trt.Builder.measured == ["a"] * 3


@pytest.mark.parametrize("content", [b"", b"torn", TimingCache("A100", {"a": 1}).serialize()])
def test_timings_that_are_damaged_or_of_another_gpu_are_begun_afresh(
    trt: Any, content: bytes
) -> None:
    path = timings_file("11.0", "sm90 NVIDIA H100")
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
    assert compile_graph("a") and compile_graph("a")
    assert trt.Builder.measured == ["a"] and kept() == {"a": 1}


def test_two_builds_at_once_keep_what_both_measured() -> None:
    path, one, two = timings_file("11.0", "sm90 NVIDIA H100"), BuilderConfig(), BuilderConfig()
    with kept_timings(one, path):
        with kept_timings(two, path):
            measure(two, "b")
        assert kept() == {"b": 1}
        measure(one, "a")
    assert kept() == {"a": 1, "b": 1}


def lock_of(path: Path) -> Path:
    return path.with_name(f"{path.name}.lock")


def test_a_build_that_ends_waits_for_one_that_writes() -> None:
    compile_graph("a")
    path = timings_file("11.0", "sm90 NVIDIA H100")
    with FileLock(lock_of(path)):
        build = Thread(target=compile_graph, args="b")
        build.start()
        build.join(0.2)
        assert build.is_alive() and kept() == {"a": 1}
    build.join()
    assert kept() == {"a": 1, "b": 1}


def measure(config: BuilderConfig, kernel: str) -> None:
    timings = config.get_timing_cache()
    assert timings
    timings.timings[kernel] = 1


def test_without_a_place_for_timings_graphs_compile(trt: Any, tmp_path: Path) -> None:
    (tmp_path / "cache").write_bytes(b"no folder")
    assert compile_graph("a") == compile_graph("a") == b"plan of a"
    assert trt.Builder.measured == ["a", "a"]


def test_timings_that_cannot_be_written_whole_leave_the_earlier_ones(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def full(path: Path, data: bytes) -> NoReturn:
        original(path, data[:3])
        raise OSError(errno.ENOSPC, "no space")

    compile_graph("a")
    original = Path.write_bytes
    monkeypatch.setattr(Path, "write_bytes", full)
    assert compile_graph("b") == b"plan of b"
    assert kept() == {"a": 1}
    path = timings_file("11.0", "sm90 NVIDIA H100")
    assert set(path.parent.iterdir()) == {path, lock_of(path)}


def test_tensorrt_for_rtx_is_asked_for_no_timings(monkeypatch: pytest.MonkeyPatch) -> None:
    """TensorRT would need a GPU for them, and warns."""
    module = fake_tensorrt.fake_tensorrt()
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", module)
    compiler = EngineCompiler("tensorrt-rtx", ["sm89"])
    compiler.compile("graph", b"a", Path(), [], lambda *progress: None)
    (config,) = module.Builder.configs
    assert config.get_timing_cache() is None


def test_an_architecture_that_is_not_taken_is_an_error(
    trt: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TensorRT returns False, and would compile for architectures of its own choice."""
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", trt)
    monkeypatch.setattr(BuilderConfig, "refused", (RTX.ComputeCapability.SM120,))
    compiler = EngineCompiler("tensorrt-rtx", ["sm89", "sm120"])
    with pytest.raises(BackendError, match=r"tensorrt-rtx 11.0 does not compile for sm120: no rea"):
        compiler.compile("graph", b"a", Path(), [], lambda *progress: None)
    assert trt.Builder.configs == []


@pytest.mark.parametrize(("kind", "required"), [("tensorrt-rtx", True), ("tensorrt", False)])
def test_engines_of_rtx_can_be_captured(
    trt: Any, kind: EngineKind, required: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TensorRT promises this only for engines that allocate no memory themselves."""
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", trt)
    named = ["sm89"] if kind == "tensorrt-rtx" else []
    EngineCompiler(kind, named).compile("graph", b"a", Path(), [], lambda *progress: None)
    (config,) = trt.Builder.configs
    assert config.get_flag(RTX.BuilderFlag.REQUIRE_USER_ALLOCATION) == required

"""How ONNX Runtime describes itself as a backend: on the CPU, or on a GPU by its CUDA provider."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from varedit_runtime.backends.machine import Machine, ProbeResult
from varedit_runtime.backends.onnxruntime.options import PROVIDERS, OnnxRuntimeOptions
from varedit_runtime.backends.spec import (
    BackendSpec,
    Verdict,
    commands_hint,
    too_little,
    try_import,
)
from varedit_runtime.errors import VareditError, one_line
from varedit_runtime.locate import embedded

if TYPE_CHECKING:
    from varedit_runtime.backends.onnxruntime.backend import OnnxBackend
    from varedit_runtime.bundle import Bundle
    from varedit_runtime.manifest import Variant

CPU, CUDA = "onnxruntime cpu", "onnxruntime cuda"
WHOLE_BYTES = "whole bytes"  # a probe's name for exact products of 8-bit integers
TO_GPU = (
    "pip uninstall onnxruntime",
    'pip install --force-reinstall "onnxruntime-gpu[cuda,cudnn]"',
)
TO_CPU = ("pip uninstall onnxruntime-gpu", "pip install --force-reinstall onnxruntime")


class OnnxRuntime(BackendSpec[OnnxRuntimeOptions]):
    """Runs a bundle's graphs as they are."""

    name = "onnxruntime"
    options = OnnxRuntimeOptions
    packages = ("onnxruntime", "onnxruntime-gpu")

    def probe(self) -> ProbeResult:
        """Return the providers that ONNX Runtime names, and those of ours that do not work."""
        module = try_import("onnxruntime")
        if isinstance(module, str):
            return ProbeResult(module)
        from varedit_runtime.backends.onnxruntime.integers import INEXACT, exact

        available = tuple(module.get_available_providers())
        failed = failed_providers(available)
        return ProbeResult("", available, failed if exact() else failed | {WHOLE_BYTES: INEXACT})

    def report(self, machine: Machine) -> Iterator[tuple[str, str]]:
        yield from super().report(machine)
        if _both(machine):
            fix = commands_hint(TO_GPU if machine.nvidia.gpus else TO_CPU)
            yield "", f"onnxruntime and onnxruntime-gpu are installed over each other{fix}"
        yield "providers", ", ".join(machine.probe(self.name).offers) or "none"

    def verdicts(self, machine: Machine) -> Sequence[Verdict]:
        return self._cpu(machine), self._cuda(machine)

    def open(
        self, bundle: "Bundle", variant: "Variant", options: OnnxRuntimeOptions
    ) -> "OnnxBackend":
        from varedit_runtime.backends.onnxruntime.backend import OnnxBackend

        return OnnxBackend(bundle, variant, options)

    def _cpu(self, machine: Machine) -> Verdict:
        if why := self._absent(machine) or machine.probe(self.name).failed.get("cpu"):
            fix = TO_CPU if _both(machine) else ("pip install --force-reinstall onnxruntime",)
            return Verdict(CPU, "cannot", why, fix)
        bundle, inexact = machine.bundle, machine.probe(self.name).failed.get(WHOLE_BYTES)
        if bundle is None:
            kinds = f"fp32 or {'int7' if inexact else 'int8'}"
            return Verdict(CPU, "can run", f"bundles in {kinds} that fit in memory")
        if bundle.precision.whole_bytes and inexact:
            return Verdict(CPU, "cannot", f"{inexact}: build with --precision int7")
        if not bundle.precision.onnxruntime:
            why = f"CPUs do not compute {bundle.precision.name}: build with --precision fp32"
            return Verdict(CPU, "cannot", why)
        if why := too_little(machine.memory, bundle.memory, "memory", bundle.offloaded):
            return Verdict(CPU, "cannot", why)
        if bundle.precision.for_engines:
            return Verdict(CPU, "can run", "this bundle, to check it: no CPU computes it fast")
        if bundle.precision.cpu_growth > 1:
            less = "this bundle, in fp32: --precision fp32 takes less memory"
            return Verdict(CPU, "can run", less)
        return Verdict(CPU, "can run", "this bundle")

    def _cuda(self, machine: Machine) -> Verdict:
        gpus, probe = machine.nvidia.gpus, machine.probe(self.name)
        if not gpus:
            return Verdict(CUDA, "cannot", f"no NVIDIA GPU was found ({machine.nvidia.problem})")
        if why := self._absent(machine):
            return Verdict(CUDA, "cannot", why, TO_GPU)
        if PROVIDERS["cuda"] not in probe.offers:
            both = "onnxruntime is installed over onnxruntime-gpu"
            why = both if _both(machine) else "onnxruntime-gpu is not installed"
            return Verdict(CUDA, "cannot", why, TO_GPU)
        if why := probe.failed.get("cuda"):
            return Verdict(CUDA, "cannot", why, TO_GPU if _both(machine) else ())
        if machine.bundle is None:
            return Verdict(CUDA, "can run", "bundles that fit in the GPU's memory")
        if not machine.bundle.precision.onnxruntime:
            name = machine.bundle.precision.name
            why = f"it runs no {name}: build with --precision fp16, or engines"
            return Verdict(CUDA, "cannot", why)
        if why := machine.bundle.precision.no_cuda:
            return Verdict(CUDA, "cannot", why)
        most_free = max((gpu.free for gpu in gpus if gpu.free is not None), default=None)
        if why := too_little(most_free, machine.bundle.gpu_memory, "GPU memory"):
            return Verdict(CUDA, "cannot", why)
        return Verdict(CUDA, "can run", "this bundle")

    def _absent(self, machine: Machine) -> str | None:
        probe = machine.probe(self.name)
        if probe.problem:
            return f"onnxruntime cannot be imported ({probe.problem})"
        return None if probe.offers else "onnxruntime is not installed"


def failed_providers(available: Sequence[str]) -> dict[str, str]:
    """Encode a picture with nano on each provider: one that is named may lack its libraries.

    Return those of "cpu" and "cuda" that are available and cannot, and why.
    """
    from varedit_runtime.bundle import Bundle

    nano = Bundle.open(embedded())
    failed: dict[str, str] = {}
    for provider, name in PROVIDERS.items():
        if name in available:
            try:
                _encode_picture(nano, provider)
            except VareditError as error:
                failed[provider] = one_line(error)
    return failed


def _encode_picture(bundle: "Bundle", provider: str) -> None:
    """Run the image encoder: cuDNN is looked for by the first convolution, not by a session."""
    from varedit_runtime.backends.onnxruntime.backend import Buffer, Session, check_provider
    from varedit_runtime.backends.wiring import ENCODER, sized

    check_provider(provider)
    variant = bundle.manifest.variants[0]
    graph = variant.graph(ENCODER)
    data = bundle.graph_bytes(variant.name, ENCODER)
    session = Session(ENCODER, data, bundle.graphs_folder, provider, threads=1)
    (picture,), (tokens,) = (
        [Buffer(sized(spec, {"batch": 1}), spec.dtype, provider) for spec in specs]
        for specs in (graph.inputs, graph.outputs)
    )
    picture.fill(0)
    session.run({"pictures": picture.part()}, {"source_tokens": tokens.part()})


def _both(machine: Machine) -> bool:
    return {"onnxruntime", "onnxruntime-gpu"} <= machine.packages.keys()


ONNXRUNTIME = OnnxRuntime()

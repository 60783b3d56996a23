"""How TensorRT and TensorRT for RTX describe themselves as backends that run compiled engines.

TensorRT compiles for the GPU it runs on, TensorRT for RTX for named architectures anywhere.
"""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from varedit_runtime.backends.engines.import_tensorrt import (
    MODULES,
    RTX,
    EngineKind,
    rtx_architectures,
    too_old,
    unseen_library,
)
from varedit_runtime.backends.machine import EngineSetFacts, Gpu, Machine, ProbeResult
from varedit_runtime.backends.spec import (
    BackendSpec,
    OffloadOptions,
    Verdict,
    install_command,
    option,
    too_little,
    try_import,
)
from varedit_runtime.errors import BackendError

if TYPE_CHECKING:
    from varedit_runtime.backends.engines.backend import EngineBackend
    from varedit_runtime.bundle import Bundle
    from varedit_runtime.manifest import Variant


@dataclass(frozen=True)
class EngineBackendOptions(OffloadOptions):
    """Which engines are loaded; they are native code.

    engines_digest: the digest of the engine set to load, published by whoever compiled it.
    trust_engines: load engines that were compiled elsewhere without such a digest.
    """

    engines_digest: str | None = option(
        None, "Digest of an engine set that was compiled on another machine.", "SHA256"
    )
    trust_engines: bool = option(
        False, "Run engines from other machines without a digest: they are native code."
    )


class EngineSpec(BackendSpec[EngineBackendOptions]):
    """Runs engines that were compiled for this machine's GPU."""

    options = EngineBackendOptions
    compiles = True
    kind: EngineKind

    def probe(self) -> ProbeResult:
        """Import the library and return the architectures that TensorRT for RTX compiles for."""
        module = try_import(MODULES[self.kind])
        if isinstance(module, str):
            return ProbeResult(module or unseen_library(self.kind))
        if outdated := too_old(self.kind, module):
            return ProbeResult(outdated)
        return ProbeResult(offers=tuple(rtx_architectures(module)) if self.kind == RTX else ())

    def verdicts(self, machine: Machine) -> Sequence[Verdict]:
        return (self._absent(machine) or self._verdict(machine),)

    def open(
        self, bundle: "Bundle", variant: "Variant", options: EngineBackendOptions
    ) -> "EngineBackend":
        if why := bundle.manifest.policy.no_gpu:
            raise BackendError(
                f"{bundle.path} can have no engines: {why}, or use --backend onnxruntime"
            )
        from varedit_runtime.backends.engines.backend import open_engines

        trusted = options.engines_digest, options.trust_engines
        return open_engines(bundle, variant, self.kind, *trusted, options.offload)

    def compile_command(self, machine: Machine) -> str | None:
        """Return the command that compiles the bundle's engines for the GPU in use, if any can."""
        if not (gpu := self._gpu(machine)):
            return None
        path = "BUNDLE" if machine.bundle is None else shlex.quote(str(machine.bundle.path))
        named = f" --architecture {gpu.architecture}" if self.kind == RTX else ""
        return f"varedit-export engines {path} --backend {self.name}{named}"

    def _gpu(self, machine: Machine) -> Gpu | None:
        """Return the GPU in use, which is the first one, if engines can be compiled for it."""
        return next(iter(machine.nvidia.gpus), None)

    def _elsewhere(self, machine: Machine) -> Verdict:
        """Judge where engines cannot be compiled for the GPU in use."""
        why = f"it compiles for the GPU it runs on, and there is none ({machine.nvidia.problem})"
        return Verdict(self.name, "cannot", why)

    def _absent(self, machine: Machine) -> Verdict | None:
        why = machine.probe(self.name).problem
        if self.name in machine.packages:
            again = (f"pip install --force-reinstall {self.name}",)
            return Verdict(self.name, "cannot", why, again) if why else None
        if why:  # the system has it
            return Verdict(self.name, "cannot", why)
        return Verdict(self.name, "cannot", "it is not installed", (install_command(self.name),))

    def _verdict(self, machine: Machine) -> Verdict:
        gpu = self._gpu(machine)
        architecture = "" if gpu is None else gpu.architecture
        if machine.bundle and (why := machine.bundle.precision.not_on(architecture)):
            return Verdict(self.name, "cannot", why)
        if gpu is None:
            return self._elsewhere(machine)
        for name in ("cuda-core", "cuda-bindings"):
            if name not in machine.packages:
                why = f"{name}, which reaches the GPU, is not installed"
                return Verdict(self.name, "cannot", why, (f"pip install {name}",))
        if machine.bundle is None:
            what = f"bundles with engines for this {gpu.architecture}"
            return Verdict(self.name, "can run", what)
        own = [e for e in machine.bundle.engines if e.recipe and e.recipe.backend == self.name]
        fitting = [engines for engines in own if unfit(machine, engines) is None]
        if not fitting:
            what = f"this bundle's engines for {gpu.architecture}"
            return self._compiles(machine, what, self.compile_command(machine))
        least = min(fitting, key=lambda engines: engines.gpu_memory)
        offloaded = min(engines.offloaded for engines in fitting)
        if why := too_little(gpu.free, least.gpu_memory, "GPU memory", offloaded):
            return Verdict(self.name, "cannot", why)
        return Verdict(self.name, "can run", "this bundle")

    def _compiles(self, machine: Machine, what: str, command: str | None = None) -> Verdict:
        """Judge whether engines can be compiled; onnx is needed for that, and not to run them."""
        if "onnx" not in machine.packages:
            return Verdict(
                self.name, "cannot", "onnx is not installed", (install_command("export"),)
            )
        return Verdict(self.name, "can compile", what, () if command is None else (command,))


class TensorRT(EngineSpec):
    """TensorRT, which compiles for the GPU it runs on."""

    name = "tensorrt"
    packages = ("tensorrt",)
    kind = "tensorrt"


class TensorRTForRTX(EngineSpec):
    """TensorRT for RTX, which compiles for named architectures, without a GPU too."""

    name = "tensorrt-rtx"
    packages = ("tensorrt-rtx",)
    kind = "tensorrt-rtx"

    def _gpu(self, machine: Machine) -> Gpu | None:
        gpu, known = super()._gpu(machine), machine.probe(self.name).offers
        return gpu if gpu and gpu.architecture in known else None

    def _elsewhere(self, machine: Machine) -> Verdict:
        bundle, gpus = machine.bundle, machine.nvidia.gpus
        offers = machine.probe(self.name).offers
        known = ", ".join(sm for sm in offers if not (bundle and bundle.precision.not_on(sm)))
        here = "".join(f", not {gpu.architecture}, for which there is tensorrt" for gpu in gpus)
        return self._compiles(machine, f"{known}{here}: name one with --architecture")


def unfit(machine: Machine, engines: EngineSetFacts) -> str | None:
    """Return why engines are not for this machine; None where they are."""
    from varedit_runtime.backends.engines.engine_set import why_unusable

    if engines.recipe is None:
        return engines.problem
    gpus = [f"{gpu.architecture} {gpu.name}" for gpu in machine.nvidia.gpus[:1]]  # which is used
    return why_unusable(engines.recipe, machine.packages, gpus)


TENSORRT, TENSORRT_RTX = TensorRT(), TensorRTForRTX()

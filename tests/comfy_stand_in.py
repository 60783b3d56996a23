"""Stand-ins of ComfyUI's modules, which nobody can install."""

import sys
from types import ModuleType, SimpleNamespace
from typing import Any


class _Put:
    """An input or output of a schema, as it was described."""

    def __init__(self, *names: str, **said: Any) -> None:
        self.names, self.said = names, said


class _Type:
    Input, Output = _Put, _Put


class ComfyNode:
    pass


class ComfyExtension:
    pass


class Interrupted(Exception):
    pass


class Screen:
    """What ComfyUI shows. told: of progress, the value, the maximum and the preview."""

    def __init__(self) -> None:
        self.told: list[tuple[float, float, Any]] = []

    def bar(self, total: int) -> SimpleNamespace:
        """Return a ProgressBar."""

        def update(value: int, preview: Any = None) -> None:
            bar.current = value
            self.show(value, total, preview)

        bar = SimpleNamespace(current=0, update_absolute=update)
        return bar

    def show(self, value: int, total: int, preview: Any) -> None:
        self.told.append((value, total, preview))


def modules(screen: Screen) -> dict[str, ModuleType]:
    """Return the modules by name. `comfy.model_management.interrupted` is what a user sets."""
    names = ("comfy_api", "comfy_api.latest", "comfy", "comfy.model_management", "comfy.utils")
    made = {name: ModuleType(name) for name in names}
    management = made["comfy.model_management"]

    def throw() -> None:
        if management.interrupted:
            raise Interrupted

    types = {name: _Type for name in ("Image", "Mask", "String", "Int", "Float", "Combo")}
    vars(made["comfy_api.latest"]).update(
        io=SimpleNamespace(
            **types,
            Custom=lambda name: _Type,
            ComfyNode=ComfyNode,
            Schema=SimpleNamespace,
            NodeOutput=lambda *args: args,
        ),
        ComfyExtension=ComfyExtension,
    )
    vars(management).update(
        interrupted=False,
        processing_interrupted=lambda: management.interrupted,
        throw_exception_if_processing_interrupted=throw,
    )
    vars(made["comfy"])["model_management"] = management
    vars(made["comfy.utils"])["ProgressBar"] = screen.bar
    return made


def install(monkeypatch: Any, screen: Screen) -> ModuleType:
    """Let the modules be imported; return `comfy.model_management`."""
    for name, module in (made := modules(screen)).items():
        monkeypatch.setitem(sys.modules, name, module)
    return made["comfy.model_management"]

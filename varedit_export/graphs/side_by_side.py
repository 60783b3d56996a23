"""Make patterns side by side: tracing is Python, of which a process runs on one core alone.

A build waits most for torch.onnx, which traces ten templates one after the other. So other
processes take some of them. Each makes the patterns of all graphs of a template and keeps them in
the cache (`patterns.py`), where the build finds them:

    the build    weights, text_encoder, image_encoder, condition, prefill, scale_00, scale_01 ...
    a process    imports, image_decoder, last_scale, middle_scale ...

They begin with what the build needs last; what none has begun when it is needed, the build makes.
Where a process fails or ends, the build makes the pattern as well, and tells what is wrong with it.
"""

import os
import pickle
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from queue import SimpleQueue
from subprocess import DEVNULL, PIPE, Popen

import torch

from varedit_export.graphs.patterns import is_missing
from varedit_export.graphs.stages import Stage
from varedit_export.graphs.trace import Tracer, fake_tensors
from varedit_export.graphs.variant_graphs import GraphPlan, VariantShapes

# -P: modules are not looked for in the working folder, which others may write to.
COMMAND = (sys.executable, "-P", "-m", "varedit_export.graphs.side_by_side")
MOST = 4  # processes: with more, the longest template is still traced when all else is done
MEMORY = 450 * 10**6  # bytes of a process, most of them for PyTorch and onnxscript


class SideBySide:
    """A context in which other processes make patterns.

    variants: what each is made from, and its graphs in the order in which they will be needed.
    memory: bytes that the processes may take together. There are as many as this process would use
    further threads: none if it uses one.
    """

    def __init__(
        self, variants: Iterable[tuple[VariantShapes, Sequence[GraphPlan]]], memory: int
    ) -> None:
        self._stages = {
            plan.stage: shapes
            for shapes, graphs in variants
            for plan in graphs
            if is_missing(plan.stage, plan.binding)
        }
        self._count = min(others(len(self._stages)), memory // MEMORY)
        self._processes: list[Popen[bytes]] = []
        self._idle = SimpleQueue[Popen[bytes]]()
        self._tasks: dict[Stage, Future[None]] = {}

    def __enter__(self) -> "SideBySide":
        with suppress(OSError):  # there are too many processes
            for _ in range(self._count):
                self._processes.append(_started())
                self._idle.put(self._processes[-1])
        if self._processes:
            self._pool = ThreadPoolExecutor(len(self._processes))
            for stage, shapes in reversed(self._stages.items()):
                self._tasks[stage] = self._pool.submit(self._make, shapes, stage.name)
        return self

    def __exit__(self, *error: object) -> None:
        if self._processes:
            self._pool.shutdown(wait=False, cancel_futures=True)
        for process in self._processes:
            process.kill()
            process.wait()

    def wait(self, stage: Stage) -> None:
        """Return when no other process makes patterns of a stage, and none will."""
        task = self._tasks.pop(stage, None)
        if task is not None and not task.cancel():
            task.exception()

    def _make(self, shapes: VariantShapes, template: str) -> None:
        process = self._idle.get()
        assert process.stdin is not None and process.stdout is not None
        try:
            process.stdin.write(pickle.dumps((shapes, template)))
            process.stdin.flush()
            process.stdout.read(1)
        finally:
            self._idle.put(process)


def others(templates: int) -> int:
    """Return how many other processes take part in tracing templates, if memory allows."""
    return max(min(torch.get_num_threads() - 1, MOST, templates - 1), 0)


def _started() -> Popen[bytes]:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return Popen(COMMAND, stdin=PIPE, stdout=PIPE, stderr=DEVNULL, env=environment)


def make(shapes: VariantShapes, template: str) -> None:
    """Make the patterns of all graphs that are made from a template, and keep them."""
    fake = fake_tensors()
    tracer = Tracer(fake, {})
    for plan in shapes.graphs(fake):
        if plan.stage.name == template:
            tracer.pattern(plan.stage, plan.binding)


def main() -> None:
    """Make patterns of the templates that come in, and answer a byte for each, until the end."""
    with suppress(EOFError):
        while True:
            make(*pickle.load(sys.stdin.buffer))
            sys.stdout.buffer.write(b"\n")
            sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()

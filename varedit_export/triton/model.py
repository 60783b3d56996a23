"""Edit pictures in Triton's Python backend, with the bundle beside this file.

`varedit-export triton` copies this file. Triton imports it in a process of its own, where
varedit-export has to be installed, and calls it from one thread.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as triton  # pyright: ignore[reportMissingImports]: Triton's own

from varedit_runtime import Editor, EditResult, PreparedEdit, Progress
from varedit_runtime.errors import ConfigError, EditCancelled, PictureError, TextError, reason
from varedit_runtime.pictures import encode_picture


def _text(value: bytes) -> str | None:
    try:
        return value.decode() or None
    except UnicodeDecodeError as error:
        raise TextError("the instruction is not in UTF-8") from error


def _numbers(value: np.ndarray) -> float | list[float]:
    return float(value[0]) if len(value) == 1 else value.tolist()


# How a row of an input becomes an argument of `Editor.prepare`. Empty texts and masks are None.
ARGUMENTS: dict[str, Callable[[np.ndarray], Any]] = {
    "image": lambda row: row[0],
    "prompt": lambda row: _text(row[0]) or "",
    "negative_prompt": lambda row: _text(row[0]),
    "mask": lambda row: row[0] or None,
    "guidance_scale": _numbers,
    "temperature": _numbers,
    "seed": lambda row: int(row[0]),
}


@dataclass
class _Job:
    """A request: its edits, one for each row, and in the end the response."""

    request: Any
    edits: Sequence[PreparedEdit] = ()
    response: Any = None

    def fail(self, error: Exception) -> None:
        """Respond with an error: in full if the request is at fault, else for the log alone."""
        message, code = "the edit failed: the server's log says why", triton.TritonError.INTERNAL
        if isinstance(error, PictureError | TextError | ConfigError):
            message, code = str(error), triton.TritonError.INVALID_ARG
        elif isinstance(error, EditCancelled):
            message, code = str(error), triton.TritonError.CANCELLED
        else:
            triton.Logger.log_error(f"{type(error).__name__}: {reason(error)}")
        self.response = triton.InferenceResponse(error=triton.TritonError(message, code))

    def succeed(self, results: Sequence[EditResult]) -> None:
        columns = {
            "edited": (object, [encode_picture(one.image) for one in results]),
            "used_seed": (np.int64, [one.seed for one in results]),
            "warnings": (object, ["\n".join(one.warnings).encode() for one in results]),
        }
        tensors = [
            triton.Tensor(name, np.array(values, dtype).reshape(-1, 1))
            for name, (dtype, values) in columns.items()
        ]
        self.response = triton.InferenceResponse(output_tensors=tensors)


class TritonPythonModel:
    """What Triton calls."""

    def initialize(self, args: Mapping[str, str]) -> None:
        """Open the bundle. The parameters of config.pbtxt are those of `Editor.open`."""
        given = json.loads(args["model_config"]).get("parameters", {})
        # Names in capitals are Triton's.
        options = {name: value["string_value"] for name, value in given.items() if name.islower()}
        folder = Path(args["model_repository"], args["model_version"], "bundle")
        self.editor = Editor.open(folder, **options)
        triton.Logger.log_info(f"{self.editor}")

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """Return a response to each request, whose edits share batches where they can."""
        jobs = [_Job(request) for request in requests]
        for job in jobs:
            self._attempt(self._prepare, job)
        waiting = [job for job in jobs if job.response is None]
        try:
            self._edit(waiting)
        except Exception:  # of one of them, perhaps: the others must not fail with it
            for job in waiting:
                self._attempt(lambda job: self._edit([job]), job)
        return [job.response for job in jobs]

    def finalize(self) -> None:
        self.editor.close()

    @staticmethod
    def _attempt(step: Callable[[_Job], None], job: _Job) -> None:
        try:
            step(job)
        except Exception as error:  # Triton would answer with its traceback
            job.fail(error)

    def _prepare(self, job: _Job) -> None:
        _check_wanted([job])
        given = {name: triton.get_input_tensor_by_name(job.request, name) for name in ARGUMENTS}
        columns = {name: tensor.as_numpy() for name, tensor in given.items() if tensor is not None}
        job.edits = [
            self.editor.prepare(
                **{name: ARGUMENTS[name](rows[place]) for name, rows in columns.items()}
            )
            for place in range(len(columns["image"]))
        ]

    def _edit(self, jobs: Sequence[_Job]) -> None:
        edits = [edit for job in jobs for edit in job.edits]
        results = iter(self.editor.edit_prepared(edits, on_scale=partial(_check_wanted, jobs)))
        for job in jobs:
            job.succeed([next(results) for _ in job.edits])


def _check_wanted(jobs: Sequence[_Job], progress: Progress | None = None) -> None:
    """Raise EditCancelled if the clients of all requests have gone."""
    if all(job.request.is_cancelled() for job in jobs):
        raise EditCancelled("the request was cancelled")

"""Edits that are ended from outside, by any thread or by a deadline, at any moment."""

import threading
from collections.abc import Callable, Iterator
from time import monotonic, sleep
from typing import Any

import onnxruntime as ort
import pytest
from editing import picture
from test_kept import counted

from varedit_runtime import EditHandle
from varedit_runtime.backends.interrupt import run_stoppable
from varedit_runtime.editing.editor import Editor
from varedit_runtime.editing.results import Progress
from varedit_runtime.errors import ConfigError, DeadlineExceeded, EditCancelled, VareditError
from varedit_runtime.locate import embedded

PHOTO = picture(90, 60)
PAST = -1.0


@pytest.fixture
def editor() -> Iterator[Editor]:
    with Editor.open(embedded(), threads=1) as editor:
        yield editor


@pytest.fixture
def before_runs(monkeypatch: pytest.MonkeyPatch) -> list[Callable[[Any], object]]:
    """Return functions that are called with RunOptions before ONNX Runtime runs a graph."""
    hooks: list[Callable[[Any], object]] = []
    original = ort.InferenceSession.run_with_iobinding

    def run(self: Any, binding: Any, options: Any = None) -> None:
        for hook in hooks:
            hook(options)
        original(self, binding, options)

    monkeypatch.setattr(ort.InferenceSession, "run_with_iobinding", run)
    return hooks


def until_stopped(options: Any) -> None:
    """Be a graph that takes a long time."""
    while not options.terminate:
        sleep(0.001)


@pytest.mark.parametrize("deadline", [None, PAST])
def test_what_was_ended_before_computes_nothing(editor: Editor, deadline: float | None) -> None:
    handle, runs = EditHandle(deadline), counted(editor)
    if deadline is None:
        handle.cancel()
    with pytest.raises(EditCancelled) as caught:
        editor.edit(PHOTO, "red", handle=handle)
    assert isinstance(caught.value, DeadlineExceeded) == (deadline is not None)
    assert handle.cancelled == (deadline is None) and not runs


def test_a_running_graph_is_ended_at_any_stage(
    editor: Editor, before_runs: list[Callable[[Any], object]]
) -> None:
    """And leaves nothing behind: the next edit has the same bits, as has one that goes on."""
    stages = counted(editor)
    expected = editor.edit(PHOTO, "add a hat", seed=1).image
    runs = stages.total()
    for last in range(runs):
        handle, left = EditHandle(), [last]

        def cancel(_: Any, handle: EditHandle = handle, left: list[int] = left) -> None:
            left[0] -= 1
            if left[0] == -1:
                handle.cancel()

        editor.forget()
        stages.clear()
        before_runs[:] = [cancel]
        with pytest.raises(EditCancelled, match="cancelled"):
            editor.edit(PHOTO, "add a hat", seed=1, handle=handle)
        assert stages.total() == last + 1 and not handle._stops
        before_runs.clear()
        if last % 4 == 0:
            assert editor.edit(PHOTO, "add a hat", seed=1).image == expected
    unused = EditHandle(monotonic() + 1e6)
    assert editor.edit(PHOTO, "add a hat", seed=1, handle=unused).image == expected


def test_a_deadline_ends_a_running_graph(
    editor: Editor, before_runs: list[Callable[[Any], object]]
) -> None:
    before_runs.append(until_stopped)
    threads = threading.active_count()
    with pytest.raises(DeadlineExceeded, match="deadline"):
        editor.edit(PHOTO, "red", handle=EditHandle(monotonic() + 0.05))
    assert threading.active_count() == threads


def test_another_thread_ends_a_running_graph(
    editor: Editor, before_runs: list[Callable[[Any], object]]
) -> None:
    handle, running = EditHandle(), threading.Event()
    before_runs.extend((lambda _: running.set(), until_stopped))

    def cancel() -> None:
        running.wait(60)
        handle.cancel()

    thread = threading.Thread(target=cancel)
    thread.start()
    with pytest.raises(EditCancelled):
        editor.edit(PHOTO, "red", handle=handle)
    thread.join()


@pytest.mark.parametrize("by_deadline", [True, False])
def test_an_edit_that_waits_for_its_turn_is_ended(editor: Editor, by_deadline: bool) -> None:
    under_way, ended, wrong = threading.Event(), threading.Event(), list[object]()

    def wait(progress: Progress) -> None:
        under_way.set()
        ended.wait(60)

    def edit() -> None:
        under_way.wait(60)
        handle = EditHandle(monotonic() + 0.05 if by_deadline else None)
        if not by_deadline:
            threading.Timer(0.05, handle.cancel).start()
        try:
            editor.edit(PHOTO, "red", handle=handle)
        except EditCancelled as error:
            wrong.append(isinstance(error, DeadlineExceeded) != by_deadline)
        finally:
            ended.set()

    thread = threading.Thread(target=edit)
    thread.start()
    first = editor.edit(PHOTO, "red", seed=1, on_scale=wait)
    thread.join()
    assert wrong == [False] and first.waited < 60
    assert first.image == editor.edit(PHOTO, "red", seed=1).image


def test_the_time_that_an_edit_waited_is_told(editor: Editor) -> None:
    assert editor.edit(PHOTO, "red").waited < 0.05
    waited, under_way, asked = list[float](), threading.Event(), threading.Event()

    def edit() -> None:
        under_way.wait(60)
        asked.set()
        waited.append(editor.edit(PHOTO, "red").waited)

    def slow(progress: Progress) -> None:
        under_way.set()
        asked.wait(60)
        if progress.scale == 0:
            sleep(0.3)

    thread = threading.Thread(target=edit)
    thread.start()
    editor.edit(PHOTO, "red", on_scale=slow)
    thread.join()
    assert waited[0] > 0.1


def test_progress_cancels_by_the_handle(editor: Editor) -> None:
    handle = EditHandle()
    with pytest.raises(EditCancelled):
        editor.edit(PHOTO, "red", on_scale=lambda progress: progress.cancel(), handle=handle)
    assert handle.cancelled


def test_a_preview_is_ended_with_its_edit(
    editor: Editor, before_runs: list[Callable[[Any], object]]
) -> None:
    handle = EditHandle()

    def preview(progress: Progress) -> None:
        before_runs.append(lambda options: handle.cancel())
        progress.preview()

    with pytest.raises(EditCancelled):
        editor.edit(PHOTO, "red", on_scale=preview, handle=handle)


def test_a_failure_of_an_edit_that_nobody_ended_stays_one(
    editor: Editor, monkeypatch: pytest.MonkeyPatch
) -> None:
    handle = EditHandle(monotonic() + 1e6)
    monkeypatch.setattr(editor.backend, "decode", lambda total: total * float("nan"))
    with pytest.raises(VareditError, match="image_decoder computed numbers that are not finite"):
        editor.edit(PHOTO, "red", handle=handle)


def test_only_what_an_edit_runs_is_stopped_by_its_handle() -> None:
    handle, stopped = EditHandle(), list[bool]()
    with handle.heeded():
        run_stoppable(handle.cancel, lambda: stopped.append(True))
    run_stoppable(lambda: None, lambda: stopped.append(False))
    handle.cancel()
    assert stopped == [True]


def test_a_deadline_may_be_in_a_thousand_years() -> None:
    with EditHandle(monotonic() + 1e12).stopping(lambda: None):
        timers = [one for one in threading.enumerate() if isinstance(one, threading.Timer)]
        assert timers and all(one.interval <= threading.TIMEOUT_MAX for one in timers)


@pytest.mark.parametrize("deadline", ["soon", float("nan"), float("inf"), [1.0], 10**400])
def test_a_deadline_is_a_time(deadline: Any) -> None:
    with pytest.raises(ConfigError, match="deadline is"):
        EditHandle(deadline)

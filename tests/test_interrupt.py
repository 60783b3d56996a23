"""Ctrl-C while a graph runs."""

import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from varedit_runtime.backends.interrupt import exit_on_signals, held_signals, run_stoppable
from varedit_runtime.backends.onnxruntime.backend import Buffer, Session
from varedit_runtime.errors import SignalArrived

SIZE, NODES = 512, 20000  # a minute or more of matrix products


@pytest.fixture(scope="module")
def long_session() -> Session:
    start = ir.Value(
        name="start", shape=ir.Shape([SIZE, SIZE]), type=ir.TensorType(ir.DataType.FLOAT)
    )
    nodes, value = [], start
    for _ in range(NODES):
        nodes.append(ir.node("MatMul", [value, start]))
        value = nodes[-1].outputs[0]
    value.name, value.shape, value.type = "end", start.shape, start.type
    graph = ir.Graph([start], [value], nodes=nodes, opset_imports={"": 20}, name="long")
    model = ir.to_proto(ir.Model(graph, ir_version=10)).SerializeToString()
    return Session("long", model, Path("."), "cpu", 1)


@contextmanager
def sent_after(seconds: float, number: int = signal.SIGINT) -> Iterator[None]:
    timer = threading.Timer(seconds, os.kill, (os.getpid(), number))
    timer.start()
    yield
    timer.join()


def test_a_running_graph_is_stopped(long_session: Session) -> None:
    start, end = (Buffer((SIZE, SIZE), "float32", "cpu") for _ in range(2))
    start.write(np.eye(SIZE, dtype=np.float32))
    end.fill(7)
    with sent_after(0.5), pytest.raises(KeyboardInterrupt):
        long_session.run({"start": start.part()}, {"end": end.part()})
    assert (end.read() == 7).all()  # it never came to its end
    assert signal.set_wakeup_fd(-1) == -1


@pytest.mark.parametrize("sent", (signal.SIGINT, signal.SIGTERM))
def test_a_running_graph_is_stopped_where_signals_end_the_program(
    long_session: Session, sent: signal.Signals
) -> None:
    start, end = (Buffer((SIZE, SIZE), "float32", "cpu") for _ in range(2))
    start.write(np.eye(SIZE, dtype=np.float32))
    arrived: list[int] = []
    with pytest.raises(SignalArrived), exit_on_signals(arrived), sent_after(0.5, sent):
        long_session.run({"start": start.part()}, {"end": end.part()})
    assert arrived == [sent]
    assert signal.set_wakeup_fd(-1) == -1  # so that the next graph can be stopped too


def test_signals_wait_for_native_code_that_exceptions_must_not_pass() -> None:
    arrived: list[int] = []
    with pytest.raises(SignalArrived), exit_on_signals(arrived), held_signals() as held:
        signal.raise_signal(signal.SIGTERM)
        assert held == [signal.SIGTERM] and not arrived
    assert arrived == [signal.SIGTERM]


def test_work_in_a_shells_background_is_stopped() -> None:
    stopped = threading.Event()
    previous = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as shells do for `command &`
    try:
        with pytest.raises(SignalArrived), exit_on_signals([]):
            run_stoppable(partial(signal.raise_signal, signal.SIGTERM), stopped.set)
    finally:
        signal.signal(signal.SIGINT, previous)
    assert stopped.is_set()


def test_a_signal_whose_exception_is_lost_comes_again(
    capsys: pytest.CaptureFixture[str],
) -> None:
    class Held:
        def __del__(self) -> None:
            signal.raise_signal(signal.SIGTERM)

    arrived: list[int] = []
    with pytest.raises(SignalArrived), exit_on_signals(arrived):
        del [Held()][0]
        time.sleep(60)
    assert arrived == [signal.SIGTERM] * 2
    assert capsys.readouterr().err == ""


def test_a_program_that_watches_its_signals_keeps_them() -> None:
    told, telling = socket.socketpair()
    stopped: list[bool] = []
    with told, telling:
        telling.setblocking(False)
        signal.set_wakeup_fd(telling.fileno())
        try:
            with pytest.raises(KeyboardInterrupt):
                run_stoppable(
                    partial(signal.raise_signal, signal.SIGINT), lambda: stopped.append(True)
                )
            assert told.recv(1)[0] == signal.SIGINT and not stopped
        finally:
            signal.set_wakeup_fd(-1)


def test_a_program_that_handles_interrupts_itself_is_not_stopped() -> None:
    handled: list[int] = []
    stopped: list[bool] = []
    previous = signal.signal(signal.SIGINT, lambda number, frame: handled.append(number))
    try:
        run_stoppable(partial(signal.raise_signal, signal.SIGINT), lambda: stopped.append(True))
    finally:
        signal.signal(signal.SIGINT, previous)
    assert handled == [signal.SIGINT] and not stopped


def test_an_interrupt_while_the_watcher_starts_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def interrupted(thread: threading.Thread) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(threading.Thread, "start", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_stoppable(lambda: pytest.fail("the work ran"), lambda: None)
    assert signal.set_wakeup_fd(-1) == -1


def test_other_threads_just_run() -> None:
    done: list[bool] = []

    def work() -> None:
        run_stoppable(lambda: done.append(True), lambda: None)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert done

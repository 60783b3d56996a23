"""A stand-in for the program of the editing process, for tests of the process that watches it.

Its first argument says how it fails; the last one is the socket's number.
"""

import os
import signal
import sys
import time
from multiprocessing.connection import Connection

from serving import result

from varedit_serve.editing.messages import Ready


def main(kind: str, connection: Connection) -> None:
    assert connection.recv()[0] == "open"
    if kind == "unfit":
        connection.send(("unfit", "there is no such GPU"))
        return
    if kind == "dies":
        os._exit(3)
    connection.send(("ready", Ready("CPUExecutionProvider", len, 1, 0.001, 1)))
    while True:
        _, number, orders = connection.recv()
        if kind == "stuck":
            while True:
                connection.send(("alive",))
                time.sleep(0.05)
        elif kind == "stopped":
            os.kill(os.getpid(), signal.SIGSTOP)
        elif kind == "nonsense":
            os.write(connection.fileno(), b"\0\0\0\4abcd")
        elif kind == "fails":
            connection.send(("failed", number, "no memory", False))
        elif kind == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        else:
            connection.send(("edited", number, [result(order.seed) for order in orders]))


if __name__ == "__main__":
    main(sys.argv[1], Connection(int(sys.argv[2])))

"""Several editing processes on this machine, which have its cores and GPUs between them."""

import os
from dataclasses import replace

from varedit_runtime.backends.host import VISIBLE, cores, nvidia
from varedit_serve.editing.child import Child, Listener
from varedit_serve.editing.messages import Opening


def local_children(opening: Opening, listener: Listener, count: int) -> list[Child]:
    """Return so many children, which are not started yet.

    Each has its share of the threads that compute, unless the number is chosen, and one of the
    GPUs, in turn. One child alone has all of them.
    """
    if count == 1:
        return [Child(opening, listener)]
    threads = max(1, cores() // count)
    opening = replace(opening, backend=opening.backend.with_threads(threads))
    named = os.environ.get(VISIBLE)
    gpus = list(map(str, range(len(nvidia().gpus)))) if named is None else named.split(",")
    return [
        Child(opening, listener, environment={VISIBLE: gpus[place % len(gpus)]} if gpus else {})
        for place in range(count)
    ]

"""The program of the editing process, which one picture kills: that of the seed POISON."""

import os
import signal
from typing import Any

from varedit_runtime import Editor
from varedit_serve.editing import worker

POISON = 13
_edit_prepared = Editor.edit_prepared


def edit_prepared(editor: Editor, edits: Any, **options: Any) -> Any:
    if any(edit.seed == POISON for edit in edits):
        os.kill(os.getpid(), signal.SIGKILL)
    return _edit_prepared(editor, edits, **options)


if __name__ == "__main__":
    Editor.edit_prepared = edit_prepared  # type: ignore[method-assign]
    worker.main()

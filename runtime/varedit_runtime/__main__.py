"""The `varedit-run` command as a module: `python -m varedit_runtime`."""

from varedit_runtime.terminal.start import varedit_run

if __name__ == "__main__":
    varedit_run()

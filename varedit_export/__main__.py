"""The `varedit-export` command as a module: `python -m varedit_export`."""

from varedit_runtime.terminal.start import varedit_export

if __name__ == "__main__":
    varedit_export()

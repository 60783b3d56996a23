"""The subcommands of `varedit-run`, one file each; small ones share a file."""

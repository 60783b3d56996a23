"""The subcommands of `varedit-export`, one file each; small ones share a file."""

"""The folder of a command that works for a long time, and can go on where it was ended."""

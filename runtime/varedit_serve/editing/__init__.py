"""What waits to be edited, the process that edits, and what the two tell each other."""

"""How commands start, end and speak: signals, standard streams, errors on one line, exit codes."""

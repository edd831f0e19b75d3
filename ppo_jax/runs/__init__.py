"""The host's side of a training: disk, screen, clock and Ctrl-C."""

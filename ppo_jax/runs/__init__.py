"""The host's part of trainings and sweeps: disk, screen, clock and Ctrl-C."""

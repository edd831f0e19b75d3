"""Populations: many trainings in one compiled program, as pure functions."""

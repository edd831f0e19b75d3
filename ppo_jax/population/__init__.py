"""Populations: many trainings in one compiled call."""

"""Benchmarks: each is a script that says what it measured, where and with which versions."""

"""Policies: networks, action distributions, and the policy as a value."""

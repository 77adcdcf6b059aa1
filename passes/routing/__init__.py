"""Routers in front of the operator, moved into it."""

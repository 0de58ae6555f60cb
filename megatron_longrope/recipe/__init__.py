"""Pipelines of `longrope` commands."""

"""Logs, metrics, health checks and the status page, from plain data."""

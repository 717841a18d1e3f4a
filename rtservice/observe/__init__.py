"""Logs, metrics, health checks and the status page, made from plain data."""

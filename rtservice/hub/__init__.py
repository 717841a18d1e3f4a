"""Publish and subscribe between connections, processes and machines."""

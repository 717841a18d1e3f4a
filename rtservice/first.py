"""Imported before all else: the rest takes a second on a slow machine, and process 1 would lose a stop meanwhile."""

from rtservice.host.signals import hold_in_first_process

hold_in_first_process()

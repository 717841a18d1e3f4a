"""Hold stop signals before the slow imports of the other modules: process 1 would lose a signal meanwhile."""

from rtservice.process.signals import hold_in_first_process

hold_in_first_process()

"""Hold stop signals before the slow imports of other modules, since process 1 would lose signals during these."""

from rtservice.process.signals import hold_in_first_process

hold_in_first_process()

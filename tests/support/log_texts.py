"""Texts of log records that several tests expect."""

STILL = "still writing to the file that was open"

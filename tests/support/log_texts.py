"""Texts of log records that several tests look for."""

STILL = "still writing to the file that was open"

"""Telemetry: what happens, told to subscribers, tracers, monitors and logs.

Nothing here decides anything, and nothing here may break what it tells of.
"""

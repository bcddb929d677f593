"""Kafka: topics read into the log, lag, and files produced.

Nothing but SQL decides what was consumed. Kafka's own group offsets are written for
other tools to look at, and never read.
"""

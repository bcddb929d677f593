"""Benchmarks: kappa_log against bare hand-written loops over the same store."""

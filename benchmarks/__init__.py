"""Benchmarks: kappa_log against bare hand-written loops over the same store.

    python -m benchmarks [--events 1000000] [--runs 3] [--growth 4] [--only sqlite]

Each figure is a ratio of speeds in one run, ours over bare, on the same rows: the
machine's own speed cancels out. Every measured piece of work is a process of its own,
so that no cache is warm for one and cold for the other, and its peak memory is its own.
"""

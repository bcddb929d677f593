"""Storage: the only package that knows SQL, tables and dialects.

Functions take an open connection: the caller owns the transaction. `Database` opens
transactions and turns drivers' errors into the errors of `kappa_log.errors`.
"""

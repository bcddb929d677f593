"""The archive: the log as Parquet segments under a manifest, on disk or object store.

    manifest.json                                        what there is, hashed; last
    events/date=2026-11-22/000000000001-000000069659.parquet
    offsets|checkpoints|duplicates|failures/<hash>.parquet   the ledger, as of the head
    projections/<name>/build=<n>/<position>.parquet      rows of the live builds

No file is ever changed: a new state is a new file under a new name, and the manifest,
replaced in one step, says which files count. So whoever reads by the manifest reads a
whole archive, also while one is written and after a kill; the next export deletes what
no manifest names. Bytes depend on the log alone, not on when or from which database.
"""

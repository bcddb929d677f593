"""Reader: an archive opened by its manifest, for whoever reads its files.

    archive = open_archive("archive", Path.cwd())
    archive.manifest.position            # last event in it
    archive.events()                     # a pyarrow dataset, in order of position
    archive.table("failures")            # a pyarrow Table
    archive.rows("customer_totals")      # a pyarrow Table; None if it is not there
    archive.paths("events")              # files, for DuckDB's read_parquet

Files that the manifest does not name are not of the archive: readers go by it, not by
what lies in the folder.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from kappa_log.archive import layout
from kappa_log.archive.manifest import NAME, Manifest, PayloadColumn, from_bytes
from kappa_log.archive.store import Store
from kappa_log.errors import ArchiveMissing

if TYPE_CHECKING:
    import pyarrow as pa
    from pyarrow import dataset


class Archive(msgspec.Struct, frozen=True):
    """An archive as it was when it was opened."""

    store: Store
    manifest: Manifest

    def paths(self, what: str) -> list[str]:
        """Return the paths of ``events`` or of a table of the ledger, in order.

        On a disk they are whole paths; in an object store they are relative to
        ``store.files``.
        """
        files = (
            [segment.path for segment in self.manifest.segments]
            if what == "events"
            else [self.manifest.ledger[what].path]
        )
        folder = self.store.folder
        return files if folder is None else [str(folder / path) for path in files]

    @property
    def schema(self) -> pa.Schema:
        """Columns of ``events``, typed columns of payload fields included."""
        return schema_of(self.manifest.columns)

    def events(self) -> dataset.Dataset:
        """Return all events as a dataset that reads what a query needs of them."""
        from pyarrow import dataset

        if not self.manifest.segments:
            return dataset.dataset(self.schema.empty_table())
        return dataset.dataset(
            [segment.path for segment in self.manifest.segments],
            schema=self.schema,
            format="parquet",
            filesystem=self.store.files,
        )

    def table(self, name: str) -> pa.Table:
        """Return a table of the ledger: offsets, checkpoints, duplicates, failures.

        Raises:
            ArchiveDamaged: Its file is missing or not what was written.
        """
        import pyarrow.parquet as pq

        with self.store.checked(self.manifest.ledger[name]) as file:
            return pq.read_table(file)

    def rows(self, projection: str) -> pa.Table | None:
        """Return the rows of a projection's live build; None if there are none here."""
        import pyarrow.parquet as pq

        for found in self.manifest.projections:
            if found.projection == projection:
                with self.store.checked(found) as file:
                    return pq.read_table(file, partitioning=None)
        return None


def schema_of(columns: Sequence[PayloadColumn]) -> pa.Schema:
    """Return the columns of events with these payload fields."""
    from kappa_log.archive.fields import fields_of

    schema = layout.EVENTS
    for field in fields_of(columns):
        schema = schema.append(field)
    return schema


def open_archive(url: str, base: Path) -> Archive:
    """Open an archive to read.

    Args:
        url: A folder, or an address that pyarrow's filesystems know.
        base: Folder that a relative path is meant from.

    Raises:
        UsageError: The address is none.
        ArchiveMissing: There is no archive.
        ArchiveNewer: A later version of kappa_log wrote it.
        ArchiveDamaged: The manifest is not what was written.
    """
    return open_archive_in(Store(url, base))


def open_archive_in(store: Store) -> Archive:
    """Open the archive of a store; errors as `open_archive`."""
    found = open_if_there(store)
    if found is None:
        msg = (
            f"there is no archive at {store.url}: {store.nothing_there(NAME)}. Give "
            "the address of one, or make it: kappa-log export. Nothing was changed"
        )
        raise ArchiveMissing(msg)
    return found


def open_if_there(store: Store) -> Archive | None:
    """Return the archive of a store, or None; errors as `open_archive`."""
    data = store.read(NAME)
    return None if data is None else Archive(store, from_bytes(data, store.url))

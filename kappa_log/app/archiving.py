"""Archiving: the log as Parquet, out and in again, and SQL over all of it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from kappa_log import verify
from kappa_log.app.reading import Reading
from kappa_log.errors import ArchiveDamaged, ArchiveDiverged, ArchiveMissing
from kappa_log.storage import ledger

if TYPE_CHECKING:
    from duckdb import DuckDBPyConnection, DuckDBPyRelation

    from kappa_log.analysis import Analysis
    from kappa_log.archive.bring import ImportReport
    from kappa_log.archive.check import ArchiveReport
    from kappa_log.archive.export import ExportReport
    from kappa_log.archive.reader import Archive


class Archiving(Reading):
    """The part about the archive and analysis."""

    def export(
        self,
        to: str | None = None,
        *,
        columns: Sequence[str] = (),
        columns_of: Sequence[str] = (),
        no_columns: bool = False,
        dry_run: bool = False,
        on_step: verify.OnStep = lambda *_: None,
    ) -> ExportReport:
        """Bring the archive up to the log: Parquet files, their manifest last.

        Args:
            to: A folder, or an address of an object store; the configuration's if None.
            columns: TOPIC.FIELD:TYPE, each a typed column made of a payload field.
                Those of the archive stay if no columns are named.
            columns_of: Projections whose payload Struct's fields become columns.
            no_columns: Make no columns of payload fields any more.
            dry_run: Say what would be done, and do nothing.
            on_step: Called as it goes on.

        Raises:
            UsageError: The address or a column is none.
            ArchiveDiverged: The archive is of another log, or ahead of this one.
            ArchiveError: It cannot be written; it is as it was.
            VerificationError: The log is damaged; the archive is as it was.
        """
        from kappa_log.archive import fields
        from kappa_log.archive.export import Exporter
        from kappa_log.archive.store import Store

        self._require()
        chosen = None
        if columns or columns_of or no_columns:
            with self.database.read() as connection:
                lanes = ledger.lanes(connection, self.database)
            topics = sorted({lane.topic for lane in lanes})
            folds = [self.registry.latest(name) for name in columns_of]
            chosen = fields.chosen(columns, folds, topics)
        exporter = Exporter(
            self.database,
            Store(*self._address(to)),
            segment_events=self.config.archive.segment_events,
            columns=chosen,
            step=on_step,
        )
        return exporter.plan() if dry_run else exporter.run()

    def import_archive(
        self,
        url: str | None = None,
        *,
        on_step: verify.OnStep = lambda *_: None,
    ) -> ImportReport:
        """Bring an archive into an empty log: the same positions, chain and ledger.

        The database is made if it is not there. All or nothing comes in.

        Args:
            url: The archive; the configuration's if None.
            on_step: Called as it goes on.

        Raises:
            UsageError: The log is not empty; nothing was changed.
            ArchiveMissing: There is no archive.
            ArchiveDamaged: It is not what was written; nothing was kept.
        """
        from kappa_log.archive.bring import Importer

        try:
            found = self.archive(url)
            if self.database_state().verdict == "empty":
                self.create_database()
            self._require()
            with self.database.write() as connection:
                report = Importer(self.database, found, on_step).run(connection)
                self._audit(connection, "import", report.url, None)
        except ArchiveDamaged as error:
            kept = f"{error.reason}. Nothing was imported"
            raise ArchiveDamaged(error.url, error.path, kept) from error
        return report

    def verify_archive(
        self,
        url: str | None = None,
        *,
        head: str | None = None,
        on_step: verify.OnStep = lambda *_: None,
    ) -> ArchiveReport:
        """Prove each file of an archive and its chain, and compare with the log.

        Without a log, or beside an empty one, the archive is verified by itself.

        Args:
            url: The archive; the configuration's if None.
            head: A head kept elsewhere, in hex: of its end, of a checkpoint, or of the
                end of a segment.
            on_step: Called as it goes on.

        Raises:
            ArchiveMissing: There is none.
            ArchiveError: It cannot be read now.
        """
        from kappa_log.archive.check import check_archive
        from kappa_log.archive.store import Store

        there = self.database_state().verdict != "empty" and self.head().position > 0
        return check_archive(
            Store(*self._address(url)),
            self.database if there else None,
            head=head,
            step=on_step,
        )

    def archive(self, url: str | None = None) -> Archive:
        """Open an archive to read; the configuration's if None.

        Raises:
            ArchiveMissing: There is none.
            ArchiveDamaged: Its manifest is not what was written.
        """
        from kappa_log.archive.reader import open_archive

        return open_archive(*self._address(url))

    def _address(self, url: str | None) -> tuple[str, Path]:
        """Return an archive's address, and from where it counts if it is relative."""
        if url is None:
            return self.config.archive.url, self.config.folder
        return url, Path.cwd()

    def duckdb(self) -> DuckDBPyConnection:
        """Return a DuckDB connection with views over the log and its read models.

        ``events``, ``failures``, ``checkpoints``, ``duplicates`` and each projection by
        its name are read when a query scans them, as they are then. The connection
        reads no files and its settings are locked; what is made in it is gone with it.
        """
        return self.analysis().connection

    def sql(self, query: str) -> DuckDBPyRelation | None:
        """Return what an SQL query comes to; None for statements that have no rows.

        DuckDB gives it as ``.to_arrow_table()``, ``.df()`` (pandas), ``.pl()`` (polars)
        or ``.fetchall()``. See `duckdb` for the views.

        Raises:
            UsageError: DuckDB refuses the query.
        """
        return self.analysis().sql(query)

    def analysis(self) -> Analysis:
        """Return a new DuckDB connection together with what its views are."""
        from kappa_log.analysis import Analysis

        self._require()
        return Analysis(self.database, self._own_archive())

    def _own_archive(self) -> Archive | None:
        """Return the configured archive if it is there, and as the log is now."""
        from kappa_log.archive.export import require_same_log
        from kappa_log.storage.transfer import erasure_epoch

        try:
            found = self.archive()
            with self.database.read() as connection:
                require_same_log(connection, self.database, found)
                # What was erased since is in its files still.
                epoch = erasure_epoch(connection, self.database)
        except (ArchiveMissing, ArchiveDiverged):
            return None
        return found if found.manifest.erasure_epoch == epoch else None

"""KappaLog: the front door. It wires storage, projections and the clock together.

All that the command line does is a method of it. The class comes in parts, each of
which knows those before it: base, tables, reading, archiving, failing, folding,
replaying, intake, access, front.
"""

from kappa_log.app.actor import acting_as
from kappa_log.app.folding import Explained
from kappa_log.app.front import KappaLog

__all__ = ["Explained", "KappaLog", "acting_as"]

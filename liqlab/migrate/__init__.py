"""From the keys of other writers to liqlab's: backed up, in event time, each event once, verified, resumable.

Every batch of a migration has a number and the migration's own name, and the server remembers both in the same atomic
call that takes the events (see `liqlab.link`). The batches are cut from a file that is complete before the first of
them is sent and never changes. So whatever is killed and begun again sends the same batches under the same numbers, and
those that the server has are no-ops.
"""

from __future__ import annotations

from liqlab.migrate.phases import checklist
from liqlab.migrate.planning import Plan, plan
from liqlab.migrate.reshard import Resharded, reshard
from liqlab.migrate.restoring import restore
from liqlab.migrate.result import Migrated
from liqlab.migrate.run import migrate
from liqlab.migrate.sources import MigrateError

__all__ = ["MigrateError", "Migrated", "Plan", "Resharded", "checklist", "migrate", "plan", "reshard", "restore"]

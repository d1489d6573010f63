"""What a crash can leave of adapters, put right before serving begins.

temporary folder            swept: nobody was told of it
folder without a row        adopted as a candidate where it is whole: the crash came between rename and row
folder of a deleted row     deleted: the crash came between row and folder
row without a whole folder  quarantined, on the record
"""

from __future__ import annotations

import logging
from pathlib import Path

from nightschool_server.adapters import folder as adapter_folder
from nightschool_server.adapters import rows as adapter_rows
from nightschool_server.adapters.rows import SERVER, Entry
from nightschool_server.errors import AdapterFormatError
from nightschool_server.home import Home
from nightschool_server.store.store import Store

log = logging.getLogger(__name__)


def reconcile(store: Store, home: Home) -> None:
    """Make rows and folders agree. Content is hashed later, when an adapter is loaded."""
    adapter_folder.sweep(home)
    records = {record.name: record for record in adapter_rows.all_records(store)}
    for record in records.values():
        if record.state == "quarantined":
            continue
        try:
            adapter_folder.open_folder(home, record.name)
        except AdapterFormatError as error:
            log.error("event=adapter_quarantined adapter=%s error=%s", record.name, error)
            entry = Entry(SERVER, "quarantine", record.name, str(error))
            adapter_rows.set_state(store, record.name, "quarantined", entry)
    for name in adapter_folder.published_names(home):
        if name in records:
            continue
        if adapter_rows.is_deleted(store, name):
            adapter_folder.delete_folder(home, name)
        else:
            _adopt(store, home, name)


def _adopt(store: Store, home: Home, name: str) -> None:
    try:
        folder = adapter_folder.open_folder(home, name)
        folder.verify(folder.digest)
        if folder.manifest["sequence"] <= adapter_rows.last_sequence(store):
            raise AdapterFormatError(f"its sequence {folder.manifest['sequence']} was used by another adapter")
    except (AdapterFormatError, KeyError, TypeError) as error:
        log.warning("event=foreign_folder path=%s error=%s", Path(home.adapters, name), error)
        return
    reason = "its import was cut off after the folder was written"
    adapter_rows.insert_adapter(store, folder, "candidate", Entry(SERVER, "adopt", name, reason))
    log.warning("event=adapter_adopted adapter=%s", name)

"""The one exception for everything a user can mend: bad files, records, keys, configurations."""

from __future__ import annotations


class BadInput(Exception):
    """Input that cannot be used. The message names the file, key or record, and says how to mend it.

    Entry points print it as one line and exit with code 2, without a traceback.
    """

    def __init__(self, where: object, what: str, mend: str = "") -> None:
        """`where`: file, key path or record; `what`: what is wrong; `mend`: what to do about it."""
        self.where = str(where)
        self.what = what
        self.mend = mend
        super().__init__(f"{where}: {what}" + (f" ({mend})" if mend else ""))

"""The differences from the driver's own answers that are meant to be, each with its reason: that reason goes to
docs/compatibility.md. Whatever is not listed here is a fault.

`call`, `native` and `shared` are regular expressions for the call as it is told, the driver's own answer, and that under
nvshare; each has to match the whole text. `sequence` says where, if it matters.
"""

import dataclasses
import re


@dataclasses.dataclass(frozen=True)
class Explained:
    why: str
    call: str
    native: str = ".*"
    shared: str = ".*"
    sequence: str = ".*"

    def fits(self, sequence, call, native, shared):
        pairs = ((self.sequence, sequence), (self.call, call), (self.native, native), (self.shared, shared))
        return all(re.fullmatch(pattern, text, re.DOTALL) for pattern, text in pairs)


EXPLAINED = []


def why(sequence, call, native, shared):
    """The reason of a difference, or None."""
    return next((known.why for known in EXPLAINED if known.fits(sequence, call, native, shared)), None)

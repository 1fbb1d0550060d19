"""Does Hecate change training? Trains a user's own model plainly and under Hecate, and compares what comes out.

`hecate.verify` is the function; its modules are imported by their full names (`from hecate.verify.report import Row`).
On the command line: `python -m hecate.verify --help`.
"""

from hecate.verify.report import Report, Row
from hecate.verify.run import verify

__all__ = ["Report", "Row", "verify"]

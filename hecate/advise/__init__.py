"""Will it pay? Which way of training a model to use on a cluster, what it gives, and when not to use Hecate.

`hecate.advise` is the function; its modules are imported by their full names. On the command line:
`python -m hecate.advise --help`.
"""

from hecate.advise.report import Advice, Option
from hecate.advise.run import advise

__all__ = ["Advice", "Option", "advise"]

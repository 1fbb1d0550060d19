"""Hecate's labels in a trace that torch's profiler has written."""

from __future__ import annotations

import gzip
import json
import re
import zlib
from pathlib import Path
from typing import Any, get_args

from hecate.labels import Verb

__all__ = ["read_spans"]

MOST = 20_000
"""Spans per trace; the rest is left out, so that a page stays small."""


def read_spans(path: Path) -> list[dict[str, Any]]:
    """The labels in a trace `<name>.json.gz`, and its steps (`step 12`), in order.

    Returns:
        Dictionaries of `rank`; `verb`, also "step"; `of`, the layer or the number of the step; `begin` and `seconds`,
        from the first one.

    Raises:
        ValueError: the file is damaged.
    """
    try:
        with gzip.open(path, "rt", encoding="utf-8") as file:
            events = json.load(file)["traceEvents"]
    except (ValueError, KeyError, EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path}: damaged, no trace of torch.profiler ({error})") from error
    named_rank = re.search(r"rank(\d+)", path.name)
    rank = 0 if named_rank is None else int(named_rank[1])
    found = [(event["ts"], event["dur"], *named) for event in events if (named := _label(event))]
    found.sort()
    start = found[0][0] if found else 0.0
    return [
        {"rank": rank, "verb": verb, "of": of, "begin": (ts - start) / 1e6, "seconds": duration / 1e6}
        for ts, duration, verb, of in found[:MOST]
    ]


def _label(event: dict[str, Any]) -> tuple[str, str] | None:
    """The verb and the rest of a label; None for other events. Hecate's operators have the same prefix."""
    if event.get("ph") != "X" or event.get("cat") != "user_annotation":
        return None
    name = str(event["name"])
    if name.startswith("step "):
        return "step", name.removeprefix("step ")
    verb, _, of = name.removeprefix("hecate::").partition(" ")
    return (verb, of) if name.startswith("hecate::") and verb in get_args(Verb) else None

"""The table of docs/architectures.md, from what pytest printed.

`python -m tests.adapters.table LOG...` prints it; the document says which tests wrote the logs. If a test is in several
of them, the last result counts.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

from tests.adapters.images import MODELS
from tests.adapters.tiny import ARCHITECTURES

COLUMNS: Mapping[str, tuple[str, ...]] = {
    "float32": ("test_transformers.py::test_parity[{}-2]", "test_transformers.py::test_parity[{}-3]"),
    "bf16 model": (
        "test_transformers_bf16.py::test_parity[{}-model]",
        "test_transformers_bf16.py::test_parity_replicated[{}-model]",
    ),
    "bf16 compute": (
        "test_transformers_bf16.py::test_parity[{}-compute]",
        "test_transformers_bf16.py::test_parity_replicated[{}-compute]",
    ),
    "images": (
        "test_transformers_images.py::test_parity[{}-fsdp]",
        "test_transformers_images.py::test_parity[{}-replicate]",
    ),
    "load and save": ("test_pretrained.py::test_every_architecture[{}]",),
}
"""Column -> its tests."""


def table(lines: Iterable[str]) -> list[str]:
    """Rows in Markdown: "yes" if all tests of a column passed, "no" if one failed, "-" if some were not run.

    A model that reads images is in the row of its text model, if that is among `ARCHITECTURES`.
    """
    found = (re.match(r"\S*/(\S+\.py::\S+) (PASSED|FAILED|SKIPPED|ERROR)", line) for line in lines)
    results = {match[1]: match[2] for match in found if match}
    rows = [["model type", *COLUMNS], ["---"] * (1 + len(COLUMNS))]
    others = [model_type for model_type in MODELS if f"{model_type}_text" not in ARCHITECTURES]
    for model_type in sorted([*ARCHITECTURES, *others]):
        whole = model_type.removesuffix("_text")
        row = [whole + (" (text)" if whole not in (model_type, *MODELS) else "")]
        for column, tests in COLUMNS.items():
            ran = [results.get(test.format(whole if column == "images" else model_type)) for test in tests]
            good = all(result == "PASSED" for result in ran)
            row.append("yes" if good else "no" if {"FAILED", "ERROR"} & set(ran) else "-")
        rows.append(row)
    return [f"| {' | '.join(row)} |" for row in rows]


if __name__ == "__main__":
    print("\n".join(table(line for file in sys.argv[1:] for line in Path(file).read_text().splitlines())))

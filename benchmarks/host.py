"""Host time of one MoE layer: from the counts the host waits for to the launch of the all-to-all, and more.

    python -m benchmarks.host --json benchmarks/results/host.json [--against COMMIT [--native FILE]]

On one CPU thread, with a process group that sends nothing and few tokens of eight numbers, so that what remains is the
host's work: planning, bookkeeping and calls of ops. Times are of the thread, without those in which it does not run.

With `--against`, processes of this commit and of another one take turns, and ratios are medians over the rounds. The
other commit's native extension is built from its source, unless `--native` names one.
"""

from __future__ import annotations

from benchmarks.trees import measured, options, report_of

PARTS = (
    "calibrate",
    "assign",
    "exchange choice",
    "dispatch record",
    "bubble",
    "gate to all-to-all",
    "forward",
    "backward",
    "op overhead, forward",
    "op overhead, backward",
    "book",
)
"""What `benchmarks.host_rank` measures. Bubble: counts known until the rows' all-to-all is called. Gate to all-to-all:
the same with the counts' exchange before it. Forward and backward: all of the layer. Op overhead: as
many calls of ops and autograd functions that do nothing as the layer makes of this package's."""


def main() -> None:
    """Measure, print the tables, write JSON."""
    parser = options(__doc__, rounds=5)
    parser.add_argument("--passes", type=int, default=10, help="per setting and round")
    arguments = parser.parse_args()
    report = report_of(measured("host_rank.py", arguments.passes, arguments), "us", 1e3, PARTS)
    if arguments.json:
        report.write(arguments.json)


if __name__ == "__main__":
    main()

"""Time to plan one layer ahead and to find the routes of its copies.

    python -m benchmarks.planning_time --json benchmarks/results/planning_time.json [--against COMMIT [--native FILE]]

Milliseconds of CPU time of one thread, without caches: copies planned from 5 steps of drifting loads for two memory
slots per device, anywhere or at most 16 experts from outside a node of 8; and the routes of two copies per device. With
`--against`, processes of this commit and of another one take turns; ratios are medians over the rounds.
"""

from __future__ import annotations

from benchmarks.trees import measured, options, report_of


def main() -> None:
    """Measure, print the tables, write JSON."""
    parser = options(__doc__, rounds=3)
    parser.add_argument("--repeats", type=int, default=3, help="calls per setting and round; the fastest one counts")
    arguments = parser.parse_args()
    report = report_of(measured("planning_time_round.py", arguments.repeats, arguments), "ms", 1)
    if arguments.json:
        report.write(arguments.json)


if __name__ == "__main__":
    main()

"""Which goals of the check on a GPU its figures reach."""

from __future__ import annotations

from benchmarks.gpu_goals import GOALS, Goal, table, verdicts
from benchmarks.report import Row

COPY = Goal("copy", "permute .*", "of the copy", least=85)
HOST = Goal("host", "hecate", "time", most=300, setting="Qwen")
STATED = Goal("speed", "hecate", "tokens per second")


def rows(*values: float, subject: str = "permute there", metric: str = "of the copy", setting: str = "") -> list[Row]:
    return [Row(setting, subject, metric, value) for value in values]


def test_the_worst_figure_counts() -> None:
    for goal, found, word, worst in (
        (COPY, rows(90, 85), "reached", 85),
        (COPY, rows(90, 84.9), "missed", 84.9),
        (COPY, rows(float("nan"), 90), "missed", None),
        (COPY, rows(90, subject="combine") + rows(90, metric="time"), "not measured", None),
        (HOST, rows(250, 301, subject="hecate", metric="time", setting="Qwen3"), "missed", 301),
        (HOST, rows(300, subject="hecate", metric="time", setting="Qwen3"), "reached", 300),
        (HOST, rows(300, subject="hecate", metric="time", setting="other"), "not measured", None),
        (STATED, rows(7, subject="hecate", metric="tokens per second"), "stated", 7),
    ):
        (verdict,) = verdicts(found, [goal])
        assert verdict.word == word
        assert worst is None or verdict.worst == worst


def test_the_table_has_a_line_per_goal() -> None:
    lines = table(verdicts(rows(90, 70))).splitlines()
    assert len(lines) == len(GOALS)
    assert lines[0] == "missed                70  moving rows of tokens, % of a large copy: >= 85 (worst of 2)"
    assert lines[-1].split("  ")[0] == "not measured"
    assert lines[-2].endswith("GPT-MoE-S, tokens per second: stated")

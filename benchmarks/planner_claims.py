"""Claims that the planner must meet, and published figures of other systems (ANCHORS, section 2)."""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["CLAIMS", "PUBLISHED", "Claim"]


class Claim(NamedTuple):
    """An upper limit for one row of the report."""

    setting: str
    subject: str
    metric: str
    limit: float
    unit: str = ""


KINDS = ("zipf 0.6", "zipf 1.2", "hot", "drift")
D64 = tuple(f"D=64 E=256 {kind}" for kind in KINDS)
FEW2, FEW1, CROSS = "Hecate R=2, fewest copies", "Hecate R=1, fewest copies", "Hecate R=4, fewest crossings"
MEAN, WORST = "imbalance left, mean", "imbalance left, worst"

CLAIMS = (
    *(Claim(setting, FEW2, "imbalance", 1.01) for setting in D64),
    *(Claim(setting, FEW2, "copies", most) for setting, most in zip(D64, (42, 50, 58, 48), strict=True)),
    *(Claim(setting, FEW1, "imbalance", most) for setting, most in zip(D64, (1.02, 1.03, 1.01, 1.03), strict=True)),
    Claim("D=256 E=256 zipf 1.2", FEW2, "imbalance", 1.01),
    Claim("D=256 E=256 zipf 1.2", FEW2, "copies", 220),
    Claim("D=64 E=256 zipf 1.2", CROSS, "imbalance", 1.01),
    Claim("D=64 E=256 zipf 1.2", CROSS, "crossings", 6),
    Claim("D=64 E=256 zipf 1.2", CROSS, "copies", 60),
    Claim("D=256 E=256 zipf 1.2", CROSS, "imbalance", 1.01),
    Claim("D=256 E=256 zipf 1.2", CROSS, "crossings", 26),
    Claim("D=256 E=256 zipf 1.2", CROSS, "copies", 245),
    Claim("ahead D=64 E=256", "Hecate R=2", MEAN, 1.005),
    Claim("ahead D=64 E=256", "Hecate R=2", WORST, 1.03),
    Claim("ahead D=64 E=256", "Hecate R=1", MEAN, 1.10),
    Claim("ahead D=64 E=256, 2 foreign a node", "Hecate R=3", MEAN, 1.02),
    Claim("ahead D=64 E=256, 2 foreign a node", "Hecate R=2", MEAN, 1.08),
    Claim("ahead D=32 E=64, 2 foreign a node", "Hecate R=3", MEAN, 1.005),
    *(Claim(setting, "Hecate R=2", "copies and holder loads", 0.1, "ms") for setting in D64),
    *(Claim(setting, "Hecate R=2", "whole plan", 0.25, "ms") for setting in D64),
    Claim("D=256 E=256 zipf 1.2", "Hecate R=2", "copies and holder loads", 0.5, "ms"),
    Claim("D=256 E=256 zipf 1.2", "Hecate R=2", "whole plan", 1.5, "ms"),
    Claim("D=1024 E=256 zipf 1.2", "Hecate R=2", "copies and holder loads", 5, "ms"),
    Claim("D=1024 E=256 zipf 1.2", "Hecate R=2", "whole plan", 20, "ms"),
)


def _anchor_rows() -> list[tuple[str, str, str, float]]:
    """(setting, subject, metric, value) of the table of ANCHORS, section 2: imbalance and copies for each kind."""
    table: dict[str, tuple[tuple[float, float], ...]] = {
        "UltraEP quota R=1": ((1.049, 40), (1.100, 44), (1.010, 58), (1.092, 40)),
        "UltraEP quota R=2": ((1.022, 47), (1.010, 58), (1.010, 58), (1.060, 44)),
        "LLEP factor 1.0": ((1.012, 63), (1.000, 63), (1.000, 63), (1.000, 65)),
        "LAER R=2": ((1.030, 379), (1.044, 377), (1.074, 374), (1.043, 378)),
        "EPLB R=2": ((1.004, 379), (1.008, 373), (1.078, 379), (1.008, 375)),
    }
    rows = []
    for subject, cells in table.items():
        for setting, (imbalance, copies) in zip(D64, cells, strict=True):
            rows.append((setting, f"{subject} (published)", "imbalance", imbalance))
            rows.append((setting, f"{subject} (published)", "copies", copies))
    return rows


PUBLISHED = (
    *_anchor_rows(),
    ("D=256 E=256 zipf 1.2", "LLEP factor 1.0 (published)", "imbalance", 1.006),
    ("D=256 E=256 zipf 1.2", "LLEP factor 1.0 (published)", "copies", 253.0),
    ("D=64 E=256 zipf 1.2", "UltraEP quota R=2 (published)", "crossings", 42.0),
    ("D=64 E=256 zipf 1.2", "LLEP factor 1.0 (published)", "crossings", 45.0),
    ("D=256 E=256 zipf 1.2", "LLEP factor 1.0 (published)", "crossings", 199.0),
)

"""End a run over and over at random moments and compare its end with that of a run that nobody touched.

    python -m tests.faults.kill_cycles --cycles 30

Each cycle starts `hecate.train` on two processes, and after a random number of steps kills (SIGKILL) one rank, or all
processes at once, or waits for a checkpoint to be written in the background and kills, interrupts (Ctrl-C) or stops
(SIGTERM) all processes in the middle of that. What is there then as a checkpoint must be whole. After the last one the
run goes on to its end. Weights, optimizer state, planner state, all losses and the validation must then be bit for bit
those of the other run.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hecate.checkpoint.cover import check_stored
from hecate.checkpoint.history import checkpoints
from hecate.checkpoint.manifest import verify
from hecate.checkpoint.metadata import read_metadata
from tests.faults.jobs import POLL_SECONDS, Job, command, differences, last_step, write_text

INTERVAL = 5
LONGEST = 12
"""Most steps of a cycle: more than two checkpoints."""
SIGNALS = {
    "one rank": signal.SIGKILL,
    "all": signal.SIGKILL,
    "in a save": signal.SIGKILL,
    "Ctrl-C in a save": signal.SIGINT,
    "SIGTERM in a save": signal.SIGTERM,
}
KINDS = tuple(SIGNALS)
EVERYTHING = ("timeout_seconds=30", f"save_interval={INTERVAL}", "fssdp.reshard_interval=7", "threads=1")


@dataclass(frozen=True)
class Kill:
    """One of them.

    Attributes:
        kind: of `KINDS`.
        step: last one logged before.
        lost: steps made again by the next start.
    """

    kind: str
    step: int
    lost: int


def cycle(root: Path, name: str, steps: int, kind: str, chance: random.Random) -> Kill:
    """Start the run, kill it, and see what is left."""
    log = root / "runs" / name / "metrics.jsonl"
    old = log.stat().st_ino if log.exists() else 0
    with Job(root, name, command(root, f"name={name}", f"steps={steps}", *EVERYTHING)) as job:
        before = newest(job.run)
        while not log.exists() or log.stat().st_ino == old:  # until the steps of the process before are dropped
            assert job.process.poll() is None, job.process.communicate()[0]
            time.sleep(POLL_SECONDS)
        job.wait_for_step(before + chance.randint(1, LONGEST))
        if kind.endswith("in a save"):
            wait_for_save(job)
        time.sleep(chance.uniform(0, 0.05))
        if kind == "one rank":
            os.kill(chance.choice(job.ranks()), SIGNALS[kind])
        else:
            os.killpg(job.process.pid, SIGNALS[kind])
        job.process.communicate(timeout=120)
        assert not (damaged := not_whole(job.run)), f"{kind}: {damaged}"
        assert job.process.returncode != 0, "it had ended before it could be killed"
        step = last_step(job.run)
        return Kill(kind, step, step - newest(job.run))


def newest(run: Path) -> int:
    """Step of the newest complete checkpoint, by its name, which the trainer does not look at."""
    complete = [p.parent.name for p in run.glob("checkpoints/*/manifest.json")]
    return max((int(match[1]) for name in complete if (match := re.fullmatch(r"step-(\d+)", name))), default=0)


def not_whole(run: Path) -> list[str]:
    """What is wrong with the checkpoints that are not called incomplete: damaged, or without part of a tensor."""
    wrong = []
    for path in checkpoints(run / "checkpoints"):
        try:
            verify(path, 0, 1)
            metadata = read_metadata(path)
            sizes = {file.name: file.stat().st_size for file in path.iterdir()}
            check_stored(str(path), metadata, metadata.state_dict_metadata, sizes)
        except ValueError as error:
            wrong.append(str(error))
    return wrong


def wait_for_save(job: Job) -> None:
    """Return when the folder of an incomplete checkpoint is seen."""
    while not any(job.run.glob("checkpoints/*.tmp")):
        assert job.process.poll() is None, job.process.communicate()[0]
        time.sleep(POLL_SECONDS / 5)


def compare(root: Path, cycles: int, seed: int) -> tuple[list[Kill], list[str]]:
    """All kills, and what is different at the end."""
    chance = random.Random(seed)
    steps = cycles * LONGEST + 2 * INTERVAL
    with Job(root, "unbroken", command(root, "name=unbroken", f"steps={steps}", *EVERYTHING)) as job:
        job.end(expect=0)
    kills = []
    for number in range(cycles):
        kills.append(cycle(root, "killed", steps, KINDS[number % len(KINDS)], chance))
        print(f"cycle {number + 1}/{cycles}: {kills[-1]}", file=sys.stderr, flush=True)
    with Job(root, "killed", command(root, "name=killed", f"steps={steps}", *EVERYTHING)) as job:
        job.end(expect=0)
    return kills, differences(root / "runs" / "killed", root / "runs" / "unbroken")


def report(kills: Sequence[Kill], different: Sequence[str]) -> str:
    """One line."""
    lost = [kill.lost for kill in kills]
    kinds = ", ".join(f"{sum(k.kind == kind for k in kills)} {kind}" for kind in KINDS)
    equal = "equal bit for bit" if not different else f"DIFFERENT: {', '.join(different[:10])}"
    return (
        f"{len(kills)} ends ({kinds}): {sum(lost) / len(lost):.1f} steps made again per end (most {max(lost)}, "
        f"a checkpoint every {INTERVAL}); final losses, weights, optimizer and planner state {equal}"
    )


def main() -> None:
    """Exit code 1 where something is different."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cycles", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        kills, different = compare(write_text(Path(folder)), arguments.cycles, arguments.seed)
    print(report(kills, different))
    sys.exit(bool(different))


if __name__ == "__main__":
    main()

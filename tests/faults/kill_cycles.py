"""Repeatedly end runs at random moments, while checkpoints are written, and check that nothing is lost.

    python -m tests.faults.kill_cycles --cycles 60 --how kill,ctrl-c,sigterm,destroy

Each cycle starts `hecate.train` on two processes, which write a checkpoint in the background after every step, and ends
it at a random moment: `kill` (SIGKILL to one rank, or to all processes), `ctrl-c` (SIGINT to the process group, as a
terminal does), `sigterm` (to the parent). `destroy` runs a different training script instead, which destroys its
process group in the middle of a save (`tests.faults.destroyed`).

After each cycle every checkpoint that is marked as complete must be complete (files, checksums, and chunks of every
tensor), the newest one must not be older than before, and a run that was asked to stop must have saved its last step.
After the last cycle the run continues to its end: weights, optimizer state, planner state, all losses and the
validation result must be bit for bit those of an uninterrupted run.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from time import sleep

import torch

from hecate.checkpoint.folder import find
from hecate.checkpoint.manifest import read_record
from tests.faults.jobs import (
    PATIENCE,
    TORCHRUN,
    Job,
    command,
    differences,
    last_step,
    own_environment,
    tensors,
    write_text,
)
from tests.faults.wholeness import missing

WAYS = ("kill", "ctrl-c", "sigterm", "destroy")
EXIT_CODES = {"ctrl-c": 130, "sigterm": 85}
LONGEST = 4
"""A cycle waits for at most this many steps."""
STEPS_A_CYCLE = 20
"""Steps of the run: more than a fast machine makes in a cycle."""
COMMON = ("timeout_seconds=30", "fssdp.reshard_interval=7", "threads=1")
SAVING = ("save_async=true", "save_interval=1", "save_keep=2")


@dataclass(frozen=True)
class Cycle:
    """How one cycle ended.

    Attributes:
        how: a name in `WAYS`.
        code: exit code.
        step: the last step that was made.
        kept: the step of the newest complete checkpoint.
        wrong: descriptions of what is wrong.
    """

    how: str
    code: int
    step: int
    kept: int
    wrong: tuple[str, ...]

    @property
    def lost(self) -> int:
        """Number of steps that the next start has to repeat."""
        return self.step - self.kept


@dataclass(frozen=True)
class Result:
    """All cycles, and the differences at the end from an uninterrupted run."""

    cycles: tuple[Cycle, ...]
    different: tuple[str, ...]

    @property
    def good(self) -> bool:
        """Whether nothing is wrong or different."""
        return not self.different and not any(cycle.wrong for cycle in self.cycles)


def end_trainer(root: Path, steps: int, how: str, chance: random.Random) -> Cycle:
    """Start the run, end it, and check what is left."""
    log = root / "runs" / "ended" / "metrics.jsonl"
    old = log.stat().st_ino if log.exists() else 0
    with Job(root, "ended", command(root, "name=ended", f"steps={steps}", *COMMON, *SAVING)) as job:
        begin = newest(job.run)
        # Until the steps of the process before are dropped.
        job.wait_until(lambda: log.exists() and log.stat().st_ino != old, "the run going on")
        job.wait_for_step(begin + chance.randint(1, LONGEST))
        if chance.random() < 0.5:
            job.wait_until(lambda: any(job.run.glob("checkpoints/*.tmp")), "a checkpoint being written")
        sleep(chance.uniform(0, 0.2))
        before = newest(job.run)
        send(job, how, chance)
        output, _ = job.process.communicate(timeout=PATIENCE)
    code, step, kept = job.process.returncode, last_step(job.run), newest(job.run)
    wrong = [f"{path.name}: {text}" for path in whole(job.run).values() for text in missing(path)]
    if kept < before:
        wrong.append(f"step {before} was saved, {kept} is there")
    if how in EXIT_CODES and (code, kept) != (EXIT_CODES[how], step):
        wrong.append(f"exit {code}, must be {EXIT_CODES[how]}; saved step {kept} of {step}")
    if "Traceback" in output and how != "kill":
        wrong.append(output)
    if code == 0:
        wrong.append("the run had ended before; STEPS_A_CYCLE is too small")
    return Cycle(how, code, step, kept, tuple(wrong))


def send(job: Job, how: str, chance: random.Random) -> None:
    """End the trainer."""
    if how == "ctrl-c":
        os.killpg(job.process.pid, signal.SIGINT)
    elif how == "sigterm":
        os.kill(job.process.pid, signal.SIGTERM)
    elif chance.random() < 0.5:
        os.kill(chance.choice(job.ranks()), signal.SIGKILL)
    else:
        os.killpg(job.process.pid, signal.SIGKILL)


def whole(run: Path) -> dict[int, Path]:
    """Checkpoints that are marked as complete, by step. The step is taken from the name, which the trainer ignores."""
    named = [
        (re.fullmatch(r"step-(\d+)", path.parent.name), path.parent) for path in run.glob("checkpoints/*/manifest.json")
    ]
    return {int(match[1]): path for match, path in named if match}


def newest(run: Path) -> int:
    """Step of the newest complete checkpoint; 0 without one."""
    return max(whole(run), default=0)


def end_script(root: Path, seed: int) -> Cycle:
    """Run `tests.faults.destroyed` once, and check what it leaves."""
    folder = root / "destroyed"
    folder.mkdir(exist_ok=True)
    start = {
        "args": (sys.executable, *TORCHRUN, "-m", "tests.faults.destroyed", str(folder), str(seed)),
        "cwd": Path(__file__).parents[2],
        "env": own_environment(),
        "text": True,
    }
    with Job(root, "destroyed", start) as job:
        output, _ = job.process.communicate(timeout=PATIENCE)
    code, step = job.process.returncode, max(saved_weights(folder), default=0)
    try:
        path = find(folder / "checkpoint")
    except ValueError:
        wrong = [] if step <= 1 and code else [f"no checkpoint is left, exit {code}\n{output}"]
        return Cycle("destroy", code, step, 0, tuple(wrong))
    kept, wrong = check_script(folder, path)
    if kept < step - 1:
        wrong.append(f"step {step - 1} was saved, {kept} is there")
    if kept < step and code == 0:
        wrong.append("exit 0, although the last step was not saved")
    if code != 0 and (kept == step or "loaded other weights" in output):
        wrong.append(output)
    for other in saved_weights(folder).keys() - {kept}:
        (folder / f"step-{other}.pt").unlink()
    return Cycle("destroy", code, step, kept, tuple(wrong))


def check_script(folder: Path, path: Path) -> tuple[int, list[str]]:
    """The step of the checkpoint `path`, and the names of tensors that differ from what was to be saved."""
    wrong, record = missing(path), read_record(path)
    if wrong or record is None:
        return 0, wrong or [f"{path}: has no record"]
    kept, found = int(record["extra"]["step"]), tensors(path)
    expected = saved_weights(folder).get(kept)
    if expected is None:
        return kept, [f"step {kept} was not saved by this script or the one before"]
    return kept, [f"{name} is not as saved" for name, value in expected.items() if not torch.equal(found[name], value)]


def saved_weights(folder: Path) -> dict[int, dict[str, torch.Tensor]]:
    """The weights by step, as `tests.faults.destroyed` wrote them."""
    return {int(path.stem.split("-")[1]): torch.load(path) for path in folder.glob("step-*.pt")}


def run_cycles(root: Path, cycles: int, seed: int, how: Sequence[str] = WAYS) -> Result:
    """Run `cycles` cycles, the ways in turn, in the folder `root`, which contains the text."""
    chance, done = random.Random(seed), list[Cycle]()
    order = [how[number % len(how)] for number in range(cycles)]
    trained = len([way for way in order if way != "destroy"])
    steps = (trained + 1) * STEPS_A_CYCLE
    for number, way in enumerate(order, start=1):
        own_seed = chance.randrange(10**6)
        try:
            if way == "destroy":
                done.append(end_script(root, own_seed))
            else:
                done.append(end_trainer(root, steps, way, random.Random(own_seed)))
        except Exception as error:  # whatever it is, the other cycles must still be run
            done.append(Cycle(way, 0, 0, 0, (f"{type(error).__name__}: {error}",)))
        cycle = done[-1]
        if way == "destroy" and cycle.wrong:
            shutil.rmtree(root / "destroyed")  # so that a loss is not counted again in the next cycle
        verdict = f"{len(cycle.wrong)} WRONG: {'; '.join(cycle.wrong)}" if cycle.wrong else "good"
        print(
            f"cycle {number}/{cycles}, seed {own_seed}: {way} after step {cycle.step}, exit {cycle.code}, "
            f"{cycle.lost} lost, {verdict}",
            file=sys.stderr,
            flush=True,
        )
    return Result(tuple(done), tuple(finish(root, steps)) if trained else ())


def finish(root: Path, steps: int) -> list[str]:
    """Differences between the run that was ended repeatedly and an uninterrupted one."""
    runs = [root / "runs" / name for name in ("ended", "undisturbed")]
    for run in runs:
        overrides = (f"name={run.name}", f"steps={steps}", f"save_interval={steps}", *COMMON)
        try:
            with Job(root, run.name, command(root, *overrides)) as job:
                job.end(expect=0)
        except (AssertionError, subprocess.TimeoutExpired) as error:
            return [f"{run.name} could not be finished: {error}"]
    return differences(*runs)


def report(result: Result, seed: int) -> str:
    """A table with a row per way, and the verdict."""
    lines = [f"{'how':<10}{'cycles':>7}{'wrong':>7}{'steps lost: mean':>18}{'most':>6}  exit codes"]
    for way in dict.fromkeys(cycle.how for cycle in result.cycles):
        own = [cycle for cycle in result.cycles if cycle.how == way]
        lost, wrong = [cycle.lost for cycle in own], sum(bool(cycle.wrong) for cycle in own)
        codes = sorted({cycle.code for cycle in own})
        counts = ", ".join(f"{code} ({sum(cycle.code == code for cycle in own)})" for code in codes)
        lines.append(f"{way:<10}{len(own):>7}{wrong:>7}{sum(lost) / len(lost):>18.2f}{max(lost):>6}  {counts}")
    equal = f"DIFFERENT: {', '.join(result.different[:10])}" if result.different else "equal bit for bit"
    verdict = "nothing lost, nothing half saved or half loaded" if result.good else "NOT GOOD"
    return "\n".join([*lines, f"seed {seed}: {verdict}; final losses, weights, optimizer and planner state {equal}"])


def ways(text: str) -> tuple[str, ...]:
    """Names from `WAYS`, separated by commas."""
    found = tuple(text.split(","))
    if not set(found) <= set(WAYS):
        raise argparse.ArgumentTypeError(f"{text!r}: must be some of {','.join(WAYS)}")
    return found


def main() -> None:
    """Run the command line; exit code 1 if something is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cycles", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--how", type=ways, default=WAYS, help=f"of {','.join(WAYS)}; in turn")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # so that clean-up also runs then
    with tempfile.TemporaryDirectory() as folder:
        result = run_cycles(write_text(Path(folder)), arguments.cycles, arguments.seed, arguments.how)
    print(report(result, arguments.seed))
    sys.exit(not result.good)


if __name__ == "__main__":
    main()

"""A run that is signalled, killed or requeued ends with the losses, weights and optimizer of an uninterrupted run."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hecate.checkpoint.history import latest
from tests.faults.jobs import POLL_SECONDS, TINY, TORCHRUN, Job, command, differences, last_step, write_text
from tests.faults.wholeness import missing
from tests.workers import free_port

STEPS, INTERVAL = 80, 20
RUN = (f"steps={STEPS}", f"save_interval={INTERVAL}", "timeout_seconds=60")
LAUNCH = Path(__file__).parents[2] / "launch"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of this module's runs, with a text to train on and `unbroken`, a finished run."""
    folder = write_text(tmp_path_factory.mktemp("interruptions"))
    with Job(folder, "unbroken", command(folder, "name=unbroken", *RUN)) as job:
        job.end(expect=0)
    assert last_step(folder / "runs" / "unbroken") == STEPS
    return folder


def assert_like_unbroken(root: Path, name: str) -> None:
    assert differences(root / "runs" / name, root / "runs" / "unbroken") == []


def press_ctrl_c(job: Job, target: str) -> None:
    if target == "the terminal":
        os.killpg(job.process.pid, signal.SIGINT)
    else:
        os.kill(job.ranks()[1] if target == "one rank" else job.process.pid, signal.SIGINT)


def stop(root: Path, name: str, send: Callable[[Job], None], code: int, *overrides: str) -> None:
    """Start a run or go on with it, interrupt it after three steps, and check what is left."""
    log = root / "runs" / name / "metrics.jsonl"
    before = log.read_text() if log.exists() else ""
    done = last_step(log.parent)
    with Job(root, name, command(root, f"name={name}", *RUN, *overrides)) as job:
        job.wait_for_step(done + 3)
        send(job)
        output = job.end(expect=code)
    stopped = last_step(job.run)
    assert done + 3 <= stopped < STEPS
    # With the seconds that each step took: none was made again.
    assert log.read_text().startswith(before)
    assert f"asked to stop: saved step {stopped}, exit {code}" in output
    assert "Traceback" not in output
    newest = latest(job.run / "checkpoints")
    assert newest is not None
    assert newest.name == f"step-{stopped:08d}"
    assert missing(newest) == []
    assert not (job.run / "lock").exists()


def stop_before_the_first_step(root: Path, name: str, send: Callable[[Job], None], code: int) -> None:
    with Job(root, name, command(root, f"name={name}", *RUN)) as job:
        job.wait_until(lambda: len(job.ranks()) == 2, "two ranks")
        send(job)
        assert "Traceback" not in job.end(expect=code)
    assert last_step(job.run) == 0


def finish(root: Path, name: str) -> None:
    log = root / "runs" / name / "metrics.jsonl"
    before = log.read_text()
    with Job(root, name, command(root, f"name={name}", *RUN)) as job:
        job.end(expect=0)
    assert log.read_text().startswith(before)
    assert_like_unbroken(root, name)


def refuse_a_second_trainer(job: Job) -> None:
    """The folder of a run that is at work stays as it is."""
    for rank in job.ranks():  # they must not end before the other job has started
        os.kill(rank, signal.SIGSTOP)
    before = sorted((path.name, path.stat().st_mtime_ns) for path in job.run.rglob("*"))
    with Job(job.root, job.run.name, command(job.root, f"name={job.run.name}", "overwrite=true", *RUN)) as other:
        output = other.end(expect=1)
    assert before == sorted((path.name, path.stat().st_mtime_ns) for path in job.run.rglob("*"))
    assert "another trainer is at work in it (host" in output
    assert any(f"process {rank})" in output for rank in job.ranks())
    for rank in job.ranks():
        os.kill(rank, signal.SIGCONT)


def signal_one_rank_while_another_trainer_is_refused(job: Job) -> None:
    refuse_a_second_trainer(job)
    os.kill(job.ranks()[1], signal.SIGTERM)


def signal_the_parent(job: Job) -> None:
    os.kill(job.process.pid, signal.SIGUSR1)


def terminate_the_parent(job: Job) -> None:
    os.kill(job.process.pid, signal.SIGTERM)


def press_ctrl_c_in_the_terminal(job: Job) -> None:
    press_ctrl_c(job, "the terminal")


# One run is started again after each signal, because starting the processes is what takes the time.


def test_a_run_goes_on_after_signals_to_parent_and_terminal(root: Path) -> None:
    stop(root, "often", signal_the_parent, 85)
    stop(root, "often", press_ctrl_c_in_the_terminal, 130, "save_interval=1")
    finish(root, "often")


def test_a_run_goes_on_after_signals_before_and_after_its_first_step(root: Path) -> None:
    stop_before_the_first_step(root, "early", terminate_the_parent, 85)
    stop_before_the_first_step(root, "early", press_ctrl_c_in_the_terminal, 130)
    stop(root, "early", signal_one_rank_while_another_trainer_is_refused, 85)
    finish(root, "early")


@pytest.mark.long
@pytest.mark.parametrize("target", ["the parent", "one rank"])
def test_ctrl_c_saves_and_ends(root: Path, target: str) -> None:
    name = f"ctrl-c-{target.split()[1]}"
    stop(root, name, lambda job: press_ctrl_c(job, target), 130, "save_interval=1")
    finish(root, name)


def test_second_ctrl_c_ends_at_once(root: Path) -> None:
    with Job(root, "twice", command(root, "name=twice", *RUN, "save_interval=1")) as job:
        job.wait_until(lambda: len(list(job.run.glob("checkpoints/*/manifest.json"))) > 1, "two checkpoints")
        ranks = job.ranks()
        for _ in range(2):
            press_ctrl_c(job, "the terminal")
            time.sleep(0.05)  # two signals at the same time would be delivered as one
        output = job.end(expect=130)
        assert not set(ranks) & set(job.ranks())
    assert "Traceback" not in output
    assert all(missing(path.parent) == [] for path in job.run.glob("checkpoints/*/manifest.json"))


@pytest.mark.long
def test_ctrl_c_under_torchrun_saves(root: Path) -> None:
    start = command(root, "name=agent-c", *RUN, "save_interval=1", launcher=TORCHRUN)
    with Job(root, "agent-c", start) as job:
        job.wait_for_step(3)
        press_ctrl_c(job, "the terminal")
        output = job.end(expect=1)  # torchrun's own code
    stopped = last_step(job.run)
    assert f"asked to stop: saved step {stopped}, exit 130" in output
    assert missing(job.run / "checkpoints" / f"step-{stopped:08d}") == []
    with Job(root, "agent-c", command(root, "name=agent-c", *RUN)) as job:
        job.end(expect=0)
    assert_like_unbroken(root, "agent-c")


def test_torchrun_restarts_all_ranks_where_one_is_killed(root: Path) -> None:
    launcher = (*TORCHRUN, "--max-restarts=1")
    # overwrite=true: a restart must not take the run of its own launch for an old one.
    start = command(root, "name=elastic", "overwrite=true", *RUN, launcher=launcher)
    with Job(root, "elastic", start) as job:
        job.wait_for_step(INTERVAL + 3)
        while not (job.run / "checkpoints" / f"step-{INTERVAL:08d}").exists():
            assert job.process.poll() is None
        log = job.run / "metrics.jsonl"
        before = log.read_text().splitlines()[:INTERVAL]
        os.kill(job.ranks()[1], signal.SIGKILL)
        job.end(expect=0)
    # With the seconds that each step took: none of them was made again.
    assert log.read_text().splitlines()[:INTERVAL] == before
    assert_like_unbroken(root, "elastic")


@pytest.mark.long
def test_signal_to_torchrun_saves(root: Path) -> None:
    env = {"PYTHON": sys.executable, "DEVICES": "2"}
    start = command(root, "name=agent", *RUN)
    start["args"] = (str(LAUNCH / "torchrun.sh"), f"data.path={root / 'text'}", *TINY, "name=agent", *RUN)
    start["env"] |= env
    with Job(root, "agent", start) as job:
        job.wait_for_step(3)
        os.kill(job.process.pid, signal.SIGUSR1)
        assert "asked to stop: saved step" in job.end(expect=1)
    with Job(root, "agent", command(root, "name=agent", *RUN)) as job:
        job.end(expect=0)
    assert_like_unbroken(root, "agent")


SRUN = f"""#!{sys.executable}
# SLURM's srun as the script uses it: the command once a task, signals to every task, the highest exit code.
import os, signal, subprocess, sys
tasks = []
signal.signal(signal.SIGUSR1, lambda number, frame: [task.send_signal(number) for task in tasks])
command = sys.argv[sys.argv.index("bash"):]
for i in range(1 if "check" in command else 2):
    env = {{**os.environ, "SLURM_PROCID": str(i), "SLURM_LOCALID": str(i)}}
    tasks.append(subprocess.Popen(command, env=env))
codes = [task.wait() for task in tasks]
sys.exit(max(128 - code if code < 0 else code for code in codes))
"""
SCONTROL = """#!/usr/bin/env bash
case "$1 $2" in
"show job") printf 'JobId=17 JobName=hecate\n   Command=/somewhere/launch/slurm.sbatch steps=3\n' ;;
"show hostnames") echo 127.0.0.1 ;;
*) echo "$@" >> requeued ;;
esac
"""


# A stand-in for the trainer, with the behaviour that the batch script sees.
TRAINER = """#!/usr/bin/env bash
trap 'touch "saving$RANK"; while [ ! -e saved ]; do sleep 0.01; done; exit 85' USR1
touch "ready$RANK"
while true; do sleep 0.01; done
"""


def slurm(root: Path, restarts: int) -> dict[str, Any]:
    """Like `command`, for the batch script: with SLURM's variables, and stand-ins for srun and scontrol."""
    bin_folder = root / "bin"
    bin_folder.mkdir(exist_ok=True)
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (bin_folder / name).write_text(text)
        (bin_folder / name).chmod(stat.S_IRWXU)
    start = command(root)
    start["args"] = ("bash", str(LAUNCH / "slurm.sbatch"), f"data.path={root / 'text'}", *TINY, "name=slurm", *RUN)
    start["env"] |= {
        "PATH": f"{bin_folder}:{os.environ['PATH']}",
        "PYTHON": sys.executable,
        "PORT": str(free_port()),
        "GLOO_SOCKET_IFNAME": "lo",
        "SLURM_JOB_ID": "17",
        "SLURM_JOB_NODELIST": "node",
        "SLURM_JOB_NUM_NODES": "1",
        "SLURM_NTASKS_PER_NODE": "2",
        "SLURM_RESTART_COUNT": str(restarts),
    }
    return start


def test_slurm_job_is_requeued_and_goes_on(root: Path) -> None:
    with Job(root, "slurm", slurm(root, restarts=0)) as job:
        job.wait_for_step(3)
        os.kill(job.process.pid, signal.SIGUSR1)  # as `--signal B:USR1@120` does: the batch script alone
        job.end(expect=85)
    assert (root / "requeued").read_text() == "requeue 17\n"
    with Job(root, "slurm", slurm(root, restarts=1)) as job:
        job.end(expect=0)
    assert (root / "requeued").read_text() == "requeue 17\n"
    assert_like_unbroken(root, "slurm")


@pytest.mark.parametrize(
    ("signals", "requeued"),
    [
        ([signal.SIGUSR1], True),
        ([signal.SIGTERM], False),  # scancel
        ([signal.SIGUSR1, signal.SIGTERM], True),  # the time limit
    ],
    ids=["asked", "cancelled", "out of time"],
)
def test_slurm_job_that_was_cancelled_stays_so(tmp_path: Path, signals: list[signal.Signals], requeued: bool) -> None:
    trainer = tmp_path / "trainer"
    trainer.write_text(TRAINER)
    trainer.chmod(stat.S_IRWXU)
    start = slurm(tmp_path, restarts=0)
    start["env"]["PYTHON"] = str(trainer)
    with Job(tmp_path, "slurm", start) as job:
        wait_for_files(job, "ready*")
        for sign in signals:
            os.kill(job.process.pid, sign)
            wait_for_files(job, "saving*")  # bash may lose one of two signals that come at once
        (tmp_path / "saved").touch()
        job.end(expect=85)
    assert (tmp_path / "requeued").exists() == requeued


def test_slurm_job_whose_tasks_are_starting_is_requeued(tmp_path: Path) -> None:
    trainer = tmp_path / "trainer"
    trainer.write_text('#!/usr/bin/env bash\ntouch "ready$RANK"\nexec sleep 60\n')  # no handler yet: Python imports
    trainer.chmod(stat.S_IRWXU)
    start = slurm(tmp_path, restarts=0)
    start["env"]["PYTHON"] = str(trainer)
    with Job(tmp_path, "slurm", start) as job:
        wait_for_files(job, "ready*")
        os.kill(job.process.pid, signal.SIGUSR1)
        job.end(expect=128 + signal.SIGUSR1)
    assert (tmp_path / "requeued").read_text() == "requeue 17\n"


def test_slurm_job_finds_its_project_or_says_so(tmp_path: Path) -> None:
    start = slurm(tmp_path, restarts=0)
    del start["env"]["PYTHON"]
    with Job(tmp_path, "slurm", start) as job:
        assert "no /somewhere/.venv/bin/python; set PYTHON" in job.end(expect=1)


def wait_for_files(job: Job, pattern: str) -> None:
    """The process ids of both tasks."""
    while len(list(job.root.glob(pattern))) < 2:
        assert job.process.poll() is None
        time.sleep(POLL_SECONDS)


def test_scripts_are_valid_bash() -> None:
    for script in ("slurm.sbatch", "torchrun.sh", "multinode.sh", "install_torch.sh"):
        subprocess.run(["bash", "-n", LAUNCH / script], check=True)

"""launch/slurm.sbatch under a real SLURM of one node on 127.0.0.1, with stand-ins for the trainer.

Skipped where SLURM and munge are not installed (Debian: slurm-wlm, munge), or for users other than root.
"""

from __future__ import annotations

import os
import shutil
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from hecate.train.loggers import read_metrics
from tests.faults.jobs import TINY, last_step, write_text
from tests.workers import free_port

SCRIPT = Path(__file__).parents[2] / "launch" / "slurm.sbatch"
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel")
PATIENCE = 120.0
CONF = """
ClusterName=hecate
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
SlurmdPort={daemon}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={root}/munge.socket
CredType=cred/munge
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=sched_interval=2
MpiDefault=none
ReturnToService=2
SlurmdParameters=config_overrides
NodeName={host} NodeAddr=127.0.0.1 CPUs=8 State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""
SAVES = """#!/usr/bin/env bash
# Writes where the group meets; saves and asks for a requeue on SIGUSR1; after that it finishes.
trap 'exit 85' USR1
echo "$MASTER_PORT $WORLD_SIZE $LOCAL_RANK" > "task-$SLURM_JOB_ID-$RANK-${SLURM_RESTART_COUNT:-0}"
while [ "${SLURM_RESTART_COUNT:-0}" -eq 0 ]; do sleep 0.1; done
"""
STARTS = """#!/usr/bin/env bash
# Has no handler for signals yet, like Python while it imports.
touch "task-$SLURM_JOB_ID-$RANK-${SLURM_RESTART_COUNT:-0}"
exec sleep 100
"""


class Cluster:
    """SLURM's commands for jobs submitted from the folder `work`."""

    def __init__(self, root: Path) -> None:
        self.work = root / "work"
        self.work.mkdir()
        self.environment = {**os.environ, "SLURM_CONF": str(root / "slurm.conf")}

    def call(self, *command: str, **environment: str) -> str:
        done = subprocess.run(
            command,
            cwd=self.work,
            env={**self.environment, **environment},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def submit(self, script: Path, *words: str, **environment: str) -> str:
        """Id of a new job of two tasks on the node."""
        sizes = ("--nodes=1", "--ntasks-per-node=2", "--gpus-per-node=0", "--cpus-per-task=1")
        return self.call("sbatch", "--parsable", *sizes, str(script), "steps=3", *words, **environment).strip()

    def job(self, number: str) -> dict[str, str]:
        words = self.call("scontrol", "show", "job", number).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def tasks(self, number: str, restarts: int) -> list[str]:
        """What the two tasks of a job have written."""
        files = [self.work / f"task-{number}-{rank}-{restarts}" for rank in range(2)]
        wait_until(lambda: all(file.exists() for file in files), f"tasks of job {number}, restart {restarts}")
        return [file.read_text() for file in files]

    def started_again(self, number: str) -> bool:
        """Whether a requeued job runs again, without the two minutes that SLURM lets it wait."""
        if self.job(number)["Reason"] == "BeginTime":
            subprocess_output(self, "scontrol", "update", f"jobid={number}", "StartTime=now")
        return (self.work / f"task-{number}-0-1").exists()


def wait_until(happened: Callable[[], bool], what: str) -> None:
    end = time.monotonic() + PATIENCE
    while not happened():
        assert time.monotonic() < end, what
        time.sleep(0.1)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    if lacking := [program for program in PROGRAMS if shutil.which(program) is None]:
        pytest.skip(f"SLURM is not installed: no {', '.join(lacking)}")
    if os.geteuid() != 0:
        pytest.skip("slurmd needs root")
    root = tmp_path_factory.mktemp("slurm")
    for name in ("state", "spool"):
        (root / name).mkdir()
    host = socket.gethostname().split(".")[0]
    conf = CONF.format(host=host, root=root, controller=free_port(), daemon=free_port())
    (root / "slurm.conf").write_text(conf)
    (root / "key").write_bytes(os.urandom(1024))
    (root / "key").chmod(stat.S_IRUSR)
    for name, text in (("saves", SAVES), ("starts", STARTS)):
        (root / name).write_text(text)
        (root / name).chmod(stat.S_IRWXU)
    made = Cluster(root)
    munge = {"key-file": "key", "socket": "munge.socket", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
    daemons = (
        ("munged", "--foreground", "--force", *(f"--{option}={root / file}" for option, file in munge.items())),
        ("slurmctld", "-D"),
        ("slurmd", "-D"),
    )
    running = []
    try:
        for daemon in daemons:
            running.append(subprocess.Popen(daemon, env=made.environment, stderr=subprocess.DEVNULL))
            time.sleep(1)
        wait_until(lambda: "idle" in subprocess_output(made, "sinfo", "--noheader"), "the node is idle")
        yield made
    finally:
        for process in reversed(running):
            process.terminate()
            process.wait(30)


def subprocess_output(cluster: Cluster, *command: str) -> str:
    """Output of a command that may fail while daemons start."""
    return subprocess.run(command, env=cluster.environment, capture_output=True, text=True, check=False).stdout


def test_two_jobs_share_a_node_and_are_requeued(cluster: Cluster) -> None:
    trainer = str(cluster.work.parent / "saves")
    jobs = [cluster.submit(SCRIPT, PYTHON=trainer) for _ in range(2)]
    told = [cluster.tasks(job, 0) for job in jobs]  # both run at the same time
    ports = [{line.split()[0] for line in lines} for lines in told]
    assert [len(found) for found in ports] == [1, 1]
    assert ports[0] != ports[1]
    assert [line.split()[1:] for line in told[0]] == [["2", "0"], ["2", "1"]]
    for job in jobs:
        cluster.call("scancel", "--signal=USR1", "--batch", job)
        wait_until(lambda job=job: cluster.job(job)["Restarts"] == "1", f"requeue of job {job}")
    for job in jobs:
        wait_until(lambda job=job: cluster.started_again(job), f"start of job {job}")
        cluster.tasks(job, 1)
        wait_until(lambda job=job: cluster.job(job)["JobState"] == "COMPLETED", f"end of job {job}")


@pytest.mark.long
def test_a_training_run_is_requeued_and_goes_on(cluster: Cluster) -> None:
    try:
        socket.gethostbyname(socket.gethostname().split(".")[0])
    except OSError:
        pytest.skip("the name of this host does not resolve")
    write_text(cluster.work)
    words = (*TINY, f"data.path={cluster.work}/text", "name=run", "steps=400", "timeout_seconds=300")
    job = cluster.submit(SCRIPT, *words, PYTHON=sys.executable, GLOO_SOCKET_IFNAME="lo")
    run = cluster.work / "runs" / "run"
    wait_until(lambda: last_step(run) >= 3, "three steps")
    cluster.call("scancel", "--signal=USR1", "--batch", job)
    wait_until(lambda: cluster.job(job)["Restarts"] == "1", "requeue")
    stopped = last_step(run)
    assert 3 <= stopped < 400
    wait_until(lambda: cluster.started_again(job) or last_step(run) > stopped, "start")
    wait_until(lambda: cluster.job(job)["JobState"] == "COMPLETED", "end")
    assert [m["step"] for m in read_metrics(run / "metrics.jsonl")] == list(range(1, 401))
    log = (cluster.work / f"hecate-{job}.log").read_text()
    assert f"asked to stop: saved step {stopped}, exit 85" in log
    assert f"resumed from step {stopped} of 400" in log


def test_a_job_that_is_still_starting_is_requeued(cluster: Cluster) -> None:
    job = cluster.submit(SCRIPT, PYTHON=str(cluster.work.parent / "starts"))
    cluster.tasks(job, 0)
    cluster.call("scancel", "--signal=USR1", "--batch", job)
    wait_until(lambda: cluster.job(job)["Restarts"] == "1", "requeue")
    cluster.call("scancel", job)


def test_a_job_that_cannot_start_ends_at_once_and_says_why(cluster: Cluster) -> None:
    copy = cluster.work / "launch" / "copy.sbatch"  # a project without an environment, submitted from another folder
    copy.parent.mkdir()
    shutil.copy(SCRIPT, copy)
    job = cluster.submit(copy)
    wait_until(lambda: cluster.job(job)["JobState"] == "FAILED", "failure")
    said = (cluster.work / f"hecate-{job}.log").read_text()
    assert f"no {cluster.work}/.venv/bin/python; set PYTHON" in said

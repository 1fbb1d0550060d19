"""Which signals ask a run to stop, with which exit code, and when a process ends at once."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from datetime import timedelta
from signal import SIGINT, SIGTERM, SIGUSR1, SIGUSR2
from unittest import mock

import pytest

from hecate.errors import MissingRankError
from hecate.train.distributed import _requeued
from hecate.train.settings import Settings
from hecate.train.signals import StopRequest, exit_code
from tests.faults.jobs import own_environment
from tests.forked import Program
from tests.train.configs import config

REQUEUE = 85


@pytest.mark.parametrize(
    ("numbers", "code", "at_once"),
    [
        ([SIGTERM], REQUEUE, False),
        ([SIGUSR1, SIGTERM], REQUEUE, False),  # SLURM's time limit
        ([SIGTERM, SIGTERM], REQUEUE, False),
        ([SIGINT], 130, False),
        ([SIGUSR2], 130, False),  # from the parent
        ([SIGINT, SIGUSR2], 130, False),  # one Ctrl-C, from the terminal and from the parent
        ([SIGUSR2, SIGINT], 130, False),
        ([SIGINT, SIGUSR1], 130, False),
        ([SIGUSR1, SIGINT], 130, False),
        ([SIGINT, SIGINT], 130, True),
        ([SIGINT, SIGUSR2, SIGINT], 130, True),
        ([SIGINT, SIGTERM], 130, True),  # the second one, as torchrun passes it on
    ],
)
def test_only_a_second_ctrl_c_ends_a_step(numbers: list[signal.Signals], code: int, at_once: bool) -> None:
    request = StopRequest()
    request.deferred = True
    assert [request.note(number) for number in numbers] == [False] * (len(numbers) - 1) + [at_once]
    assert request.signal is not None
    assert exit_code(request.signal, REQUEUE) == code


@pytest.mark.parametrize("number", [SIGINT, SIGTERM, SIGUSR1, SIGUSR2])
def test_before_the_first_step_nobody_waits(number: signal.Signals) -> None:
    assert StopRequest().note(number)


# The main thread waits for a key that nobody sets, outside Python, as it does for a rank that hangs.
HANGING = """
import sys
import time
from datetime import timedelta
from torch.distributed import TCPStore
from hecate.train.signals import listening
store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
with listening(85) as stop:
    stop.deferred = sys.argv[1] == "deferred"
    print("ready", flush=True)
    store.wait(["never"], timedelta(seconds=300))
"""


@pytest.mark.parametrize(("deferred", "said"), [(True, "SIGINT twice"), (False, "SIGINT before the first step")])
def test_ctrl_c_ends_a_process_that_hangs(deferred: bool, said: str) -> None:
    process = Program(("-c", HANGING, "deferred" if deferred else ""), env=own_environment())
    try:
        while process.output() != "ready\n":
            assert process.poll() is None
            time.sleep(0.01)
        if deferred:
            process.send_signal(SIGINT)
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(1)
        process.send_signal(SIGINT)
        _, errors = process.communicate(timeout=100)
    finally:
        process.kill()
    assert process.returncode == 130
    assert errors == f"{said}: exit 130\n"


def test_a_run_in_which_another_rank_is_missing_asks_for_a_requeue(capsys: pytest.CaptureFixture[str]) -> None:
    with (
        mock.patch.object(sys, "last_value", None, create=True),
        pytest.raises(SystemExit) as ended,
        _requeued(Settings.from_config(config()), 1),
    ):
        raise MissingRankError([0], timedelta(seconds=5))
    assert ended.value.code == 85
    assert capsys.readouterr().err == "rank 1: rank 0 is missing: no heartbeat for 5 s; it died or hangs; exit 85\n"

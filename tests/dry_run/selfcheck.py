"""Faults made on purpose, each with the kind under which the fake device must report it, and code without faults."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from tests.dry_run.device import FakeDevice

__all__ = ["missed"]


def host_read() -> None:
    torch.ones(2, device="cuda").sum().item()


def host_copy() -> None:
    torch.ones(2, device="cuda").cpu()


def pageable_copy() -> None:
    torch.tensor([1, 2], device="cuda")


def element() -> None:
    torch.ones(3, device="cuda")[0] = 2  # torch copies the number; a slice would be filled with it


def pinned_but_blocking() -> None:
    torch.ones(2).pin_memory().to("cuda")


def index_on_cpu() -> None:
    _ = torch.ones(3, device="cuda")[torch.tensor([0, 2])]


def cpu_scalar() -> None:
    _ = torch.ones(3, device="cuda") * torch.tensor(2.0)


def unaligned() -> None:
    rows = torch.ones(4, 16, device="cuda", dtype=torch.bfloat16).flatten()[1:33].view(4, 8)  # the address is not
    weight = torch.ones(2, 8, 16, device="cuda", dtype=torch.bfloat16)
    ends = torch.arange(2, 5, 2, device="cuda", dtype=torch.int32)
    torch.nn.functional.grouped_mm(rows, weight, offs=ends)


def host_wait() -> None:
    torch.cuda.current_stream().synchronize()


def unordered_read() -> None:
    with torch.cuda.stream(torch.cuda.Stream()):
        made = torch.ones(3, device="cuda")
    _ = made + 1


def freed_too_early() -> None:
    made, side = torch.ones(3, device="cuda"), torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        made.add_(1)
    del made
    torch.zeros(1, device="cuda")


def in_order() -> None:
    """What the runtime does: pinned copies, side streams that wait and are waited for."""
    made, side = torch.arange(4).pin_memory().to("cuda", non_blocking=True), torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        made.add_(1)
        done = side.record_event()
    torch.cuda.current_stream().wait_event(done)
    made[:2] = 3
    del made
    torch.zeros(1, device="cuda")


EXPECTED: Mapping[Callable[[], None], str | None] = {
    host_read: "host read",
    host_copy: "host read",
    pageable_copy: "pageable copy",
    element: "pageable copy",
    pinned_but_blocking: "pageable copy",
    index_on_cpu: "mixed devices",
    cpu_scalar: "CPU scalar",
    unaligned: "unaligned",
    host_wait: "host wait",
    unordered_read: "streams",
    freed_too_early: "streams",
    in_order: None,
}


def missed() -> list[str]:
    """Names of what was not reported as expected, with what was."""
    wrong = []
    for made, kind in EXPECTED.items():
        device = FakeDevice()
        device.strict = True
        error = ""
        with device.running():
            torch.cuda.init()
            try:
                made()
            except Exception as raised:  # torch itself may refuse, after the fault was noted
                error = f"{type(raised).__name__}: {raised}"
        kinds = {fault.kind for fault in device.faults}
        if kinds != ({kind} if kind else set()):
            wrong.append(f"{made.__name__}: found {sorted(kinds)}, expected {kind} {error}")
    return wrong

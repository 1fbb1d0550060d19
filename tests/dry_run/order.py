"""Checks what the ranks of a job launch: sizes that match, one order in every group, no circle of waits.

Pure: it reads `Launch` records, wherever they come from. A group may have members of which nothing was recorded; what
they would do is not checked.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise, zip_longest

from tests.dry_run.records import Launch

__all__ = ["faults_in_order"]


Logs = Mapping[int, Sequence[Launch]]
"""rank -> its launches, in the order in which its host made them."""

Call = tuple[int, int]
"""(rank, position in its log)."""


def faults_in_order(logs: Logs) -> list[str]:
    """All that is wrong with these logs, in words; empty if nothing is."""
    collectives, faults = _matched_collectives(logs)
    transfers, more = _matched_messages(logs)
    faults += more
    # If calls do not match, there is no telling who waits for whom.
    return faults or _circles(logs, [*collectives, *transfers])


def _matched_collectives(logs: Logs) -> tuple[list[list[Call]], list[str]]:
    """The n-th collectives of a group on all its ranks belong together; they must be alike."""
    by_group: dict[str, dict[int, list[Call]]] = {}
    for rank, log in logs.items():
        for i, launch in enumerate(log):
            if launch.collective:
                of_member = by_group.setdefault(launch.group, {m: [] for m in launch.members if m in logs})
                of_member[rank].append((rank, i))
    matched, faults = [], []
    for group, calls in by_group.items():
        for number, together in enumerate(zip_longest(*calls.values())):
            present = [call for call in together if call is not None]
            if fault := _unlike(logs, list(calls), together):
                faults.append(f"group {group}, collective {number}: {fault}")
                break
            matched.append(present)
    return matched, faults


def _unlike(logs: Logs, ranks: Sequence[int], calls: Sequence[Call | None]) -> str | None:
    """In what way calls that belong together differ; None if they fit."""
    launches = {rank: None if call is None else logs[rank][call[1]] for rank, call in zip(ranks, calls, strict=True)}
    first, one = next((r, launch) for r, launch in launches.items() if launch is not None)
    for rank, launch in launches.items():
        if launch is None:
            return f"rank {first} calls {one.operation} ({one.where}), rank {rank} nothing"
        if (launch.operation, launch.num_bytes) != (one.operation, one.num_bytes):
            return (
                f"rank {first} calls {one.operation} of {one.num_bytes} bytes ({one.where}), rank {rank} "
                f"{launch.operation} of {launch.num_bytes} ({launch.where})"
            )
        for other, theirs in launches.items():
            if theirs is None or not launch.sent:
                continue
            sends = launch.sent[launch.members.index(other)]
            takes = theirs.received[theirs.members.index(rank)] if theirs.received else None
            if sends != takes:
                return f"rank {rank} sends {sends} bytes to rank {other}, which expects {takes} ({launch.where})"
    return None


def _matched_messages(logs: Logs) -> tuple[list[list[Call]], list[str]]:
    """The n-th send from one rank to another in a group belongs to the n-th receive there; sizes must be equal."""
    halves: dict[tuple[str, int, int], tuple[list, list]] = defaultdict(lambda: ([], []))
    for rank, log in logs.items():
        for i, launch in enumerate(log):
            for m in launch.messages:
                if m.peer in logs:
                    src, dst = (rank, m.peer) if m.sends else (m.peer, rank)
                    half = halves[launch.group, src, dst][0 if m.sends else 1]
                    half.append(((rank, i), m.num_bytes, launch.where))
    matched, faults = [], []
    for (group, src, dst), (sends, receives) in halves.items():
        for number, (sent, received) in enumerate(zip_longest(sends, receives)):
            what = f"group {group}, message {number} from rank {src} to rank {dst}"
            if sent is None or received is None:
                missing, found = ("no send", received) if sent is None else ("no receive", sent)
                faults.append(f"{what}: {missing} ({found[2]})")
                break
            if sent[1] != received[1]:
                faults.append(f"{what}: {sent[1]} bytes are sent ({sent[2]}), {received[1]} expected ({received[2]})")
                break
            matched.append([sent[0], received[0]])
    return matched, faults


def _circles(logs: Logs, together: Sequence[Sequence[Call]]) -> list[str]:
    """A circle of waits, if every rank begins a call only when its call before has ended.

    Real streams wait for less, but a device that has no room for two kernels at once waits for that much: NCCL asks for
    one order over all communicators for this reason. A call ends when all calls that belong to it have begun.
    """
    begun_before: dict[tuple[Call, str], list[tuple[Call, str]]] = defaultdict(list)
    for rank, log in logs.items():
        for i in range(len(log)):
            begun_before[(rank, i), "ends"].append(((rank, i), "begins"))
        for i, after in pairwise(range(len(log))):
            begun_before[(rank, after), "begins"].append(((rank, i), "ends"))
    for calls in together:
        for call in calls:
            begun_before[call, "ends"] += [(other, "begins") for other in calls if other != call]
    circle = _circle(begun_before)
    if circle is None:
        return []
    waits = dict.fromkeys(call for call, _ in circle)
    said = [f"rank {r}: {logs[r][i].operation} in group {logs[r][i].group} ({logs[r][i].where})" for r, i in waits]
    return ["a circle of waits: " + "; ".join(said)]


def _circle(graph: Mapping) -> list | None:
    """The nodes of a circle of `graph`, node -> nodes; None if there is none. Depth first, without recursion."""
    done: set = set()
    for start in list(graph):
        path: dict = {} if start in done else {start: None}
        todo: list[Iterator] = [iter(graph[node]) for node in path]
        while todo:
            other = next((n for n in todo[-1] if n not in done), None)
            if other in path:
                nodes = list(path)
                return nodes[nodes.index(other) :]
            if other is not None:
                path[other] = None
                todo.append(iter(graph.get(other, ())))
            else:
                done.add(path.popitem()[0])
                todo.pop()
    return None

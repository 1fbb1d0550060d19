"""What is run, and what one rank did. Plain data, so that the process that compares ranks need not import torch."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Case", "Fault", "Launch", "Message", "Outcome"]


@dataclass(frozen=True)
class Case:
    """A model and settings.

    `replicas` > 1: a (replicate, shard) mesh. `by_node`: the node-aware dispatch must pay, so that it is looked at.
    `halves`: tokens travel in two halves.
    """

    model: str
    policy: str
    rematerialize: bool
    world: int
    per_node: int
    dense: str = "fsdp"
    replicas: int = 1
    by_node: bool = False
    kernels: str = "hecate"
    splits: str = "host"
    halves: bool = False

    def __str__(self) -> str:
        """One line for people."""
        parts = [self.model, self.policy, f"{self.world} ranks", f"dense={self.dense}"]
        parts += ["rematerialize"] if self.rematerialize else []
        parts += [f"{self.replicas} replicas"] if self.replicas > 1 else []
        parts += ["by node"] if self.by_node else []
        parts += [f"{self.kernels}'s operations"] if self.kernels == "torch" else []
        parts += ["in halves"] if self.halves else []
        parts += ["splits on the device"] if self.splits == "device" else []
        return ", ".join(parts)


@dataclass(frozen=True, order=True)
class Fault:
    """Something that would break or stall on CUDA.

    Attributes:
        kind: "host read" (the host waits for the device), "pageable copy" (it waits for the copy), "mixed devices",
            "CPU scalar", "unaligned", "host wait", "message outside a group call", "streams" (memory that two streams
            use, neither of which waits for the other).
        where: the innermost line of this repository, and of other code if that called torch.
        what: the operation.
    """

    kind: str
    where: str
    what: str


@dataclass(frozen=True)
class Message:
    """One half of a point-to-point transfer.

    Attributes:
        sends: whether this rank sends; False: it receives.
        peer: the other rank, in the whole job.
        num_bytes: bytes that this rank expects to travel.
    """

    sends: bool
    peer: int
    num_bytes: int


@dataclass(frozen=True)
class Launch:
    """One call that a rank makes into a process group.

    Attributes:
        group: name of the group, the same on all its ranks.
        members: ranks of the group, in the whole job, in the order of the group.
        operation: e.g. "allreduce_"; "messages" for a group call of sends and receives.
        num_bytes: bytes that must be equal on all members, e.g. of a reduced tensor; 0 if sizes are in `sent`.
        sent, received: bytes to and from each member, in the order of `members`; empty if all are equal.
        messages: the sends and receives of a group call.
        where: the line that launched it, for messages to people.
    """

    group: str
    members: tuple[int, ...]
    operation: str
    num_bytes: int = 0
    sent: tuple[int, ...] = ()
    received: tuple[int, ...] = ()
    messages: tuple[Message, ...] = ()
    where: str = ""

    @property
    def collective(self) -> bool:
        """Whether all members of the group must take part."""
        return not self.messages


@dataclass(frozen=True)
class Outcome:
    """What one rank did."""

    log: tuple[Launch, ...]
    faults: tuple[Fault, ...]
    copies: int

import numpy as np
from numpy.typing import NDArray

_Int64 = NDArray[np.int64]
_Bool = NDArray[np.bool_]

# csrc/planning
def sparse_materialization(
    loads: list[int], owners: list[int], devices: int, devices_per_node: int, degree: int, slots: int
) -> list[tuple[int, int]]: ...
def heterogeneous_sharding(
    layers: list[list[int]], degrees: list[int], devices: int, devices_per_node: int
) -> list[list[int]]: ...
def few_moves(
    layers: list[list[int]], owners: list[list[int]], goals: list[list[int]], degrees: list[int], devices: int
) -> list[list[int]]: ...
def exact_quota(counts: _Int64, placement: _Bool, devices_per_node: int) -> _Int64: ...
def even_quota(counts: _Int64, placement: _Bool, devices_per_node: int) -> _Int64: ...
def min_max_loads(loads: _Int64, placement: _Bool) -> _Int64: ...
def holder_loads(loads: _Int64, placement: _Bool) -> _Int64: ...
def lower_bound(loads: _Int64, owners: _Int64, slots: _Int64) -> int: ...
def holders(placement: _Bool) -> _Int64: ...
def plan_sums(
    placement: _Bool, owners: _Int64, holders: _Int64, quota: _Int64, devices_per_node: int
) -> tuple[_Int64, int]: ...
def plan_fault(placement: _Bool, owners: _Int64, holders: _Int64, quota: _Int64, device_loads: _Int64) -> str: ...
def few_copies(
    loads: _Int64,
    placement: _Bool,
    devices_per_node: int,
    target: int,
    limit_in: _Int64,
    limit_out: _Int64,
    node_in: _Int64,
    node_out: _Int64,
    order: int,
) -> _Int64: ...
def robust_copies(
    levels: _Int64, owners: _Int64, limit_in: _Int64, limit_out: _Int64, allowed: _Bool, swaps: int
) -> _Int64: ...

# csrc/collectives
def route(
    kind: str,
    holds: _Bool,
    owners: _Int64,
    devices_per_node: int,
    chunk_bytes: int,
    partial_bytes: int,
    links: _Int64,
) -> tuple[_Int64, str, int, int, int]: ...

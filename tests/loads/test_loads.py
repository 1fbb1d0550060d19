"""Load history, predictors, guesses, synthetic loads and recorded traces."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from hecate.loads.history import LoadHistory
from hecate.loads.predict import guesses, predict
from hecate.loads.synthetic import synthetic_loads
from hecate.loads.trace import TraceWriter, read_trace
from hecate.placement import Topology


def test_history_keeps_the_last_steps_and_adds_up_micro_batches() -> None:
    history = LoadHistory(2, 3, window=2)
    assert history.array().shape == (0, 2, 3)
    for step in range(4):
        for _ in range(2):
            history.add(np.full((2, 3), step))
        history.close_step()
    history.close_step()
    assert history.array()[:, 0, 0].tolist() == [4, 6]


def test_history_refuses_another_shape() -> None:
    with pytest.raises(ValueError, match=r"shape \(3, 2\), must be \(2, 3\)"):
        LoadHistory(2, 3).add(np.zeros((3, 2), dtype=np.int64))
    with pytest.raises(ValueError, match="window=0 must be >= 1"):
        LoadHistory(2, 3, window=0)


def test_predictors() -> None:
    steps = np.array([[[7]], [[14]], [[28]]])
    assert predict(steps, "window").tolist() == [49 // 3]
    assert predict(steps, "recent").tolist() == [(7 + 28 + 112) // 7]
    with pytest.raises(ValueError, match="predictor='oracle': must be one of 'window', 'recent'"):
        predict(steps, "oracle")  # type: ignore[arg-type]


def test_guesses_surround_the_prediction_and_repeat() -> None:
    history = synthetic_loads("drift", 4, 16, 64, 2, seed=0, steps=5)
    levels = guesses(history)
    assert (levels == guesses(history.copy())).all()
    assert (levels >= 0).all()
    assert (levels[:, 0] == predict(history, "recent")).all()
    spread = np.abs(levels - predict(history, "recent")).mean(axis=(1, 2))
    assert (np.diff(spread) > 0).all()


@pytest.mark.parametrize("kind", ["uniform", "zipf", "hot", "drift"])
def test_synthetic_loads_are_those_of_a_router(kind: str) -> None:
    loads = synthetic_loads(kind, 3, 8, 100, 2, seed=4, steps=2)  # type: ignore[arg-type]
    assert (loads == synthetic_loads(kind, 3, 8, 100, 2, seed=4, steps=2)).all()  # type: ignore[arg-type]
    assert (loads.sum(axis=2) == 200).all()
    assert loads.max() <= 100


def test_synthetic_loads_refuse_bad_arguments() -> None:
    with pytest.raises(ValueError, match="kind='cold': must be one of 'uniform'"):
        synthetic_loads("cold", 1, 2, 3, 1, 0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"top_k=3: must be in \[1, num_experts=2\]"):
        synthetic_loads("zipf", 1, 2, 3, 3, 0)


def test_a_trace_reads_as_it_was_written(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    layers = [rng.integers(0, high, (7, 4, experts)) for high, experts in ((200, 8), (2**36, 3))]
    with TraceWriter(tmp_path / "t.npz", Topology(4, 2), [8, 3], chunk=3) as writer:
        for step in range(7):
            writer.append(step, [layer[step] for layer in layers])
    trace = read_trace(tmp_path / "t.npz")
    assert trace.topology == Topology(4, 2)
    assert trace.steps.tolist() == list(range(7))
    for got, wanted in zip(trace.layers, layers, strict=True):
        assert (got == wanted).all()
    with np.load(tmp_path / "t.npz") as file:
        assert file["layer0.000000"].dtype == np.uint8


def test_a_resumed_run_continues_its_trace(tmp_path: Path) -> None:
    for start, value in ((0, 1), (3, 2)):
        with TraceWriter(tmp_path / "t.npz", Topology(1, 1), [1], chunk=2) as writer:
            for step in range(start, start + 4):
                writer.append(step, [np.full((1, 1), value)])
    trace = read_trace(tmp_path / "t.npz")
    assert trace.steps.tolist() == list(range(7))
    assert trace.layers[0].ravel().tolist() == [1, 1, 1, 2, 2, 2, 2]


def test_bad_traces_are_named(tmp_path: Path) -> None:
    path = tmp_path / "t.npz"
    with TraceWriter(path, Topology(2, 2), [4]) as writer:
        with pytest.raises(ValueError, match="counts of 2 layers, must be 1"):
            writer.append(0, [np.zeros((2, 4), dtype=np.int64)] * 2)
        with pytest.raises(ValueError, match=r"num_experts=4"):
            writer.append(0, [np.zeros((2, 3), dtype=np.int64)])
    with pytest.raises(ValueError, match="cannot be continued"):
        TraceWriter(path, Topology(2, 2), [5])
    np.savez(tmp_path / "other.npz", steps=np.arange(3))
    with pytest.raises(ValueError, match="must be 'hecate-trace' version 1"):
        read_trace(tmp_path / "other.npz")


def test_an_error_while_writing_loses_neither_old_nor_new_steps(tmp_path: Path) -> None:
    path, rng = tmp_path / "t.npz", np.random.default_rng(0)
    steps = [rng.integers(0, 2**30, (4, 64)) for _ in range(6)]
    with TraceWriter(path, Topology(4, 2), [64], chunk=2) as writer:
        for step in range(3):
            writer.append(step, [steps[step]])
        before = path.read_bytes()
        with at_most(len(before) + 100), pytest.raises(OSError, match="File too large"):
            writer.append(3, [steps[3]])
        assert path.read_bytes() == before
        for step in (4, 5):
            writer.append(step, [steps[step]])
    trace = read_trace(path)
    assert trace.steps.tolist() == list(range(6))
    assert np.array_equal(trace.layers[0], np.stack(steps))


@contextmanager
def at_most(num_bytes: int) -> Iterator[None]:
    """A context in which no file may become larger, as on a disk that is full."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)

"""A CUDA side stream on which a transport runs its collectives, one after the other."""

from __future__ import annotations

from collections.abc import Callable

import torch

from hecate.collectives.transport import Work

__all__ = ["SideStream"]


class SideStream:
    """Makes its stream on first use.

    Attributes:
        last: event behind everything that was run; None before the first time.
    """

    def __init__(self) -> None:
        self._stream: torch.cuda.Stream | None = None
        self.last: torch.cuda.Event | None = None

    def run(self, run: Callable[[], None], device: torch.device) -> Work:
        """Call `run` with the side stream as the current one, after everything queued on the caller's stream.

        The caller's stream owns the memory of the rows: once they are freed, its next tensors may lie there, whatever
        the side stream still does with them. So the work holds the rows, through `run`, until `wait()`.
        `Tensor.record_stream` would be safe too, but gives memory back whenever the device gets there, at another
        moment on every rank and in every step; FSDP2 holds references as well. Staging memory is allocated on the side
        stream and used only there.
        """
        caller = torch.cuda.current_stream(device)
        if self._stream is None:
            self._stream = torch.cuda.Stream(device)
        side = self._stream
        side.wait_stream(caller)
        try:
            with torch.cuda.stream(side):
                run()
        except BaseException:
            caller.wait_stream(side)  # what was started before the error still uses the rows
            raise
        done = self.last = side.record_event()

        def finish(held: object = run) -> None:
            # The memory goes back to the caller's stream, even if another stream waits for the results.
            for stream in {caller, torch.cuda.current_stream(device)}:
                stream.wait_event(done)

        return Work(finish)

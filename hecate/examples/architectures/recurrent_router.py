"""Recurrent router (RMoE, arXiv 2408.06793): a layer's router sees what the routers of earlier layers saw."""

from __future__ import annotations

from torch import Tensor, nn

from hecate.examples.architectures.shared import WIDTH, experts, train

__all__ = ["RecurrentModel"]

STATE = 16


class Layer(nn.Module):
    """2 of 8 experts a token; the router reads a state that one recurrent cell, shared by all layers, carries on."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(WIDTH, STATE)
        self.router = nn.Linear(STATE, 8, bias=False)
        self.experts = experts(8)

    def forward(self, x: Tensor, state: Tensor, cell: nn.GRUCell) -> tuple[Tensor, Tensor]:
        """The layer's output `[T, d]` and the next state `[T, STATE]`."""
        state = cell(self.project(x), state)
        weights, index = self.router(state).softmax(-1).topk(2)
        return self.experts(x, index, weights), state


class RecurrentModel(nn.Module):
    """Three residual layers."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.GRUCell(STATE, STATE)
        self.layers = nn.ModuleList([Layer() for _ in range(3)])

    def forward(self, x: Tensor) -> Tensor:
        """`[T, WIDTH]` to `[T, WIDTH]`."""
        state = x.new_zeros(len(x), STATE)
        for layer in self.layers:
            output, state = layer(nn.functional.rms_norm(x, (WIDTH,)), state, self.cell)
            x = x + output
        return x


if __name__ == "__main__":
    train(RecurrentModel)

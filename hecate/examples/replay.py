"""Router replay: record routing in a forward pass, train with it, and plan each step from it before it begins.

    torchrun --nproc-per-node 2 -m hecate.examples.replay

In RL post-training the rollout records which experts each token took, and training routes tokens the same way. The
loads of a step are then known ahead of it: `engine.foresee` plans its copies from them instead of from past steps.
"""

from __future__ import annotations

import torch
from torch import Tensor, distributed, nn

import hecate
from hecate.examples.shared import say
from hecate.models import GPTMoE, ModelConfig, Routing, TopKGate

STEPS, BATCH, LENGTH = 20, 4, 64


class Replay:
    """Records the choices of all gates of a model, and replays them; weights are computed anew, with gradients."""

    def __init__(self, model: nn.Module) -> None:
        self.routing: list[Tensor] = []
        self.replays = False
        self._calls = 0
        self._gates = [module for module in model.modules() if isinstance(module, TopKGate)]
        for gate in self._gates:
            gate.register_forward_hook(self._hook)

    def record(self) -> None:
        """From now on, record."""
        self.routing, self.replays, self._calls = [], False, 0

    def replay(self) -> None:
        """From now on, replay what was recorded."""
        self.replays, self._calls = True, 0

    def _hook(self, gate: nn.Module, inputs: tuple[Tensor], routing: Routing) -> Routing:
        assert isinstance(gate, TopKGate)
        if not self.replays:
            self.routing.append(routing.expert_index)
            return routing
        index = self.routing[self._calls % len(self._gates)]
        self._calls += 1
        scores = nn.functional.linear(inputs[0], gate.weight).softmax(dim=-1).gather(1, index)
        return routing._replace(expert_index=index, weights=scores / scores.sum(dim=1, keepdim=True))


def main() -> None:
    """Train and print losses and imbalance."""
    distributed.init_process_group()
    torch.manual_seed(0)  # the same model on every rank
    model = GPTMoE(ModelConfig(d_model=64, num_layers=2, num_heads=4, num_experts=8, top_k=2, max_length=LENGTH))
    replay = Replay(model)
    # Calibration is off to show what foresight alone does; it would only add copies where loads were not foreseen.
    settings = hecate.FSSDPConfig(memory_slots=2, overlap_degree=2, calibrate=False)
    engine = hecate.fully_shard(model, config=settings)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    torch.manual_seed(distributed.get_rank())  # different data on every rank
    for step in range(STEPS):
        tokens = torch.randint(64, (BATCH, LENGTH + 1)).cumsum(1) % 64
        replay.record()
        with torch.no_grad():
            model(tokens[:, :-1])  # the rollout
        engine.foresee(replay.routing)
        replay.replay()
        loss = model(tokens[:, :-1], tokens[:, 1:]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        layers = engine.stats()["layers"]
        before, after = (max(layer[f"imbalance_{when}"] for layer in layers) for when in ("before", "after"))
        if step % 5 == 4:
            say(f"step {step + 1}: loss {loss.item():.4f}, imbalance {before:.3f} without, {after:.3f} with copies")
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()

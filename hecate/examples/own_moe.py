"""A custom MoE layer under FSSDP: `torchrun --nproc-per-node 2 -m hecate.examples.own_moe`."""

import torch
from torch import distributed, nn

import hecate
from hecate.ops.grouped import grouped_linear


class Experts(nn.Module):
    expert_weights = ("up", "down")  # stacked: the first dimension is the expert

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(8, 64, 32) / 6)
        self.down = nn.Parameter(torch.randn(8, 32, 64) / 8)

    def expert_mlp(self, x, groups, weights):  # type: ignore[no-untyped-def]  # rows [N, d], sorted by expert
        return grouped_linear(grouped_linear(x, weights["up"], groups).relu(), weights["down"], groups)


class MoE(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.router, self.experts = nn.Linear(32, 8), Experts()

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # [tokens, d]
        weights, index = self.router(x).softmax(-1).topk(2)
        return x + self.experts(x, index, weights)


if __name__ == "__main__":
    distributed.init_process_group()
    torch.manual_seed(0)  # the same model on every rank
    model = nn.Sequential(nn.Linear(16, 32), MoE(), MoE(), nn.Linear(32, 16))
    engine = hecate.fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    torch.manual_seed(distributed.get_rank())  # different data on every rank
    for _ in range(50):
        x = torch.randn(256, 16)
        (loss := (model(x) - x.roll(1, 1)).square().mean()).backward()
        optimizer.step()
        optimizer.zero_grad()
    print(f"loss {loss.item():.4f}, tokens per expert {engine.stats()['layers'][1]['loads']}")
    distributed.destroy_process_group()

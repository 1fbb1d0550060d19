"""A part of the model that only some ranks run in a pass, as a vision tower if only some batches have images."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from hecate.models.moe import Experts, MoE, TopKGate
from tests.runtime.helpers import WIDTH, Pair, case, error_of, floats, rank
from tests.workers import Groups

LAYERS = 2


class Block(nn.Module):
    """Dense, or with an MoE layer."""

    def __init__(self, experts: int) -> None:
        super().__init__()
        self.dense = nn.Linear(WIDTH, WIDTH)
        self.moe = MoE(TopKGate(WIDTH, experts, 2), Experts(experts, WIDTH, 16)) if experts else None

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.dense(x).tanh()
        return x if self.moe is None else x + self.moe(x)[0]


class Multimodal(nn.Module):
    """`vision` experts a layer of its vision tower (0: none), and more of them a layer of its text tower."""

    _no_split_modules = ("Block",)

    def __init__(self, vision: int) -> None:
        super().__init__()
        self.vision = nn.ModuleList([Block(vision) for _ in range(LAYERS)])
        self.text = nn.ModuleList([Block(5) for _ in range(LAYERS)])
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.5)

    def forward(self, x: Tensor, image: Tensor | None, share: float = 1.0) -> Tensor:
        if image is not None:
            for block in self.vision:
                image = block(image)
            x = x + share * image
        for block in self.text:
            x = block(x)
        return x


def _loss(seed: int, with_images: Sequence[int]) -> Callable[[nn.Module, int], Tensor]:
    """Batches of these ranks have images."""
    return lambda model, of: (
        model(floats(seed, of), floats(seed + 50, of) if of in with_images else None).square().mean()
    )


def _pair(vision: int, dense: str) -> Pair:
    torch.manual_seed(0)
    pair = Pair(Multimodal(vision).double(), dense=dense, pools="layer")
    pair.warm_up(_loss(9, (0, 1)))
    return pair


def _told(vision: int, dense: str) -> str:
    """The error on this rank; then passes with images on all ranks, and on none, go on as in the plain model."""
    pair = _pair(vision, dense)
    error = error_of(lambda: _loss(0, (1,))(pair.model, rank()))
    pair.engine.skip_step()
    for with_images in ((0, 1), ()):
        with case(with_images):
            pair.backward(_loss(1, with_images))
    pair.check_gradients()
    return error


def test_under_fsdp_all_ranks_are_told(groups: Groups) -> None:
    for vision in (0, 3):
        for error in groups(2).run(_told, vision, "fsdp"):
            assert error.startswith("RuntimeError: fully_shard: text on ranks [0] and vision on ranks [1] come next")
            assert "give a batch without images one blank image" in error


def test_vision_experts_with_a_replicated_dense_part(groups: Groups) -> None:
    for error in groups(2).run(_told, 3, "replicate"):
        assert "vision.0.moe.experts was reached by ranks [1] and text.0.moe.experts was reached by ranks [0]" in error
        assert "give a batch without images one blank image" in error


def _blank(vision: int, dense: str) -> None:
    """What the error proposes: rank 0 has no image."""
    pair = _pair(vision, dense)
    pair.backward(lambda model, of: model(floats(0, of), floats(50, of), share=float(of)).square().mean())
    pair.plain.zero_grad()
    pair.backward_plain(_loss(0, (1,)))  # the same tensors, and none on rank 0
    pair.check_gradients()


def test_a_blank_image_gives_the_result_without_it(groups: Groups) -> None:
    groups(2).run(_blank, 3, "fsdp")


def _works() -> None:
    pair = _pair(0, "replicate")
    for seed, with_images in enumerate(((1,), (0,), (), (0, 1))):
        pair.backward(_loss(seed, with_images))
    pair.check_gradients()


def test_a_dense_vision_tower_with_a_replicated_dense_part(groups: Groups) -> None:
    groups(2).run(_works)


class Glance(Block):
    """A block that looks at the image itself."""

    def __init__(self) -> None:
        super().__init__(5)
        self.look = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, image: Tensor | None = None) -> Tensor:
        return super().forward(x if image is None else x + self.look(image))


class Projected(nn.Module):
    """Images are only projected: weights of the model itself, and of a block that all ranks run."""

    _no_split_modules = ("Block", "Glance")

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(WIDTH, WIDTH)
        self.first, self.second = Block(5), Glance()
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.5)

    def forward(self, x: Tensor, image: Tensor | None) -> Tensor:
        """Without an image, the input of the first block needs no gradient."""
        x = self.first(x if image is None else x + self.project(image))
        return self.second(x, image)


def _only_some_use(dense: str) -> None:
    torch.manual_seed(0)
    pair = Pair(Projected().double(), dense=dense)
    optimizers = pair.optimizers(lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1))
    for seed, with_images in enumerate(((), (0, 1), (1,), (), (0,), (1,))):
        with case((seed, with_images)):
            if seed > 3:  # the first of two micro-batches
                with pair.engine.no_sync():
                    _loss(seed + 20, ())(pair.model, rank()).backward()
                pair.backward_plain(_loss(seed + 20, ()))
            pair.backward(_loss(seed, with_images))
            pair.check_gradients()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            pair.check_state(rtol=1e-8)


@pytest.mark.skipif(not hasattr(FSDPModule, "set_reduce_scatter_unused_params"), reason="FSDP2 of torch 2.13 or later")
def test_weights_that_only_some_ranks_use_under_fsdp(groups: Groups) -> None:
    groups(2).run(_only_some_use, "fsdp")


def test_weights_that_only_some_ranks_use_replicated(groups: Groups) -> None:
    groups(2).run(_only_some_use, "replicate")


def _unused_and_accumulated_in_another_dtype() -> None:
    """FSDP2 accumulates in `reduce_dtype`, and would take zeros of another dtype only with an error."""
    torch.manual_seed(0)
    pair = Pair(Projected(), param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    x = floats(0, rank()).float()
    with pair.engine.no_sync():
        pair.model(x, None).square().mean().backward()
    pair.model(x, None).square().mean().backward()
    assert pair.model.project.weight.grad is None
    assert pair.model.first.dense.weight.grad is not None


def test_unused_weights_beside_accumulated_gradients(groups: Groups) -> None:
    groups(2).run(_unused_and_accumulated_in_another_dtype)

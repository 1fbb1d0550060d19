"""The private FSDP2 state of this package, and why there is no public way.

`reset_iter_state` is FSDP2's way back from a pass that raised. It keeps what `no_sync` has accumulated in unsharded
gradients, which the next reduction would add to those of another step, and they can be reached from nowhere else.
"""

from __future__ import annotations

from torch import nn
from torch.distributed.fsdp import FSDPModule

__all__ = ["forget_step"]


def forget_step(model: nn.Module) -> None:
    """Between passes again, without gradients that were not reduced yet.

    Args:
        model: the root that FSDP2's `fully_shard` was called on; any other module is left alone.
    """
    if not isinstance(model, FSDPModule):
        return
    model.reset_iter_state()
    for module in model.modules():
        if not isinstance(module, FSDPModule):
            continue
        for group in module._get_fsdp_state()._fsdp_param_groups:
            for parameter in group.fsdp_params:
                parameter.unsharded_accumulated_grad = None
                if hasattr(parameter, "_unsharded_param"):  # not before the first pass
                    parameter._unsharded_param.grad = None

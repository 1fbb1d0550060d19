"""Programs to start from. Each runs by itself, or on several processes with torchrun.

- `own_moe`: an MoE layer of one's own, trained under FSSDP.
- `finetune`: a transformers MoE from a folder and back into one, in a loop of one's own.
- `finetune_trainer`: the same with transformers' Trainer.
- `muon`: Muon for the experts, AdamW for the rest.
"""

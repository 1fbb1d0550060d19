"""Example programs. Each runs as a single process, or as several with torchrun.

- `own_moe`: a custom MoE layer, trained under FSSDP.
- `finetune`: loads a transformers MoE from a folder, trains it in a custom loop and saves it.
- `architectures`: MoE layers of several kinds (shared experts, Chain-of-Experts, top-p routing, ...).
- `finetune_trainer`: the same with transformers' Trainer.
- `muon`: Muon for the experts, AdamW for all other parameters.
"""

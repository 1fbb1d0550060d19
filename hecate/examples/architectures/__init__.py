"""MoE layers of several architectures on the public protocol, in a few lines each.

`torchrun --nproc-per-node 2 -m hecate.examples.architectures.top_p`, and likewise

- `deepseek_moe`: many small experts, and shared experts that every token uses;
- `chain_of_experts`: a token goes through the experts of one layer several times;
- `top_p`: as many experts a token as its router needs to be sure;
- `expert_choice`: each expert chooses its tokens;
- `zero_experts`: experts that compute nothing;
- `recurrent_router`: routers that pass a state from layer to layer;
- `lora_experts`: low-rank experts on a frozen MLP;
- `diffusion`: a diffusion transformer;
- `vision`: a vision transformer.
"""

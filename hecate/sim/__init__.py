"""One training step of a cluster that need not exist, under the policies, plans and routes that training uses.

`python -m hecate.sim model=... cluster=... policy=...` prints what a step takes; `python -m hecate.sim.measure` under
torchrun writes a profile of the machine it runs on. What is assumed is in docs/will_it_pay.md.
"""

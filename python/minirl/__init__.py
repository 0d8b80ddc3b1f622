"""A thin trainer for reinforcement learning of language models, built on minirl_kernels.

One idea per file: `config` says what a run is, `tasks` and `rewards` what it learns, `rollout` samples,
`train` holds the step, and `cli` is the command `minirl`.
"""

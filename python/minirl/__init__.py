"""A thin trainer for reinforcement learning of language models, built on minirl_kernels.

`config` has the settings of a run, `tasks` and `rewards` its problems, `rollout` the inference engines,
`train` the training step, and `cli` the command `minirl`.
"""

"""Scores with an enabled model that was pickled in another process; the process imports this module by name."""

import sys

import torch


def score(model, input_ids, token_ids, file):
    """Save the model's log-probabilities. Hooks that this process adds must not replace the hooks of the model."""
    handles = [model.register_forward_hook(lambda *_: None) for _ in range(40)]
    log_probs = model(input_ids, token_ids=token_ids).log_probs
    shape = model(input_ids).logits.shape
    for handle in handles:
        handle.remove()
    torch.save((log_probs.detach(), shape, model(input_ids, token_ids=token_ids).log_probs.detach()), file)


if __name__ == "__main__":
    model, input_ids, token_ids = torch.load(sys.argv[1], weights_only=False)
    score(model, input_ids, token_ids, sys.argv[2])

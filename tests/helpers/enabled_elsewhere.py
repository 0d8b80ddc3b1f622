"""What another process does with a model that was enabled in this one; it finds it by this module's name."""

import sys

import torch


def score(model, input_ids, token_ids, file):
    """Hooks that the process adds of its own must not take the place of the model's."""
    handles = [model.register_forward_hook(lambda *_: None) for _ in range(40)]
    log_probs = model(input_ids, token_ids=token_ids).log_probs
    shape = model(input_ids).logits.shape
    for handle in handles:
        handle.remove()
    torch.save((log_probs.detach(), shape, model(input_ids, token_ids=token_ids).log_probs.detach()), file)


if __name__ == "__main__":
    model, input_ids, token_ids = torch.load(sys.argv[1], weights_only=False)
    score(model, input_ids, token_ids, sys.argv[2])

"""kept_logits: sets the logits of all tokens that the sampler did not keep to -inf."""

"""kept_logits: rows of logits whose softmax is over the tokens that the sampler kept."""

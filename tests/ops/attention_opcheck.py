"""Arguments for opcheck of attention's ops: packed, and in a batch with padding."""

import torch


def op_arguments():
    q, k, v = torch.randn(1, 4, 6, 8), torch.randn(1, 2, 9, 8), torch.randn(1, 2, 9, 5)
    spans = torch.tensor([[0, 0, 2, 0, 5], [0, 3, 3, 5, 4]])
    operands = (q, k, v, spans, None)
    of_rows = (torch.randn(1, 6, 4, 5), torch.ones(1, 6, 4, 2), torch.randn(1, 6, 4, 5))
    return {
        "attention": [
            (*operands, True, 0.5, True, "cpu"),
            (*(x.half() for x in operands[:3]), spans, None, False, 0.5, False, "cpu"),
        ],
        "attention_backward": [
            (*operands, *of_rows, True, 0.5, True, True, True, "cpu"),
            (*operands, *of_rows, False, 0.5, False, True, False, "cpu"),
        ],
        "attention_spans": [(torch.tensor([0, 2, 6]), torch.tensor([0, 3, 9], dtype=torch.int32), 6, 9)],
    }

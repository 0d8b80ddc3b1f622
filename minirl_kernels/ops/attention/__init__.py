from .op import attention, attention_over_spans, packed_spans

__all__ = ["attention", "attention_over_spans", "packed_spans"]

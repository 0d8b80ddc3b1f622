from .op import attention, attention_over_spans

__all__ = ["attention", "attention_over_spans"]

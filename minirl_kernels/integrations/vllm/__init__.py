"""vLLM: what its processes load at their start, by the entry point `vllm.general_plugins`."""


def register() -> None:
    """Called by vLLM in each of its processes, before it builds anything."""
    from .weights import register_backend

    register_backend()

"""vLLM as the rollout engine. Importing `engine` imports vLLM."""

import os

# errors are enough for the terminal and for the log, unless somebody asks for more
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

"""Shows installed versions, compiled kernels and the selected backends: `python -m minirl_kernels.env [--json]`."""

import argparse
import importlib.metadata
import json
import os
import platform
from pathlib import Path

import torch

from minirl_kernels import backends, versions

DISTRIBUTIONS = ("minirl-kernels", "torch", "triton", "transformers", "accelerate", "peft", "numpy")


def environment() -> dict:
    """Versions, processor, threads, GPUs and `backends.status()`, as values for JSON."""
    return {
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in DISTRIBUTIONS}},
        "torch_with_triton": versions.describe_pair(torch.__version__, _version("triton")),
        "system": platform.platform(),
        "processor": {"name": _processor_name(), "cores": os.cpu_count(), "threads": torch.get_num_threads()},
        "gpus": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
        **backends.status(),
    }


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _processor_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")  # on Linux, platform.processor() has no model name
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine()


def render(found: dict) -> str:
    """The environment as text, with one fact per line."""
    processor, native = found["processor"], found["native"]
    lines = [(name, version or "not installed") for name, version in found["versions"].items()]
    lines += [
        ("torch with triton", found["torch_with_triton"]),
        ("system", found["system"]),
        ("processor", f"{processor['name']}, {processor['cores']} cores, torch uses {processor['threads']}"),
        ("gpus", ", ".join(found["gpus"]) or "none"),
    ]
    if native["picked"]:
        lines += [
            ("instruction sets", f"built: {', '.join(native['built'])}"),
            ("", f"supported here: {', '.join(native['supported'])}"),
            ("", f"picked: {native['picked']} ({native['why']})"),
            ("native matmul", native["matmul"]),
            ("native threads", native["threads"]),
        ]
    for name, entry in found["backends"].items():
        lines.append((f"backend {name}", "available" if entry["available"] else f"missing: {entry['reason']}"))
    width = max(len(name) for name, _ in lines)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m minirl_kernels.env", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print JSON")
    found = environment()
    print(json.dumps(found, indent=2) if parser.parse_args().json else render(found))


if __name__ == "__main__":
    main()

"""The JSON of a result: the machine and its versions before a run, and the file."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
from pathlib import Path

from minirl_kernels.env import environment

PEER_PACKAGES = ("trl", "liger-kernel", "cut-cross-entropy")


def surroundings(device, machine: str | None = None) -> dict:
    """The machine and its versions. machine: its name; None means the model of its GPU or processor."""
    found = environment()
    model = found["gpus"][0] if device.type == "cuda" else found["processor"]["name"]
    return {
        "device": device.type,
        "machine": machine or model,
        "environment": {
            "versions": found["versions"] | {name: _version(name) for name in PEER_PACKAGES},
            "processor": found["processor"],
            "gpus": found["gpus"],
            "instruction_set": found["native"]["picked"],
            "huge_pages": _first_line("/sys/kernel/mm/transparent_hugepage/enabled"),
            "load_before": round(os.getloadavg()[0], 2),
        },
    }


def write(folder: Path, record: dict) -> Path:
    """Write a result into the folder, and return the path of its file."""
    folder.mkdir(parents=True, exist_ok=True)
    machine = re.sub(r"[^a-z0-9]+", "-", record["machine"].lower()).strip("-")
    path = folder / f"{record['op']}-{record['device']}-{machine}.json"
    path.write_text(_one_line_per_list(json.dumps(record, indent=1)) + "\n")
    return path


def _version(distribution):
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _first_line(path):
    return Path(path).read_text().strip() if Path(path).exists() else None


def _one_line_per_list(text):
    return re.sub(r"\[[\s\d.,e-]*\]", lambda numbers: " ".join(numbers[0].split()), text)

"""An invented result of a bench: one case with a fast call of the library, a slow peer, an absent peer and a floor."""

SOURCE = {"commit": "0123456789abcdef0123456789abcdef01234567", "dirty": False}


def contender(name, kind, seconds, peak_bytes, missing=None):
    return {"name": name, "kind": kind, "missing": missing, "peak_bytes": peak_bytes, "seconds": seconds}


def bar(contender, measure, against, bound):
    return {"contender": contender, "measure": measure, "against": against, "bound": bound}


def measured_case(**changes):
    """A bench case in which the library moves 1 GB in 50 ms."""
    case = {
        "what": "forward + backward",
        "dtype": "bfloat16",
        "shape": {"tokens": 512, "vocab_size": 151_936},
        "threads": 2,
        "source": SOURCE,
        "floor_bytes": 1_000_000_000,
        "flops": None,
        "contenders": [
            contender("ours", "ours", [0.050, 0.040, 0.060, 0.051, 0.049], 2**20),
            contender("eager", "peer", [0.800, 1.000, 0.600, 0.840, 0.760], 2**30),
            contender("absent", "peer", [], None, missing="absent is not installed"),
            contender("copy", "floor", [0.020, 0.020, 0.030, 0.021, 0.019], 2**29),
        ],
        "bars": [
            bar("ours", "speed", "eager", 10),
            bar("ours", "time", "copy", 2),
            bar("ours", "memory", "copy", 0.015),
            bar("ours", "speed", "absent", 6),
        ],
    }
    return case | changes


def measured_record(*cases):
    return {
        "op": "some_op",
        "device": "cpu",
        "machine": "Some(R) CPU Processor",
        "environment": {
            "versions": {"torch": "2.13.0", "triton": None},
            "processor": {"name": "Some(R) CPU Processor", "cores": 2, "threads": 2},
            "gpus": [],
            "instruction_set": "avx2",
            "huge_pages": None,
            "load_before": 0.01,
        },
        "cases": list(cases) or [measured_case()],
    }


def row(text, start):
    """The cells of the one table row that begins with `start`."""
    (line,) = [line for line in text.splitlines() if line.startswith(f"| {start}")]
    return [cell.strip() for cell in line.strip("|").split("|")]

"""Headline figures: the choice of cases that the README's table and the chart show, and that table."""

from __future__ import annotations

from dataclasses import dataclass

from records import measured, median, short_machine
from source import note_in_words, sources_in_words
from units import durations, faster, markdown_table, memory, shape


@dataclass(frozen=True)
class Work:
    """One case of one result, under a name for readers."""

    name: str
    sizes: str
    result: str  # the name of its JSON file without the ending
    what: str
    shape: dict[str, int]  # the sizes that `sizes` tells
    dtype: str = "bfloat16"
    threads: int = 2

    def case(self, results: dict[str, dict]) -> dict:
        """Its case; raises ValueError where the results have none or several."""
        found = [
            case
            for case in results.get(self.result, {"cases": []})["cases"]
            if (case["what"], case["dtype"], case["threads"]) == (self.what, self.dtype, self.threads)
            and self.shape.items() <= case["shape"].items()
        ]
        if len(found) != 1:
            raise ValueError(f"bench/results/{self.result}.json has {len(found)} cases of {self}; it must have one")
        return found[0]


@dataclass(frozen=True)
class Comparison:
    """One row: a call of ours beside an alternative, each by its name in the result."""

    work: Work
    ours: str
    theirs: str
    theirs_in_words: str


FROM_LOGITS = Work(
    name="Policy loss from logits",
    sizes="512 tokens, 151,936 vocabulary entries, forward and backward",
    result="fused_policy_loss-cpu-amd-epyc",
    what="forward + backward",
    shape={"tokens": 512, "vocab_size": 151_936},
)
FROM_HIDDEN_STATES = Work(
    name="Policy loss from hidden states",
    sizes="2,048 tokens, hidden size 1,024, 151,936 vocabulary entries, forward and backward",
    result="fused_linear_policy_loss-cpu-amd-epyc",
    what="forward + backward",
    shape={"tokens": 2048, "hidden_size": 1024, "vocab_size": 151_936},
)
LOG_PROBS = Work(
    name="Token log-probabilities and entropy",
    sizes="512 tokens, 151,936 vocabulary entries, forward",
    result="token_logprobs-cpu-amd-epyc",
    what="forward",
    shape={"tokens": 512, "vocab_size": 151_936},
)
EXPERTS = {
    "name": "Mixture of experts",
    "sizes": "512 tokens, hidden size 2,048, 4 of 16 experts, forward and backward",
    "what": "forward + backward",
    "shape": {"tokens": 512, "hidden_size": 2048, "num_experts": 16, "top_k": 4},
}
EXPERTS_INTEL = Work(result="moe_experts-cpu-intel-r-xeon-r-processor", **EXPERTS)
EXPERTS_AMD = Work(result="moe_experts-cpu-amd-epyc", **EXPERTS)
MODE = Work(
    name="Batch-invariant mode",
    sizes="rollouts of the arithmetic example, 32 prompts, float32",
    result="batch_invariant-cpu-intel-r-xeon-r-processor",
    what="the rollout of a step",
    shape={"tokens": 32},
    dtype="float32",
)

COMPARISONS = (
    Comparison(FROM_LOGITS, "fused_policy_loss", "eager torch", "eager PyTorch"),
    Comparison(FROM_LOGITS, "fused_policy_loss", "TRL", "TRL"),
    Comparison(FROM_HIDDEN_STATES, "fused_linear_policy_loss", "naive", "eager PyTorch"),
    Comparison(FROM_HIDDEN_STATES, "fused_linear_policy_loss", "TRL", "TRL"),
    Comparison(FROM_HIDDEN_STATES, "fused_linear_policy_loss", "Liger", "Liger"),
    Comparison(FROM_HIDDEN_STATES, "fused_linear_policy_loss", "CCE (torch_compile)", "Cut Cross-Entropy, compiled"),
    Comparison(LOG_PROBS, "token_logprobs", "TRL", "TRL"),
    Comparison(EXPERTS_INTEL, "moe_experts", "transformers, grouped_mm", "transformers, `grouped_mm`"),
    Comparison(EXPERTS_AMD, "moe_experts", "transformers, grouped_mm", "transformers, `grouped_mm`"),
    Comparison(MODE, "batch_invariant = true", "batch_invariant = false", "the mode switched off"),
)

# the alternatives that do less than the others of their case
NO_ENTROPY = {"Liger": "Liger", "CCE (torch_compile)": "Cut Cross-Entropy", "F.cross_entropy": "F.cross_entropy"}


def without_entropy(contenders: list[str]) -> str:
    """A sentence that names the contenders without an entropy among those that are shown."""
    names = [name for contender, name in NO_ENTROPY.items() if contender in contenders]
    return f"These compute no entropy: {', '.join(names)}." if names else ""


def render_readme(results: dict[str, dict], comparisons: tuple[Comparison, ...] = COMPARISONS) -> str:
    """The README's table, its sizes, and a note for each source that has one."""
    notes = {}
    rows = [_row(comparison, results, notes) for comparison in comparisons]
    head = ["", "compared with", "our time", "their time", "ours is", "our memory", "their memory", "processor"]
    sizes = dict.fromkeys(f"* {comparison.work.name}: {comparison.work.sizes}." for comparison in comparisons)
    paragraphs = [
        markdown_table(head, rows),
        "Medians on two threads, in bfloat16 where nothing else is said. Memory is the peak on top of the inputs. "
        + without_entropy([comparison.theirs for comparison in comparisons])
        + "\n",
        "".join(f"{line}\n" for line in sizes),
        *(f"{mark} {note}\n" for note, mark in notes.items()),
        "[bench/results](bench/results/README.md) has every figure. "
        "[docs/performance.md](docs/performance.md) has the reasons and the missed bars.\n",
    ]
    return "\n".join(paragraphs)


# (case, ours, alternatives) of the table of a GPU; an alternative that did not run is left out
ON_A_GPU = (
    ("policy loss from logits", "fused_policy_loss", ("eager torch", "torch.compile of it", "TRL", "Liger")),
    ("policy loss from hidden states", "fused_linear_policy_loss", ("three bare matmuls", "TRL", "Liger")),
    ("training pass of a model", "batch_invariant_mode", ("the mode switched off",)),
    ("decoding of a model", "batch_invariant_mode", ("the mode switched off",)),
)


def render_gpu(results: dict[str, dict]) -> str:
    """The README's table of each GPU with a result of `python bench/gpu.py`; empty if there is none."""
    found = [record for record in results.values() if record["op"] == "gpu" and record["device"] == "cuda"]
    return "\n".join(_of_gpu(record) for record in found)


def _of_gpu(record):
    rows = []
    for what, ours, alternatives in ON_A_GPU:
        for case in (case for case in record["cases"] if case["what"] == what):
            mine = measured(case, ours)
            for name in alternatives:
                theirs = next((entry for entry in case["contenders"] if entry["name"] == name), None)
                if theirs is None or not theirs["seconds"]:
                    continue
                times = durations([median(mine), median(theirs)])
                words = f"{what}, {case['dtype']}, {shape(case['shape'])}"
                rows.append([words, name, *times, faster(median(mine), median(theirs))])
    tests, versions = record["tests"], record["environment"]["versions"]
    source = sources_in_words([case["source"] for case in record["cases"]])
    told = (
        f"On one {record['machine']}, torch {versions['torch']}, triton {versions['triton']}: {tests['passed']} tests "
        f"of tests/gpu passed, {len(tests['failed'])} failed. {source}"
    )
    return f"{told}\n\n{markdown_table(['', 'compared with', 'our time', 'their time', 'ours is'], rows)}"


def _row(comparison, results, notes):
    case = comparison.work.case(results)
    processor = short_machine(results[comparison.work.result])
    ours, theirs = measured(case, comparison.ours), measured(case, comparison.theirs)
    return [
        comparison.work.name,
        comparison.theirs_in_words,
        *durations([median(ours), median(theirs)]),
        faster(median(ours), median(theirs)),
        memory(ours["peak_bytes"]),
        memory(theirs["peak_bytes"]),
        f"{processor} {_mark(case['source'], notes)}".rstrip(),
    ]


def _mark(source, notes):
    """A superscript number for the note of a source, or nothing; `notes` collects the sentences in order."""
    note = note_in_words(source)
    return notes.setdefault(note, "¹²³⁴⁵⁶⁷⁸⁹"[len(notes)]) if note else ""

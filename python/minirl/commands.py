"""The commands of `minirl`: train, eval, discrepancy, plot."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console

from minirl_kernels.config import ObjectiveName

from .config import TrainConfig, refuse_filter
from .config_file import convert, load_config
from .discrepancy.settings import DiscrepancyOptions, default_options
from .discrepancy.target import Target, find_target
from .errors import MiniRLError
from .loss_values import options_of_values
from .paths import home

# endings of picture files
PICTURES = (".png", ".pdf", ".svg", ".jpg", ".jpeg", ".webp")

console = Console(highlight=False, soft_wrap=True)


def run(arguments: Sequence[str]) -> None:
    """Run a command. Raises MiniRLError for an error that the user can correct, SystemExit for --help."""
    name, rest = (arguments[0], arguments[1:]) if arguments else ("", [])
    for argument in rest:  # refuses --rollout.top-p and other filters
        if argument.startswith("--"):
            refuse_filter(argument.removeprefix("--").partition("=")[0])
    # the called command reads the file that is named first, for the defaults of its options
    commands = {
        "train": train_command(rest if name == "train" else []),
        "eval": eval_command,
        "discrepancy": discrepancy_command(rest if name == "discrepancy" else []),
        "plot": plot_command,
    }
    with options_of_values(convert):  # tyro cannot read an objective or a Correction by itself
        if name in commands:
            tyro.cli(commands[name], args=rest, prog=f"minirl {name}")
        else:
            description = "Reinforcement learning of language models on minirl_kernels. --version prints its version."
            tyro.extras.subcommand_cli_from_dict(commands, args=arguments, prog="minirl", description=description)


@dataclass(frozen=True)
class _First:
    """Options that change the defaults of other options, so they are read first."""

    preset: ObjectiveName | None = None
    path: Annotated[str | None, tyro.conf.arg(name="model.path")] = None


def train_command(arguments: Sequence[str]) -> Callable[..., None]:
    """The command `train`. The defaults of its options are the values in the config file."""
    default = TrainConfig()
    if arguments and not arguments[0].startswith("-"):
        # The preset comes first. Then [policy_loss] of the file, and then other options, change single fields.
        first, _ = tyro.cli(_First, args=arguments[1:], add_help=False, return_unknown_args=True)
        default = load_config(Path(home(arguments[0], "CONFIG")), first.preset)
        if first.path is not None:  # given weights exclude model.config, which describes a new model
            default = replace(default, model=replace(default.model, config={}))

    def command(
        config_file: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="CONFIG")],
        config: Annotated[TrainConfig, tyro.conf.arg(name="")] = default,
        overwrite: bool = False,
    ) -> None:
        """Train with the settings of a TOML file. Every key is also an option, which overrides the file.

        Args:
            config_file: The TOML file; it must come before the options.
            overwrite: Replace the run that is in run_dir.
        """
        if str(config_file) != arguments[0]:
            raise MiniRLError(f"{arguments[0]} comes before the config file {config_file}: it must come after it")
        from .run import train  # here, since importing transformers takes seconds

        run_dir = train(config, console, overwrite=overwrite)
        for path, content in (
            (run_dir.model, "final weights and tokenizer"),
            (run_dir.curves, "curves"),
            (run_dir.metrics, "every step"),
            (run_dir.tensorboard, "the same for TensorBoard"),
            (run_dir.config, "the whole configuration"),
        ):
            console.print(f"  {path}  {content}")

    return command


def eval_command(
    run_dir: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN_DIR")],
    k: int | None = None,
    prompts: int | None = None,
    seed: int = 0,
) -> None:
    """avg@k of a finished run: the mean reward of k sampled responses to each held-out prompt.

    Args:
        run_dir: Folder of the run.
        k: Responses per prompt; the run's eval.k if not given.
        prompts: Held-out prompts; the run's eval.prompts if not given.
        seed: Seed of the samples.
    """
    for name, value in (("k", k), ("prompts", prompts)):
        if value is not None and value < 1:
            raise MiniRLError(f"--{name} is {value}: it must be at least 1")
    from .evaluate import evaluate
    from .run_dir import RunDir

    with console.status("sampling"):
        result = evaluate(RunDir(run_dir), k=k, prompts=prompts, seed=seed)
    console.print(
        f"avg@{result.k} on {result.prompts} held-out prompts: {result.reward:.4f} ± {result.standard_error:.4f}"
    )


def discrepancy_command(arguments: Sequence[str]) -> Callable[..., None]:
    """The command `discrepancy`. The defaults of its options are the settings of a run of the target."""
    found = Target(TrainConfig(), Path(), False)
    if arguments and not arguments[0].startswith("-"):
        found = find_target(arguments[0])
    default = default_options(found.config)

    def command(
        target: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="TARGET")],
        options: Annotated[DiscrepancyOptions, tyro.conf.arg(name="")] = default,
    ) -> None:
        """Compare the inference engine μ with the training engine π, and find the first module that differs.

        μ samples responses and π scores them, with the same weights. The options default to the target's settings.

        Args:
            target: A config file (.toml), the folder of a run, or a model's folder or hub name. Put it first.
        """
        if target != arguments[0]:
            raise MiniRLError(f"{arguments[0]} comes before the target {target}: it must come after it")
        from .discrepancy.command import discrepancy  # here, since importing transformers takes seconds

        if not discrepancy(target, found, options, console):
            sys.exit(1)

    return command


def plot_command(
    run_dirs: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN_DIR...")],
    /,
    output: Path | None = None,
) -> None:
    """Draw the curves of a run, or of several in one picture.

    Args:
        run_dirs: Folders of runs.
        output: File name of the picture (.png, .pdf, .svg). Default: curves.png, in the folder of a single run or in
            the current folder.
    """
    from .plots import plot_runs
    from .run_dir import RunDir

    if not run_dirs:
        raise MiniRLError("RUN_DIR is missing: there must be at least one folder of a run")
    if output is not None and output.suffix.lower() not in PICTURES:
        raise MiniRLError(f"--output is {output}: it must be the name of a picture, ending in {', '.join(PICTURES)}")
    runs = [RunDir(path).existing() for path in run_dirs]
    if output is None:
        output = runs[0].curves if len(runs) == 1 else Path("curves.png")
    output = Path(home(str(output), "--output"))
    plot_runs(runs, output)
    console.print(str(output))

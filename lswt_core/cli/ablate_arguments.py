"""The command-line arguments of ``ablate``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import get_args

from lswt_core.ablation.arms import Layout, Match
from lswt_core.cli.ablate_command_line import STORE
from lswt_core.cli.common import plugin_argument
from lswt_core.cli.third_party_checks import unchecked_argument


def arguments_of(parser: argparse.ArgumentParser) -> None:
    """The command's arguments. What an ablation file says too has no default here: the command line
    wins where it speaks.
    """
    parser.add_argument(
        "recipe",
        type=Path,
        nargs="?",
        help=(
            "the baseline's recipe, or an ablation file (TOML with a key `recipe`); with --ladder"
            " it may be left to the ladder"
        ),
    )
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="override a value in every arm, e.g. train.steps=100",
    )
    parser.add_argument(
        "--swap",
        action="append",
        default=[],
        metavar="AXIS=VALUE[,AXIS=VALUE]",
        help=(
            "an arm: e.g. ffn=gelu, memory.xl=false; with commas, one arm that changes several keys"
            " at once: mixer=mamba2,memory.xl=false,positional=none"
        ),
    )
    parser.add_argument(
        "--arm",
        action="append",
        default=[],
        type=Path,
        metavar="FILE",
        help="an arm that is a recipe of its own",
    )
    parser.add_argument(
        "--plan", choices=get_args(Layout), help="how swaps become arms (default one-at-a-time)"
    )
    parser.add_argument("--seeds", type=int, metavar="N", help="runs of every arm (default 5)")
    parser.add_argument(
        "--looks",
        type=numbers,
        metavar="5,10,20",
        help="numbers of seeds at which verdicts are planned (default: one, at --seeds)",
    )
    parser.add_argument(
        "--sequential",
        action="store_true",
        help="add seeds look by look until every arm is decided (--looks, default 5,10,20)",
    )
    parser.add_argument(
        "--match",
        choices=get_args(Match),
        help=(
            "give every arm the baseline's parameters, FLOPs, or time of training, as measured here"
        ),
    )
    parser.add_argument(
        "--knob",
        choices=("d_ffn", "n_layers"),
        default="d_ffn",
        help="the size that is turned to match (default d_ffn)",
    )
    parser.add_argument(
        "--ladder",
        metavar="FILE",
        help=(
            "make the ablation at every size of a ladder, e.g. nano, and say whether it holds as"
            " models grow"
        ),
    )
    parser.add_argument(
        "--margin",
        type=float,
        metavar="NATS",
        help="difference in loss that does not matter (default 0.01)",
    )
    parser.add_argument(
        "--allow",
        action="append",
        default=[],
        metavar="KEY",
        help=(
            "let a difference outside of the swap pass: a key, or parameters, groups, kernels,"
            " initialisation, data, tokens, schedule, causality, context, loss, records"
        ),
    )
    tuning_arguments(parser)
    parser.add_argument(
        "--probe",
        action="append",
        default=[],
        metavar="NAME",
        help=(
            "measure every trained model: memory, context, extrapolation, sinks, segments,"
            " repetition, recall (see evaluate)"
        ),
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="where the report goes (default: runs/ablations/<name>)",
    )
    parser.add_argument(
        "--store",
        type=Path,
        default=STORE,
        metavar="DIR",
        help="where runs are kept and found again",
    )
    parser.add_argument(
        "--jobs",
        type=int,
        metavar="N",
        help="runs at once (default: one for each of --devices, else one)",
    )
    parser.add_argument(
        "--devices",
        metavar="0,1",
        help="numbers of the accelerators to use, each for one run at a time",
    )
    parser.add_argument(
        "--launcher",
        metavar="COMMAND",
        help=(
            "start every run by a command that waits for it, e.g. on a cluster:"
            " 'srun --ntasks=1 --gpus=1 {command}'; with --jobs for how many at once"
        ),
    )
    parser.add_argument("--full", action="store_true", help="ignore the recipe's [cpu] overlay")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="build and certify the arms, show what they cost, and train nothing",
    )
    plugin_argument(parser)
    unchecked_argument(parser)


def tuning_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments about tuning and other lengths of training."""
    parser.add_argument(
        "--tune",
        action="append",
        default=[],
        metavar="KEY=POINTS",
        help=(
            "choose a real number for every arm, the baseline included, with the same effort:"
            " optimizer.lr=5 (points around the recipe's value, a factor of 2 apart),"
            " optimizer.lr=5x3 (a factor of 3), optimizer.lr=1e-4..1e-2/5"
        ),
    )
    parser.add_argument(
        "--tuning-seeds", type=int, metavar="N", help="seeds of the best points (default 3)"
    )
    parser.add_argument(
        "--horizons",
        metavar="0.5,1,2",
        help="compare at these multiples of train.steps too; needs a schedule like wsd",
    )


def numbers(text: str) -> tuple[int, ...]:
    """Numbers with commas between them."""
    return tuple(int(word) for word in text.split(","))

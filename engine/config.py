"""Options: dataclasses of them, and the command line.

A config is a dataclass whose fields are made by `textldm.option`. Each such field becomes an option
of the command line, with its help text, its default and its range.
"""

import argparse
import math
import os
from dataclasses import dataclass, fields

from textldm import option

# Options that are paths. A shell leaves the ~ of --out=~/x as it is.
PATHS = ("data", "out", "vae", "teacher", "model", "gpt", "prompts", "output", "page")
PATHS += ("benchmark", "texts", "evaluator", "evaluation", "pictures")  # of bench/


class UserError(Exception):
    """Something that the user can mend. Scripts print its one sentence and exit with code 2."""


@dataclass
class TrainConfig:
    """What all training scripts share."""

    data: str = option("data/names", "folder of a prepared corpus")
    out: str = option("out", "folder for checkpoints and metrics")
    resume: bool = option(False, "go on from the last checkpoint in --out")
    overwrite: bool = option(False, "replace the checkpoints in --out by a new run's")
    seed: int = option(1, "seed of everything random", 0, 2**31)
    batch_size: int = option(192, "rows in a micro-batch", 1)
    accumulate: int = option(1, "micro-batches in a step", 1)
    max_steps: int = option(500, "steps; more of them with --resume go on at the last rate", 1)
    learning_rate: float = option(0.0, "at its peak; 0: 4e-3 with Muon, 1e-3 without", 0)
    warmup: int = option(100, "steps of linear warm-up, before a cosine down to a tenth", 0)
    weight_decay: float = option(0.01, "on matrices only (the paper's)", 0)
    muon: bool = option(False, "Muon for the matrices of blocks, instead of AdamW")
    eval_interval: int = option(250, "steps between evaluations and checkpoints", 1)
    log_interval: int = option(20, "steps between lines of metrics", 1)
    device: str = option("auto", "cpu, cuda, mps, or auto")
    recompute: bool = option(False, "save memory: the backward pass computes each block again")
    compile: bool = option(False, "torch.compile: a slow start, then faster")


# The size of all networks on a laptop.
TINY = dict(n_layer=4, n_head=3, n_embd=96, block_size=64)
# The schedule of the paper's sizes, in micro-batches that fit one GPU. A step has at most 786,432
# tokens, and 589,824 on average, because rows are cut at random (engine/train.py).
PAPER_SCHEDULE = dict(
    max_steps=200_000,
    batch_size=16,
    accumulate=48,
    learning_rate=1e-4,
    warmup=2000,
    eval_interval=2000,
)
# The paper has one VAE for all sizes of the DiT. `tiny` uses AdamW on purpose: after Muon the
# latents were aligned as well, and the DiT made worse text of them (docs/experiments.md).
VAE_PRESETS = dict(
    tiny=TINY
    | dict(n_layer=2, channels=16, beta_warmup=200, muon=False, max_steps=500, learning_rate=3e-3),
    small=PAPER_SCHEDULE,
    medium=PAPER_SCHEDULE,
    large=PAPER_SCHEDULE,
)
# unspecified: depth and width, chosen to match the paper's 114M, 328M and 768M parameters.
DIT_SCHEDULE = PAPER_SCHEDULE | dict(max_steps=1_000_000)
DIT_PRESETS = dict(
    tiny=TINY | dict(max_steps=2880, eval_interval=960),
    small=DIT_SCHEDULE | dict(n_layer=16, n_head=12, n_embd=768),
    medium=DIT_SCHEDULE | dict(n_layer=26, n_head=16, n_embd=1024),
    large=DIT_SCHEDULE | dict(n_layer=27, n_head=24, n_embd=1536),
)


def check(config_type, values):
    """Raises UserError where a value is not of the type of its field, or out of its range."""
    for f in fields(config_type):
        value = values.get(f.name, f.default)
        low = f.metadata.get("low")
        high = f.metadata.get("high")
        if f.type is int:
            low = 0 if low is None else low
            high = 2**31 if high is None else high
        if f.type is float:
            high = 1e38 if high is None else high  # fp32 ends at 3e38
        fits = type(value) is f.type
        fits = fits and (f.type is not float or math.isfinite(value))
        fits = fits and (low is None or value >= low)
        fits = fits and (high is None or value <= high)
        if not fits:
            wanted = f.type.__name__
            if f.type in (int, float):
                wanted += f" from {low} to {high}"
            raise UserError(f"--{f.name}={value!r}: expected {wanted}")


def make_config(config_type, values):
    """A config of the fields in values (a dict), checked. Raises UserError."""
    check(config_type, values)
    try:
        return config_type(**values)
    except ValueError as e:  # what a config itself refuses
        raise UserError(f"--{e}") from None


def command_line(description, *config_types, presets=None, recipe=None):
    """Makes one config of each type from sys.argv.

    An option beats the preset, the preset beats the recipe, and the recipe beats the default of the
    config. `presets` is a dict of dicts, of which "tiny" is the default; `recipe` is textldm.OURS,
    which --recipe=paper leaves out. What is unknown, of another type or out of range ends the
    program with one line and exit code 2."""
    presets = presets or {"tiny": {}}
    recipe = recipe or {}
    parser = argparse.ArgumentParser(
        description=description,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    if len(presets) > 1:
        parser.add_argument(
            "--preset", choices=presets, default="tiny", help="sizes and schedule (tiny)"
        )
    if recipe:
        parser.add_argument(
            "--recipe",
            choices=("ours", "paper"),
            default="ours",
            help="paper: without our departures from it (ours)",
        )
    options = [f for t in config_types for f in fields(t) if f.metadata]
    for f in options:
        default = presets["tiny"].get(f.name, recipe.get(f.name, f.default))
        text = f.metadata["help"] + (f" ({default})" if default != "" else "")
        text = text.replace("%", "%%")
        if f.type is bool:
            action = argparse.BooleanOptionalAction
            parser.add_argument(f"--{f.name}", help=text, default=argparse.SUPPRESS, action=action)
        else:
            parser.add_argument(f"--{f.name}", help=text, default=argparse.SUPPRESS, type=f.type)
    given = vars(parser.parse_args())

    values = {}
    if given.pop("recipe", "paper") == "ours":
        values.update(recipe)
    preset = "tiny"
    if len(presets) > 1:
        preset = given.pop("preset", "tiny")
    values.update(presets[preset])
    values.update(given)
    for name in PATHS:
        if name in values:
            values[name] = os.path.expanduser(values[name])
    configs = []
    for t in config_types:
        names = {f.name for f in fields(t)}
        configs.append(make_config(t, {k: v for k, v in values.items() if k in names}))
    return configs

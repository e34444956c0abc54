"""The report of bench/evaluate.py in Markdown, and what it says of the machine and the code."""

import math
import os
import platform
import subprocess
from pathlib import Path

import torch

COLUMNS = (
    "",
    "knobs",
    "NLL/token",
    "NLL/byte",
    "NLL/word by counts",
    "entropy",
    "distinct-2",
    "MAUVE",
    "4-grams of prompt",
    "of training",
    "words known",
    "copies",
    "words repeated",
    "tokens",
    "ended",
    "NFE",
    "seconds",
)
# Columns of --likeness.
LIKENESS = dict(rouge_1="R-1", rouge_2="R-2", rouge_l="R-L", bertscore="BERTScore")


def report_of(result, ours):
    """The text of eval.md, from the dict of eval.json. ours: the names of the rows that all others
    are compared with."""
    columns = list(COLUMNS)
    if result["setting"]["likeness"]:
        columns += LIKENESS.values()
    lines = [describe(result), "", row_of(columns), "|" + "---|" * len(columns)]
    for name, row in result["systems"].items():
        lines.append(row_of(cells_of(name, row)))
    if result["frontier"]:
        lines += frontier_lines(result, ours)
    return "\n".join(lines) + "\n"


def describe(result):
    setting = result["setting"]
    first = next(iter(result["texts"].values()))
    return (
        f"`{setting['command']}`, commit {setting['commit']}, {setting['machine']}.\n\n"
        f"{len(first['nll'])} prompts of {setting['benchmark']} (knobs chosen on the other half), "
        f"rows of at most {setting['row']} tokens; NLL and MAUVE's features: "
        f"{setting['evaluator']}, {setting['clusters']} clusters; entropy of {setting['count']} "
        "tokens. ± is half of a 95% interval. "
        f"Seconds are for {setting['n']} prompts."
    )


def row_of(cells):
    return "| " + " | ".join(cells) + " |"


def cell(x, digits=1):
    """A number, a (number, half an interval), or a string that says why there is none."""
    if isinstance(x, str):
        return x
    if isinstance(x, (list, tuple)):
        return f"{x[0]:.{digits}f} ± {x[1]:.{digits}f}"
    return f"{x:.{digits}f}"


def cells_of(name, row):
    return [
        name,
        " ".join(f"{key} {value:g}" for key, value in row["knob"].items()),
        cell(row["nll"], 2),
        cell(row["nll_byte"], 2),
        cell(row["nll_word"], 2),
        cell(row["entropy"], 2),
        cell(row["distinct_2"]),
        cell(row["mauve"]),
        f"{row['copied_prompt']:.1f}%",
        f"{row['copied_train']:.1f}%",
        f"{row['words_known']:.1f}%",
        f"{row['copies']:.1f}%",
        f"{row['repeated']:.1f}%",
        cell(row["tokens"]),
        f"{100 * row['ended']:.0f}%",
        f"{row['evaluations']:.0f}",
        cell(row["seconds"]),
        *[cell(row[name]) for name in LIKENESS if name in row],
    ]


def frontier_lines(result, ours):
    """NLL at the entropy of real text, and differences between systems."""
    real = result["real"]
    lines = [
        "",
        "Frontier: NLL a token at the entropy of real text (which has "
        f"{real['nll']:.2f} at {real['entropy']:.2f}), its perplexity as a multiple of the first "
        f"GPT's, and NLL a word by counts there (real text: {real['nll_word']:.2f}). Then how much "
        "more NLL a token a row has than a column, at the chosen knobs, paired by "
        "prompt:",
        "",
        "| " + row_of(["NLL there", "perplexity", "by counts", *[f"than {name}" for name in ours]]),
        "|---|---|---|---|" + "---|" * len(ours),
    ]
    base = nll_of_first_gpt(result)
    for name, nll in result["nll_at_real_entropy"].items():
        there = "not reached" if nll is None else f"{nll:.2f}"
        times = ""
        if nll is not None and base is not None:
            times = f"{math.exp(nll - base):.2f} x"
        cells = [difference_cell(result["differences"][name].get(other)) for other in ours]
        by_counts = result["nll_word_at_real_entropy"][name]
        by_counts = "" if by_counts is None else f"{by_counts:.2f}"
        lines.append(row_of([name, there, times, by_counts, *cells]))
    return lines


def nll_of_first_gpt(result):
    for name, nll in result["nll_at_real_entropy"].items():
        if "top_p" in result["systems"][name]["knob"]:
            return nll
    return None


def difference_cell(difference):
    return cell(difference, 2) if difference else ""


def machine(device):
    """Processor and accelerator, in words."""
    name = platform.processor()
    if Path("/proc/cpuinfo").exists():
        name = ""
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                name = line.split(":")[1].strip()
                break
    text = f"{os.cpu_count()} x {name}"
    if device.type == "cuda":
        text += f", {torch.cuda.get_device_name()}"
    return text


def commit():
    """The commit of this code, and whether it was changed since."""
    try:
        name = git("rev-parse", "--short", "HEAD")
        return name + "-dirty" if git("status", "--porcelain") else name
    except OSError:
        return "unknown"


def git(*arguments):
    folder = Path(__file__).parent
    done = subprocess.run(("git", *arguments), capture_output=True, text=True, cwd=folder)
    return done.stdout.strip()

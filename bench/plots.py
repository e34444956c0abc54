"""The pictures of the documentation, from what the other scripts wrote. What is missing is left
out, with a line that says so.

    python bench/plots.py                            # of the models in out/, to out/pictures
    python bench/plots.py --out=out/names/s1 --without=out/names/norepa1 \\
        --data=data/names --evaluation=out/names/eval.json

pipeline      how text becomes latents, and latents text
training      what the stages minimise, by step
context       the DiT's loss with its own and with another context, by the time
estimate      the share of tokens that noisy latents and the DiT's estimate give, by the time
latents       the latents of validation text on their first two principal components
frontier      NLL against entropy, a curve for each system of bench/evaluate.py
long          the text of a DiT against its epochs, beside GPTs (bench/long.sh)

A picture has one message, which is its title. Titles are computed where they can be. What frontier
and long say depends on the systems, so --title says it.
"""

import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from bench.metrics import curves_of, running
from engine.checkpoint import build, load_checkpoint
from engine.config import command_line
from engine.corpus import Corpus
from engine.loop import pick_device
from engine.script import UserError, run_script
from textldm import TextVAE, VAEConfig, option
from variants.cola_dlm import CausalVAE

INK, BLUE, ORANGE, GREY = "#222222", "#1f6fb4", "#d9730d", "#9a9a9a"
PALE_BLUE, PALE_ORANGE, PALE_GREY, WHITE = "#cfe2f3", "#fde3c8", "#e3e3e3", "#ffffff"
STYLE = {
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.edgecolor": "#666666",
    "savefig.facecolor": "white",
    "axes.spines.top": False,
    "axes.spines.right": False,
}
# Systems that bench/evaluate.py calls by their kind.
KINDS = dict(gpt="autoregressive GPT", masked="masked diffusion", textldm="TextLDM")


@dataclass
class PlotConfig:
    out: str = option("out", "folder of the checkpoints and the metrics beside them")
    without: str = option("", "folder of a VAE without REPA (--teacher=none), for latents")
    evaluation: str = option("", "what bench/evaluate.py wrote (OUT/eval.json); with commas")
    systems: str = option("", "which to draw, with commas (all; `a` is a 1, a 2 ..., too)")
    data: str = option("data/names", "folder of the prepared corpus, for latents")
    title: str = option("", "of frontier and long: what they show")
    pictures: str = option("", "folder to write to (OUT/pictures)")


def folder_of(options):
    return Path(options.pictures or f"{options.out}/pictures")


# ---- Pipeline ------------------------------------------------------------------------------------


class Box(NamedTuple):
    x: float
    width: float
    text: str
    color: str


class Diagram:
    """Boxes and arrows."""

    def __init__(self, plt):
        self.plt = plt
        self.figure, self.axes = plt.subplots(figsize=(10, 3.6))
        self.axes.set(xlim=(0, 92), ylim=(0, 36))
        self.axes.axis("off")

    def title(self, y, text):
        self.axes.text(0, y, text, fontsize=9.5, weight="bold", va="center", color=INK)

    def row(self, y, *boxes):
        """Boxes at height y, with arrows between neighbours."""
        for box in boxes:
            patch = self.plt.matplotlib.patches.FancyBboxPatch(
                (box.x, y - 2.6),
                box.width,
                5.2,
                boxstyle="round,pad=0,rounding_size=0.8",
                facecolor=box.color,
                edgecolor=INK,
                lw=0.8,
            )
            self.axes.add_patch(patch)
            middle = box.x + box.width / 2
            self.axes.text(middle, y, box.text, ha="center", va="center", fontsize=9.5, color=INK)
        for left, right in zip(boxes, boxes[1:]):
            self.arrow((left.x + left.width, y), (right.x, y))

    def arrow(self, start, end, gap=1, size=10):
        look = dict(arrowstyle="-|>", color=INK, lw=1, mutation_scale=size)
        self.axes.annotate("", end, start, arrowprops=dict(look, shrinkA=gap, shrinkB=gap))


def pipeline(plt, options):
    diagram = Diagram(plt)
    diagram.axes.set_title(
        "Text becomes latents, a DiT makes latents out of noise, and they become text"
    )
    encoder = Box(30, 11, "encoder", PALE_BLUE)
    decoder = Box(64, 12, "decoder", PALE_BLUE)

    diagram.title(32, "stage 1\ntrain_vae.py")
    latents_z = Box(46, 13, "latents z", PALE_ORANGE)
    tokens_in = Box(15, 10, "tokens", WHITE)
    tokens_out = Box(81, 10, "tokens", WHITE)
    diagram.row(32, tokens_in, encoder, latents_z, decoder, tokens_out)
    diagram.row(24.8, Box(42, 21, "frozen GPT's features", PALE_GREY))
    diagram.arrow((52.5, 27.4), (52.5, 29.4), gap=0, size=7)
    diagram.axes.text(54, 28.4, "made alike (REPA)", fontsize=8.5, va="center", color=INK)

    diagram.title(18, "stage 2\ntrain_dit.py")
    seen = Box(15, 26, "context's latents, clean;\ntarget's latents, noisy", PALE_ORANGE)
    said = Box(64, 27, "p(token), hence\nclean latents, and a velocity", WHITE)
    diagram.row(18, seen, Box(46, 13, "DiT", PALE_BLUE), said)

    diagram.title(4, "sampling\nsample.py")
    diagram.row(11, Box(30, 11, "noise", PALE_ORANGE))
    diagram.arrow((41, 10.5), (46.5, 6.6))
    prompt = Box(15, 10, "prompt", WHITE)
    dit = Box(46, 13, "DiT, 20 times", PALE_BLUE)
    diagram.row(4, prompt, encoder, dit, decoder, Box(81, 10, "text", WHITE))
    return diagram.figure


# ---- Training ------------------------------------------------------------------------------------


class Panel(NamedTuple):
    title: str
    terms: dict  # of the metrics, with labels
    unit: str
    dots: str = "validation"


PANELS = dict(
    gpt=Panel("GPT, the teacher", dict(loss="cross-entropy"), "nats per token"),
    vae=Panel(
        "VAE",
        dict(ce="cross-entropy", cos="cosine with the GPT (REPA)"),
        "nats per token; cosine",
    ),
    dit=Panel(
        "DiT",
        dict(loss="loss at random t"),
        "nats per token (or squared error)",
        "validation, mean of nine t",
    ),
)
LDLM_PANEL = Panel(
    "LDLM",
    dict(diffusion="diffusion", hidden="hidden states", word="tokens"),
    "squared error, or nats per token",
)


def metrics_of(out, stage):
    """Of a stage: the dicts of its steps, and (step, dict) of its evaluations."""
    path = Path(out) / f"{stage}.jsonl"
    steps = []
    evaluations = []
    if path.is_file():
        for line in path.read_text().splitlines():
            content = json.loads(line)
            if "val" in content:
                evaluations.append((content["step"], content["val"]))
            else:
                steps.append(content)
    return steps, evaluations


def training(plt, options):
    """What is minimised, by step."""
    found = {}
    for stage in PANELS:
        steps, evaluations = metrics_of(options.out, stage)
        if steps:
            found[stage] = steps, evaluations
    if not found:
        raise UserError(f"training: no metrics in {options.out}")
    size = (3.9 * len(found), 3.2)
    figure, all_axes = plt.subplots(
        1, len(found), figsize=size, squeeze=False, layout="constrained"
    )
    for axes, (stage, (steps, evaluations)) in zip(all_axes[0], found.items()):
        panel = LDLM_PANEL if "diffusion" in steps[0] else PANELS[stage]
        draw_losses(axes, panel, steps, evaluations)
    steps = sum(steps[-1]["step"] for steps, _ in found.values())
    figure.suptitle(f"What each stage learns, in {steps:,} steps together")
    return figure


def draw_losses(axes, panel, steps, evaluations):
    """A line for each term. Dots are of validation text."""
    last = list(panel.terms)[-1]
    for (key, label), color in zip(panel.terms.items(), (BLUE, ORANGE, GREY)):
        x = [line["step"] for line in steps]
        axes.plot(x, [line[key] for line in steps], color=color, lw=1.2, label=label)
        dots = [(step, val[key]) for step, val in evaluations if key in val]
        has_label = key == last and dots
        axes.plot(
            [step for step, _ in dots],
            [value for _, value in dots],
            "o",
            color=color,
            markersize=5,
            label=panel.dots if has_label else None,
        )
    axes.set(title=panel.title, xlabel="step", ylabel=panel.unit)
    finish(axes)


def finish(axes):
    axes.legend(frameon=False, fontsize=9)
    axes.grid(alpha=0.25)


# ---- By time -------------------------------------------------------------------------------------


def evaluations_of(options):
    """The evaluations of the DiT: tables by time."""
    _, evaluations = metrics_of(options.out, "dit")
    if not evaluations:
        raise UserError(f"context, estimate: no evaluations in {options.out}/dit.jsonl")
    return [val["table"] for _, val in evaluations]


def draw_by_time(plt, tables, curves, label):
    """curves: (name, color, label) of what is drawn. Earlier evaluations are paler."""
    figure, axes = plt.subplots(figsize=(5.6, 3.8))
    for i, table in enumerate(tables, start=1):
        is_last = i == len(tables)
        look = dict(
            alpha=0.25 + 0.75 * i / len(tables),
            lw=1.5 if is_last else 0.8,
            marker="o" if is_last else None,
            markersize=4,
        )
        t = [row["t"] for row in table]
        for key, color, name in curves:
            values = [row[key] for row in table]
            axes.plot(t, values, color=color, label=name if is_last else None, **look)
    axes.set(xlabel="time t (0 is text, 1 is noise)", ylabel=label)
    finish(axes)
    return figure, axes


def context(plt, options):
    """Where the context helps."""
    tables = evaluations_of(options)
    curves = (
        ("loss", BLUE, "with its own context"),
        ("shuffled", ORANGE, "with the context of another text"),
    )
    label = "loss of the DiT on validation text,\nnats per token (or squared error)"
    figure, axes = draw_by_time(plt, tables, curves, label)
    row = max(tables[-1], key=lambda row: row["shuffled"] - row["loss"])
    gain = row["shuffled"] - row["loss"]
    axes.set_title(f"The context helps most at t = {row['t']:g}, by {gain:.1f}")
    return figure


def estimate(plt, options):
    """What the DiT makes of noise."""
    tables = evaluations_of(options)
    curves = (
        ("predicted", BLUE, "of the DiT's estimate of the clean latents"),
        ("noisy", GREY, "of the noisy latents themselves"),
    )
    label = "share of tokens that decode right"
    figure, axes = draw_by_time(plt, tables, curves, label)
    axes.set_ylim(0, 1.02)
    row = max(tables[-1], key=lambda row: row["predicted"] - row["noisy"])
    axes.set_title(
        f"At t = {row['t']:g} noisy latents give {row['noisy']:.0%} of the tokens,\n"
        f"and the DiT's estimate gives {row['predicted']:.0%}"
    )
    return figure


# ---- Latents -------------------------------------------------------------------------------------


@torch.no_grad()
def latents(plt, options):
    """Each dot is a token of validation text in its place. Means of frequent tokens carry their
    text."""
    corpus = Corpus(options.data, "val", 64)
    train = Corpus(options.data, "train", 64)
    count = np.bincount(train.tokens, minlength=corpus.meta["vocab_size"])
    folders = {"with REPA": options.out}
    if options.without:
        folders["without REPA"] = options.without
    size = (5.6 * len(folders), 4.8)
    figure, all_axes = plt.subplots(1, len(folders), figsize=size, squeeze=False)
    shares = {}
    for axes, (title, folder) in zip(all_axes[0], folders.items()):
        z, tokens = latents_of(folder, corpus)
        x = principal_components(z)
        color = np.log10(count[tokens].clip(1))
        dots = axes.scatter(*x.T, c=color, s=5, cmap="viridis", alpha=0.6, linewidths=0)
        write_tokens(axes, x, tokens, np.argsort(-count), corpus.encoding)
        share = share_of_token(z, tokens)
        shares[title] = share
        axes.set_title(f"{title}: a token fixes {share:.0%}\nof the variance of its latents")
        axes.set_xlabel("first principal component")
    all_axes[0][0].set_ylabel("second principal component")
    label = "how often the token is in the training text, log10"
    figure.colorbar(dots, ax=list(all_axes[0]), label=label)
    if len(shares) == 2:
        first, second = (1 - share for share in shares.values())
        title = f"REPA lets latents hold more than their tokens: {first:.0%} of the variance"
        title += f", and {second:.0%} without it"
        figure.suptitle(title, y=1.03)
    return figure


def latents_of(folder, corpus):
    """Latents (n, C) and tokens (n,) of a batch of the corpus, by the VAE in a folder."""
    device, _ = pick_device("auto")
    kinds = ("vae", "causal_vae")
    remedy = "python train_vae.py makes one"
    state = load_checkpoint(f"{folder}/vae.pt", kinds, remedy, corpus.tokenizer)
    vae_type = CausalVAE if state["kind"] == "causal_vae" else TextVAE
    vae = build(vae_type, VAEConfig, state).to(device)
    corpus.N = min(corpus.N, vae.config.block_size)
    (batch,) = corpus.fixed_batches(1, device)
    is_text = (batch.counted & (batch.tokens != corpus.eot)).cpu()  # (B, N)
    z = vae.latents(batch.tokens, batch.segment).cpu()  # (B, N, C)
    return z[is_text], batch.tokens.cpu()[is_text].numpy()


def principal_components(z):
    """z (n, C) -> its first two principal components (n, 2)."""
    _, _, directions = torch.pca_lowrank(z, q=min(6, z.shape[1]), niter=8)
    return ((z - z.mean(0)) @ directions[:, :2]).numpy()


def write_tokens(axes, x, tokens, order, encoding, most=28):
    """Writes the text of tokens at the means of their places x (n, 2), in this order of tokens,
    where there is room."""
    box = dict(boxstyle="round,pad=0.1", facecolor="white", edgecolor="none", alpha=0.7)
    look = dict(fontsize=8, ha="center", va="center", color="black", bbox=box)
    room = np.ptp(x, axis=0) * (0.13, 0.035)  # of a text, in the picture
    placed = []
    for token in order:
        here = tokens == token
        text = encoding.decode([int(token)]).strip()
        if here.sum() <= 3 or len(text) < 2:
            continue
        place = x[here].mean(0)
        if any(np.abs((place - other) / room).max() < 1 for other in placed):
            continue
        axes.text(*place, text, **look)
        placed.append(place)
        if len(placed) == most:
            break


def share_of_token(z, tokens):
    """The share of the variance of latents z (n, C) that the tokens (n,) explain. Rare tokens do
    not count."""
    is_frequent = np.bincount(tokens)[tokens] > 4
    within = 0
    for token in set(tokens[is_frequent]):
        of_token = z[tokens == token]
        within += ((of_token - of_token.mean(0)) ** 2).sum()
    frequent = z[is_frequent]
    return 1 - within / ((frequent - frequent.mean(0)) ** 2).sum()


# ---- Frontier ------------------------------------------------------------------------------------


def family_of(name):
    """The name of a system without the number of its seed."""
    return re.sub(r"\s+\d+$", "", name)


def in_words(family):
    """What the legend calls the systems of a family."""
    if family.startswith("blocks of "):
        return f"Cola DLM, {family} tokens"
    return KINDS.get(family, family)


def frontier(plt, options):
    """A curve for each system; all seeds of one have one colour."""
    points = {}
    for path in (options.evaluation or f"{options.out}/eval.json").split(","):
        if not Path(path).is_file():
            raise UserError(f"frontier: {path} is missing; bench/evaluate.py makes it")
        result = json.loads(Path(path).read_text())
        points |= result["frontier"]
    names = systems_to_draw(options, points)
    families = list(dict.fromkeys(family_of(name) for name in names))
    palette = plt.colormaps["tab10"].colors
    figure, axes = plt.subplots(figsize=(7.6, 5))
    colors = {}
    for i, family in enumerate(families):
        colors[family] = palette[i % len(palette)]
        label = in_words(family)
        axes.plot([], [], "o-", color=colors[family], label=label, lw=1.4, markersize=4)
    for name in names:
        for curve in curves_of(points[name]).values():
            draw_curve(axes, curve, colors[family_of(name)])
    real = result["real"]
    star = dict(color=INK, markersize=15, label="real text")
    note = dict(ha="right", va="bottom", fontsize=8, color=GREY)
    axes.plot(real["entropy"], real["nll"], "*", **star)
    axes.set_xlabel("entropy of the tokens, nats (left: repeats itself)")
    axes.set_ylabel("NLL by an independent GPT, nats per token (low: fluent)")
    axes.set_title(options.title or "Nearer to real text is better")
    axes.text(0.99, 0.01, "small numbers: temperatures", transform=axes.transAxes, **note)
    finish(axes)
    return figure


def systems_to_draw(options, names):
    """Those of the names that --systems asks for, or all."""
    wanted = [part.strip() for part in options.systems.split(",") if part.strip()]
    if not wanted:
        return list(names)
    return [name for name in names if name in wanted or family_of(name) in wanted]


def draw_curve(axes, curve, color):
    """curve: the points of a system that differ in one setting, whose value is written beside
    each."""
    x = [point["entropy"] for point in curve]
    y = [point["nll"] for point in curve]
    axes.plot(x, y, "o-", color=color, lw=1.4, markersize=4)
    if len(curve) == 1:
        return
    for point in curve:
        setting = running(point["knob"])
        text = f"{point['knob'][setting]:g}"
        if setting == "cfg":
            text = "guidance " + text
        place = (point["entropy"], point["nll"])
        look = dict(textcoords="offset points", fontsize=7, color=GREY)
        axes.annotate(text, place, (3, 3), **look)


def long(plt, options):
    """The numbers of DiTs after some epochs, two seeds, and those of GPTs as lines."""
    path = Path(options.evaluation or f"{options.out}/eval.json")
    if not path.is_file():
        raise UserError(f"long: {path} is missing; bench/evaluate.py makes it")
    result = json.loads(path.read_text())
    rows_of_an_epoch = len(Corpus(options.data, "train", 2).ends)
    steps = {}
    for name in result["systems"]:
        found = re.fullmatch(r"(\d+) steps \d+", name)
        if found:
            steps[name] = int(found[1])
    if not steps:
        raise UserError(f"long: {path} has no rows like `500 steps 1`; bench/long.sh makes them")

    panels = {
        "NLL, nats per token, at real text's entropy": result["nll_at_real_entropy"].get,
        "MAUVE, percent": lambda name: result["systems"][name]["mauve"][0],
        "copies of training names, percent": lambda name: result["systems"][name]["copies"],
    }
    figure, all_axes = plt.subplots(1, 3, figsize=(11, 3.6))
    for axes, (title, number) in zip(all_axes, panels.items()):
        for seed in ("1", "2"):
            names = [name for name in steps if name.endswith(seed) and number(name) is not None]
            x = [steps[name] * 192 / rows_of_an_epoch for name in names]
            axes.plot(x, [number(name) for name in names], "o-", color=BLUE, markersize=4, lw=1.4)
        for name in result["systems"]:
            value = number(name)
            if name.startswith("GPT") and value is not None:
                color = ORANGE if "more" in name else GREY
                axes.axhline(value, color=color, lw=1.2, ls="--")
        axes.set_title(title, fontsize=9)
        axes.set_xlabel("epochs")
    for label, color in {"GPT, 3 epochs": GREY, "GPT, 12 epochs": ORANGE}.items():
        all_axes[0].plot([], [], "--", color=color, label=label)
    all_axes[0].plot([], [], "o-", color=BLUE, markersize=4, label="TextLDM, two seeds")
    all_axes[0].axhline(result["real"]["nll"], color=INK, lw=1, ls=":", label="real text")
    all_axes[0].legend(frameon=False, fontsize=8)
    figure.suptitle(options.title)
    figure.tight_layout()
    return figure


# ---- The run -------------------------------------------------------------------------------------


def load_matplotlib():
    try:
        import matplotlib
    except ImportError:
        raise UserError("the pictures need one more package: pip install matplotlib") from None
    matplotlib.use("Agg")
    import matplotlib.patches
    import matplotlib.pyplot as plt

    plt.rcParams.update(STYLE)
    return plt


def main():
    (options,) = command_line(__doc__, PlotConfig)
    plt = load_matplotlib()
    folder_of(options).mkdir(parents=True, exist_ok=True)
    for draw in (pipeline, training, context, estimate, latents, frontier, long):
        path = folder_of(options) / f"{draw.__name__}.png"
        try:
            figure = draw(plt, options)
        except UserError as e:
            print(f"left out: {e}")
            continue
        # Its white background makes it readable on a dark page, too.
        figure.savefig(path, dpi=130, bbox_inches="tight", pad_inches=0.12)
        plt.close(figure)
        print(f"wrote {path}")


if __name__ == "__main__":
    run_script(main)

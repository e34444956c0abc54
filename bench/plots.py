"""The pictures of the README, from what the other scripts wrote. What is not there is left out, with a line that says so.

    python bench/plots.py                                           # of the models in out/, to out/pictures
    python bench/plots.py --out=out/names/s1 --without=out/names/norepa1 --data=data/names --evaluation=out/names/eval.json

pipeline      how text becomes latents, and latents text
trace         text as it forms out of noise (sample.py --trace), a picture and an animation
training      what the stages minimise, by step
by_time       the DiT's loss and its estimates, by the time from data to noise: where context helps, and where guessing begins
latents       the latents of val on their first two principal components, with REPA and without
frontier      NLL against entropy, a curve a system, of bench/evaluate.py
"""

import ast
import json
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]
from textldm import Config, Corpus, TextVAE, UserError, VAEConfig, command_line, load_checkpoint, model_from, option, pick_device, run

INK, BLUE, ORANGE, GREY = "#222222", "#1f6fb4", "#d9730d", "#9a9a9a"


@dataclass
class PlotConfig(Config):
    out: str = option("out", "folder of the checkpoints and the metrics beside them")
    without: str = option("", "folder of a VAE without REPA (train_vae.py --teacher=none), for latents")
    evaluation: str = option("", "what bench/evaluate.py wrote (OUT/eval.json)")
    systems: str = option("", "those of the evaluation to draw, with commas (all; `a` is a 1, a 2 ..., too)")
    data: str = option("data/names", "folder of the prepared corpus, for latents")
    prompt: str = option("greek small letter", "for trace")
    pictures: str = option("", "folder to write to (OUT/pictures)")
    seed: int = option(0, "of the noise, for trace", 0)


def pipeline(plt, options):
    figure, axes = plt.subplots(figsize=(10, 3.6))
    axes.set(xlim=(0, 92), ylim=(0, 36))
    axes.axis("off")
    white, blue, orange, grey = "#ffffff", "#cfe2f3", "#fde3c8", "#e3e3e3"

    def row(y, boxes):
        """Boxes (x, width, text, color) with arrows between neighbours."""
        for i, (x, width, text, color) in enumerate(boxes):
            axes.add_patch(plt.matplotlib.patches.FancyBboxPatch((x, y - 2.6), width, 5.2, boxstyle="round,pad=0,rounding_size=0.8", facecolor=color, edgecolor=INK, lw=0.8))
            axes.text(x + width / 2, y, text, ha="center", va="center", fontsize=9.5, color=INK)
            if i:
                arrow((boxes[i - 1][0] + boxes[i - 1][1], y), (x, y))

    def arrow(start, end, style="-|>", gap=1, size=10):
        axes.annotate("", end, start, arrowprops=dict(arrowstyle=style, color=INK, lw=1, shrinkA=gap, shrinkB=gap, mutation_scale=size))

    for y, title in ((32, "stage 1\ntrain_vae.py"), (18, "stage 2\ntrain_dit.py"), (4, "sampling\nsample.py")):
        axes.text(0, y, title, fontsize=9.5, weight="bold", va="center", color=INK)
    row(32, [(15, 10, "tokens", white), (30, 11, "encoder", blue), (46, 13, "latents z", orange), (64, 12, "decoder", blue), (81, 10, "tokens", white)])
    row(24.8, [(42, 21, "frozen GPT's features", grey)])
    arrow((52.5, 27.4), (52.5, 29.4), style="<|-|>", gap=0, size=7)
    axes.text(54, 28.4, "REPA: made alike", fontsize=8.5, va="center", color=INK)
    row(18, [(15, 26, "context's latents, clean;\ntarget's latents, noisy", orange), (46, 13, "DiT", blue), (64, 27, "p(token), hence\nclean latents, and a velocity", white)])
    row(11, [(30, 11, "noise", orange)])
    arrow((41, 10.5), (46.5, 6.6))
    row(4, [(15, 10, "prompt", white), (30, 11, "encoder", blue), (46, 13, "DiT, 20 times", blue), (64, 12, "decoder", blue), (81, 10, "text", white)])
    return figure


def trace(plt, options):
    """Rows of t and the text that the DiT's estimate points to; a word turns black in the row from which on it stays."""
    from PIL import Image  # comes with matplotlib
    command = [sys.executable, ROOT / "sample.py", f"--out={options.out}", f"--prompt={options.prompt}", f"--seed={options.seed}", "--trace"]
    said = subprocess.run(command, capture_output=True, text=True)
    if said.returncode:
        raise UserError(f"trace: {said.stderr.strip().splitlines()[-1]}")
    lines = [(t, ast.literal_eval(text)) for t, text in re.findall(r"^t=(\S+)  (.*)$", said.stdout, re.M)]
    lines.append(("0", said.stdout.rstrip("\n").split("\n")[-1].split("|", 1)[1]))
    words = [[m.group() for m in re.finditer(r"\S+", text)] for _, text in lines]
    stays = [[all(later[j : j + 1] == [word] for later in words[i:]) for j, word in enumerate(row)] for i, row in enumerate(words)]
    width = 8 + len(options.prompt) + max(len(text) for _, text in lines)
    em = 0.602 * 12 / 72  # inches of a character of DejaVu Sans Mono at 12 points

    def draw(shown):
        figure = plt.figure(figsize=(em * (width + 2), 0.28 * len(lines) + 0.15))
        axes = figure.add_axes((0, 0, 1, 1), xlim=(-1, width + 1), ylim=(len(lines) - 0.3, -0.7))
        axes.axis("off")
        put = lambda x, y, text, color: axes.text(x, y, text, family="DejaVu Sans Mono", fontsize=12, color=color, va="center_baseline")
        for i, (t, text) in enumerate(lines[:shown]):
            put(0, i, f"t={float(t):.2f}  {options.prompt}", GREY)
            for m, done in zip(re.finditer(r"\S+", text), stays[i]):
                put(8 + len(options.prompt) + m.start(), i, m.group(), INK if done else ORANGE)
        return figure

    frames = []
    for shown in (*range(1, len(lines) + 1), *[len(lines)] * 6):
        figure = draw(shown)
        figure.canvas.draw()
        frames.append(Image.fromarray(np.asarray(figure.canvas.buffer_rgba())[..., :3]).quantize(16))
        plt.close(figure)
    frames[0].save(folder_of(options) / "trace.gif", save_all=True, append_images=frames[1:], duration=450, loop=0)
    return draw(len(lines))


def metrics_of(out, stage):
    path = Path(out) / f"{stage}.jsonl"
    if not path.is_file():
        return [], []
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [x for x in lines if "val" not in x], [(x["step"], x["val"]) for x in lines if "val" in x]


def training(plt, options):
    """What is minimised, in nats a token where it is a cross-entropy; dots are of val."""
    panels = dict(gpt=("GPT, the teacher", dict(loss="cross-entropy"), "nats a token"),
                  vae=("VAE", dict(ce="cross-entropy, nats a token", cos="REPA's cosine"), "nats, cosine"),
                  dit=("DiT", dict(loss="loss at random t; val: mean of nine t"), "nats a token"))
    found = {stage: metrics_of(options.out, stage) for stage in panels}
    found = {stage: x for stage, x in found.items() if x[0]}
    if not found:
        raise UserError(f"training: no metrics in {options.out}")
    figure, all_axes = plt.subplots(1, len(found), figsize=(3.9 * len(found), 3.2), squeeze=False)
    for axes, (stage, (steps, val)) in zip(all_axes[0], found.items()):
        title, terms, unit = panels[stage]
        if "diffusion" in steps[0]:
            title, unit, terms = "LDLM", "squared error, or nats", dict(diffusion="diffusion", hidden="hidden states", word="tokens")
        for (key, label), color in zip(terms.items(), (BLUE, ORANGE, GREY)):
            axes.plot([x["step"] for x in steps], [x[key] for x in steps], color=color, lw=1.2, label=label)
            dots = [(step, v[key]) for step, v in val if key in v]
            axes.plot([s for s, _ in dots], [v for _, v in dots], "o", color=color, markersize=5, label="val" if key == [*terms][-1] else None)
        axes.set(title=title, xlabel="step", ylabel=unit)
        axes.legend(frameon=False, fontsize=9)
        axes.grid(alpha=0.25)
    return figure


def by_time(plt, options):
    _, val = metrics_of(options.out, "dit")
    if not val:
        raise UserError(f"by_time: no evaluations in {options.out}/dit.jsonl")
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.6, 3.6))
    for i, (step, v) in enumerate(val):
        table, last = v["table"], i == len(val) - 1
        t, alpha = [row["t"] for row in table], 0.25 + 0.75 * (i + 1) / len(val)
        for axes, key, color, label in ((left, "loss", BLUE, "loss"), (left, "shuffled", ORANGE, "the same, contexts of other rows"),
                                        (right, "predicted", BLUE, "read from the DiT's estimate"), (right, "noisy", GREY, "read from the noisy latents")):
            axes.plot(t, [row[key] for row in table], "o-" if last else "-", color=color, alpha=alpha, lw=1.5 if last else 0.8, markersize=4, label=label * last or None)
    left.set(xlabel="t (0 is data, 1 is noise)", ylabel="loss on val, nats a token (or squared error)", title="Where the context helps")
    right.set(xlabel="t (0 is data, 1 is noise)", ylabel="share of tokens that decode right", title="What the DiT makes of noise", ylim=(0, 1.02))
    for axes in (left, right):
        axes.legend(frameon=False, fontsize=9)
        axes.grid(alpha=0.25)
    return figure


@torch.no_grad()
def latents(plt, options):
    """Each dot a token of val in its place. Means of frequent tokens carry their text."""
    device, _ = pick_device("auto")
    corpus, train = Corpus(options.data, "val", 64), Corpus(options.data, "train", 64)
    count = np.bincount(train.tokens, minlength=corpus.meta["vocab_size"])
    folders = {"with REPA": options.out} | ({"without": options.without} if options.without else {})
    figure, all_axes = plt.subplots(1, len(folders), figsize=(5.6 * len(folders), 4.8), squeeze=False)
    for axes, (title, folder) in zip(all_axes[0], folders.items()):
        state = load_checkpoint(f"{folder}/vae.pt", "vae", "python train_vae.py makes one", corpus.tokenizer)
        vae = model_from(TextVAE, VAEConfig, state).to(device)
        corpus.N = min(corpus.N, vae.config.block_size)
        rows, = corpus.fixed_batches(1, device, cut_words=False)
        inside = (rows.counted & (rows.tokens != corpus.eot)).cpu()
        z, tokens = vae.latents(rows.tokens, rows.segment).cpu()[inside], rows.tokens.cpu()[inside].numpy()  # (tokens, C), (tokens,)
        _, _, directions = torch.pca_lowrank(z, q=min(6, z.shape[1]), niter=8)
        x = ((z - z.mean(0)) @ directions[:, :2]).numpy()
        dots = axes.scatter(*x.T, c=np.log10(count[tokens].clip(1)), s=5, cmap="viridis", alpha=0.6, linewidths=0)
        placed = []
        for token in np.argsort(-count):
            here = tokens == token
            place = x[here].mean(0) if here.sum() > 3 else None
            text = corpus.encoding.decode([int(token)])
            if place is None or len(text.strip()) < 2 or any(np.abs((place - p) / np.ptp(x, axis=0) / (0.13, 0.035)).max() < 1 for p in placed):
                continue
            axes.text(*place, text.strip(), fontsize=8, ha="center", va="center", color="black",
                      bbox=dict(boxstyle="round,pad=0.1", facecolor="white", edgecolor="none", alpha=0.7))
            placed.append(place)
            if len(placed) == 28:
                break
        often = np.bincount(tokens)[tokens] > 4
        within = sum(((z[tokens == t] - z[tokens == t].mean(0)) ** 2).sum() for t in set(tokens[often])) / ((z[often] - z[often].mean(0)) ** 2).sum()
        axes.set(title=f"{title}: the token fixes {1 - within:.0%} of its latent", xlabel="first principal component", ylabel="second" if axes is all_axes[0][0] else "")
    figure.colorbar(dots, ax=list(all_axes[0]), label="how often the token is in the training text, log10")
    return figure


def frontier(plt, options):
    from evaluate import curves_of, running
    path = Path(options.evaluation or f"{options.out}/eval.json")
    if not path.is_file():
        raise UserError(f"frontier: {path} is missing; bench/evaluate.py makes it")
    result = json.loads(path.read_text())
    family = lambda name: re.sub(r"\s+\d+$", "", name)
    wanted = [s.strip() for s in options.systems.split(",") if s.strip()]
    names = [n for n in result["frontier"] if not wanted or n in wanted or family(n) in wanted]
    colors = dict(zip(dict.fromkeys(map(family, names)), plt.colormaps["tab10"].colors * 9))
    figure, axes = plt.subplots(figsize=(7.6, 5))
    for name, color in colors.items():
        axes.plot([], [], "o-", color=color, label=name, lw=1.4, markersize=4)  # for the legend: a line a family
    for name in names:
        for curve in curves_of(result["frontier"][name]).values():
            axes.plot([p["entropy"] for p in curve], [p["nll"] for p in curve], "o-", color=colors[family(name)], lw=1.4, markersize=4)
            for p in curve if len(curve) > 1 else []:
                knob = running(p["knob"])
                axes.annotate("guidance " * (knob == "cfg") + f"{p['knob'][knob]:g}", (p["entropy"], p["nll"]), (3, 3), textcoords="offset points", fontsize=7, color=GREY)
    real = result["real"]
    axes.plot(real["entropy"], real["nll"], "*", color=INK, markersize=15, label="real text")
    axes.set(xlabel="entropy of the words, nats (left: repeats itself)", ylabel="NLL, nats a token, of an independent GPT (low: fluent)",
             title="Nearer to the star is better; small numbers are temperatures")
    axes.legend(frameon=False, fontsize=9)
    axes.grid(alpha=0.25)
    return figure


def folder_of(options):
    return Path(options.pictures or f"{options.out}/pictures")


def main():
    options, = command_line(__doc__, PlotConfig)
    try:
        import matplotlib
    except ImportError:
        raise UserError("the pictures need one more package: pip install matplotlib") from None
    matplotlib.use("Agg")
    import matplotlib.patches
    import matplotlib.pyplot as plt
    plt.rcParams.update({"font.size": 10, "axes.titlesize": 11, "axes.edgecolor": "#666666", "savefig.facecolor": "white", "axes.spines.top": False, "axes.spines.right": False})
    folder_of(options).mkdir(parents=True, exist_ok=True)
    for draw in (pipeline, trace, training, by_time, latents, frontier):
        path = folder_of(options) / f"{draw.__name__}.png"
        try:
            figure = draw(plt, options)
        except UserError as e:
            print(f"left out: {e}")
            continue
        figure.savefig(path, dpi=130, bbox_inches="tight", pad_inches=0.12)  # white, so that it is read on a dark page, too
        plt.close(figure)
        print(f"wrote {path}")


if __name__ == "__main__":
    run(main)

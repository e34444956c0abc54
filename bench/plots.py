"""The pictures of the documentation, from what the other scripts wrote.

    python bench/plots.py                            # of out/eval.json, to out/pictures
    python bench/plots.py --evaluation=A/eval.json,B/eval.json --systems=GPT,TextLDM

pipeline.png is a diagram. frontier.png has NLL against entropy, a curve for each system and
setting. All seeds of a system (`GPT 1`, `GPT 2`) have one colour.
"""

import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from bench.metrics import curves_of, running
from engine.config import UserError, command_line
from engine.terminal import run_script
from textldm import option

INK, GREY = "#222222", "#9a9a9a"
BLUE, ORANGE, PALE, WHITE = "#cfe2f3", "#fde3c8", "#e3e3e3", "#ffffff"


@dataclass
class PlotConfig:
    out: str = option("out", "folder of eval.json, which bench/evaluate.py makes")
    evaluation: str = option("", "files to read, with commas (OUT/eval.json)")
    systems: str = option("", "which to draw, with commas (all; `a` is a 1, a 2 ..., too)")
    title: str = option("Nearer to real text is better", "of frontier")
    pictures: str = option("", "folder to write to (OUT/pictures)")


def draw_row(axes, y, title, *boxes):
    """A row at height y of boxes, (middle, text, colour) each, with arrows between neighbours."""
    axes.text(0, y, title, weight="bold", va="center", color=INK)
    middle = dict(ha="center", va="center", color=INK)
    for i, (x, text, color) in reversed(list(enumerate(boxes))):
        look = dict(boxstyle="round,pad=0.5", facecolor=color, edgecolor=INK)
        # It begins in the middle of the box before, which is drawn over it.
        arrow = dict(arrowstyle="<|-", color=INK, shrinkB=0) if i else None
        axes.annotate(text, (boxes[i - 1][0], y), (x, y), bbox=look, arrowprops=arrow, **middle)


def pipeline(plt, options):
    """How text becomes latents, and noise becomes text."""
    figure, axes = plt.subplots(figsize=(10, 3.8))
    axes.set(xlim=(0, 92), ylim=(0, 35))
    axes.axis("off")
    axes.set_title("Text becomes latents, a DiT makes latents out of noise, and they become text")
    tokens, encoder, decoder = (20, "tokens", WHITE), (35, "encoder", BLUE), (69, "decoder", BLUE)
    latents, written = (52, "latents z", ORANGE), (86, "tokens", WHITE)
    draw_row(axes, 32, "stage 1\ntrain_vae.py", tokens, encoder, latents, decoder, written)
    draw_row(axes, 25, "", (52, "made like a frozen GPT's features (REPA)", PALE))
    seen = (26, "context's latents, clean;\ntarget's latents, noisy", ORANGE)
    said = (82, "p(token), hence clean\nlatents, and a velocity", WHITE)
    draw_row(axes, 17, "stage 2\ntrain_dit.py", seen, (52, "DiT", BLUE), said)
    draw_row(axes, 9, "", (52, "begins as noise", ORANGE))
    prompt, text = (20, "prompt", WHITE), (86, "text", WHITE)
    dit = (52, "DiT, 20 times", BLUE)
    draw_row(axes, 2, "sampling\nsample.py", prompt, encoder, dit, decoder, text)
    return figure


def frontier(plt, options):
    """NLL against entropy. Each point has its temperature, or its guidance scale, beside it."""
    points = {}
    for path in (options.evaluation or f"{options.out}/eval.json").split(","):
        if not Path(path).is_file():
            raise UserError(f"{path} is missing; bench/evaluate.py makes it")
        result = json.loads(Path(path).read_text())
        points |= result["frontier"]
    wanted = [name.strip() for name in options.systems.split(",") if name.strip()]
    figure, axes = plt.subplots(figsize=(7.6, 5))
    colors = {}
    for name in points:
        family = re.sub(r"\s+\d+$", "", name)  # without the number of the seed
        if wanted and not {name, family} & set(wanted):
            continue
        for curve in curves_of(points[name]):
            x = [point["entropy"] for point in curve]
            y = [point["nll"] for point in curve]
            label = None if family in colors else family
            (line,) = axes.plot(x, y, "o-", color=colors.get(family), label=label, markersize=4)
            colors[family] = line.get_color()
            for point, place in zip(curve, zip(x, y)):
                knob = point["knob"]
                text = f"{knob[running(knob)]:g}"
                offset = dict(xytext=(3, 3), textcoords="offset points", fontsize=7, color=GREY)
                axes.annotate(text, place, **offset)
    real = result["real"]
    axes.plot(real["entropy"], real["nll"], "*", color=INK, markersize=15, label="real text")
    axes.set_xlabel("entropy of the tokens, nats (left: repeats itself)")
    axes.set_ylabel("NLL by an independent GPT, nats per token (low: fluent)")
    axes.set_title(options.title)
    axes.legend(frameon=False)
    axes.grid(alpha=0.25)
    return figure


def main():
    (options,) = command_line(__doc__, PlotConfig)
    try:
        import matplotlib
    except ImportError:
        raise UserError("the pictures need one more package: pip install matplotlib") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    folder = Path(options.pictures or f"{options.out}/pictures")
    folder.mkdir(parents=True, exist_ok=True)
    for draw in (pipeline, frontier):
        path = folder / f"{draw.__name__}.png"
        draw(plt, options).savefig(path, dpi=130, bbox_inches="tight", facecolor="white")
        print(f"wrote {path}")


if __name__ == "__main__":
    run_script(main)

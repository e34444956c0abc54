"""Properties of the page of bench/page.py, in a real browser too, where there is one."""

import html
import json
import re
import shutil
import subprocess
from dataclasses import replace

import pytest
import torch

from bench.page import shown
from engine.checkpoint import load_checkpoint, write_whole
from engine.terminal import pick_device
from tests.helpers import ROOT, refuse, script
from textldm import Sampling
from variants.writers import load_writer

PROMPTS = ["greek small letter", "</script><b>&amp", ""]
STEPS = 5


@pytest.fixture(scope="module")
def page(random_out, tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "page.html"
    options = [f"--steps={STEPS}", "--cfg=3", "--temperature=0.7", "--seed=4"]
    options += ["--out", random_out, "--page", path, "--prompts=" + ";".join(PROMPTS)]
    script("bench/page.py", *options)
    return path


def runs_of(page):
    line = re.search(r"^const DATA = (.*);$", page.read_text(encoding="utf-8"), re.M)[1]
    return json.loads(line)["runs"]


def words(tokens):
    return [word for word, _, _ in tokens]


@torch.no_grad()
def test_it_shows_what_the_models_write_and_how_probable_that_was(page, random_out):
    dit = load_writer(random_out / "dit.pt", random_out / "vae.pt")
    gpt = load_writer(random_out / "gpt.pt")
    _, autocast = pick_device("cpu", dit.block_size)
    for text, run in zip(PROMPTS, runs_of(page), strict=True):
        times = [step["t"] for step in run["steps"]]
        assert times == sorted(times, reverse=True) and (times[0], times[-1]) == (1, 0)
        assert [step["evaluations"] for step in run["steps"]] == [2 * k for k in range(STEPS + 1)]
        prompts = dit.encode([text])
        sampling = Sampling(STEPS, 3, 0.7, dit.seeds(prompts, 4))
        with autocast:
            (completion,) = dit.complete(prompts, sampling)
            whole = [*prompts[0], *completion]
            assert run["prompt"] == dit.encoding.decode(whole) and run["prompt"].startswith(text)
            for writer, tokens, first in (
                (dit, run["steps"][-1]["tokens"], run["steps"][1]["tokens"][0]),
                (gpt, run["gpt"], run["gpt"][0]),
            ):
                (ids,) = writer.write([whole], 0, sampling)
                assert words(tokens) == [shown(writer.encoding, token) for token in ids]
                # Without guidance these are the network's own, with the prompt.
                logits = writer.first_logits([whole], replace(sampling, cfg_scale=1))
                p = logits[0].float().softmax(-1)
                expected = p.topk(5).values.tolist()
                assert [p for _, p in first[2]] == pytest.approx(expected, abs=5e-3)
                is_first = [shown(writer.encoding, i) == first[0] for i in range(len(p))]
                assert any(abs(p[is_first] - first[1]) < 5e-3)


def test_what_cannot_be_shown_is_refused(random_out, capsys, tmp_path):
    dit, gpt = (load_checkpoint(random_out / f"{kind}.pt", kind, "") for kind in ("dit", "gpt"))
    short = dict(gpt, config=gpt["config"] | dict(block_size=4))
    short["model"] = gpt["model"] | {"wpe.weight": gpt["model"]["wpe.weight"][:4]}
    velocity = dict(dit, config=dit["config"] | dict(predict_tokens=False))
    velocity["model"] = {name: x for name, x in dit["model"].items() if name != "latent_of"}
    for name in ("to_output.weight", "to_output.bias"):
        velocity["model"][name] = dit["model"][name][: dit["config"]["channels"]]
    shutil.copy(random_out / "vae.pt", tmp_path)
    for words, *states in (
        ("needs longer rows", dit, short),
        ("different tokenizers", dit, dict(gpt, tokenizer={})),
        ("predicts velocities", velocity, gpt),
    ):
        for kind, state in zip(("dit", "gpt"), states):
            write_whole(tmp_path / f"{kind}.pt", state)
        refuse(capsys, words, "bench/page.py", "--out", tmp_path)
    assert not (tmp_path / "page.html").exists()


def test_the_page_in_docs_is_small_and_is_made_of_the_template():
    page = ROOT / "docs/page.html"
    assert page.stat().st_size < 300_000
    template, made = (path.read_text(encoding="utf-8") for path in (ROOT / "bench/page.html", page))
    line = re.compile(r"^const DATA = .*;.*$", re.M)
    assert line.sub("", made) == line.sub("", template), "make it again: bench/page.py"
    assert not re.search(r"src=|https?:|@import", template)


# Uses the page in a browser, and leaves what it shows in the place of the page.
USE = """<script>
const places = model => [...document.querySelectorAll(`#${model}-text .place`)];
const texts = model => places(model).map(place => place.textContent);
const move = step => { find("step").value = step; find("step").dispatchEvent(new Event("input")); };
const candidates = () => [...document.querySelectorAll("#candidates tr")].map(
  row => [row.cells[1].textContent, row.hasAttribute("aria-current")]);
const found = [];
DATA.runs.forEach((run, i) => {
  document.querySelectorAll("#prompts input")[i].click();
  const steps = [];
  for (let step = 0; step < run.steps.length; step++) {
    move(step);
    steps.push([texts("ldm"), texts("gpt"), find("ldm-count").textContent]);
  }
  const chosen = [];
  for (const [model, place, act] of [["ldm", 0, "click"], ["gpt", 0, "focus"]]) {
    places(model)[place].querySelector("button").dispatchEvent(new Event(act));
    chosen.push([document.querySelector("#candidates h3").textContent, candidates()]);
  }
  const bold = document.querySelectorAll(".text b").length;
  found.push([document.querySelector("#ldm-text .prompt").textContent, steps, chosen, bold]);
});
window.setInterval = tick => { window.tick = tick; return 1; };
find("play").click();
while (timer) tick();
const end = [find("step").value, find("play").textContent];
document.body.textContent = JSON.stringify([found, end, errors]);
</script></body>"""
ERRORS = "<script>const errors = []; onerror = error => errors.push(error);</script>"
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"]


def test_in_a_browser_steps_show_their_texts_and_tokens_their_candidates(page, tmp_path):
    names = ("chromium", "chromium-browser", "google-chrome")
    browser = next(filter(None, map(shutil.which, names)), None)
    if not browser:
        pytest.skip("no Chromium")
    text = page.read_text(encoding="utf-8")
    text = text.replace("<head>", "<head>" + ERRORS).replace("</body>", USE)
    (tmp_path / "page.html").write_text(text, encoding="utf-8")
    command = [browser, *FLAGS, f"--user-data-dir={tmp_path / 'profile'}", tmp_path / "page.html"]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", timeout=120)
    body = re.search(r"<body>(.*)</body>", done.stdout, re.S)[1]
    found, end, errors = json.loads(html.unescape(body))
    assert end == [str(STEPS), "Replay"] and errors == []
    for run, (prompt, steps, chosen, bold) in zip(runs_of(page), found, strict=True):
        assert prompt == run["prompt"] and bold == 0, "text is not code"
        for step, (ldm, gpt, count) in enumerate(steps):
            assert ldm == words(run["steps"][step]["tokens"]), step
            assert gpt == words(run["gpt"] if step == STEPS else run["gpt"][:step])
            assert f"step {step} of {STEPS}" in count and f"{2 * step} evaluations" in count
        tokens = run["steps"][STEPS]["tokens"][0], run["gpt"][0]
        for (title, rows), name, (word, p, candidates) in zip(chosen, ("TextLDM", "GPT"), tokens):
            assert title.startswith(f"{name}, place 1: “{word.strip()}”")
            marked = [percent for percent, is_marked in rows if is_marked]
            assert len(marked) == 1 and marked[0] in title
            assert len(rows) == len(candidates) + ([word, p] not in candidates)

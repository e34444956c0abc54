"""Properties of the page of bench/page.py, in a real browser too, where there is one."""

import html
import json
import re
import shutil
import subprocess

import pytest
import torch

from bench.page import shown
from engine.checkpoint import build, load_checkpoint, write_whole
from engine.terminal import pick_device
from tests.helpers import ROOT, refuse, script
from textldm import CONTEXT, DiTConfig, Sampling, TextDiT, TextVAE, VAEConfig, noisy_rows
from variants.writers import load_writer

PROMPTS = ["greek small letter", "</script><b>&amp", ""]
STEPS = 5
SETTINGS = [f"--steps={STEPS}", "--cfg=3", "--temperature=0.7", "--seed=4"]


@pytest.fixture(scope="module")
def page(random_out, tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "page.html"
    options = ["--out", random_out, "--page", path, "--prompts=" + ";".join(PROMPTS)]
    script("bench/page.py", *options, *SETTINGS)
    return path


def data_of(page):
    line = re.search(r"^const DATA = (.*);$", page.read_text(encoding="utf-8"), re.M)[1]
    return json.loads(line)


def words(tokens):
    return [word for word, _, _ in tokens]


def completed(writer, text):
    """The prompt that the page shows for a text: its last word completed; and how it is sampled."""
    prompts = writer.encode([text])
    sampling = Sampling(STEPS, 3, 0.7, writer.seeds(prompts, 4))
    (completion,) = writer.complete(prompts, sampling)
    return [*prompts[0], *completion], sampling


def test_its_last_step_is_what_the_models_write(page, random_out):
    dit = load_writer(random_out / "dit.pt", random_out / "vae.pt")
    gpt = load_writer(random_out / "gpt.pt")
    _, autocast = pick_device("cpu", dit.block_size)
    for text, run in zip(PROMPTS, data_of(page)["runs"]):
        with autocast:
            whole, sampling = completed(dit, text)
            assert run["prompt"] == dit.encoding.decode(whole)
            assert run["prompt"].startswith(text)
            for writer, tokens in ((dit, run["steps"][-1]["tokens"]), (gpt, run["gpt"])):
                (ids,) = writer.write([whole], 0, sampling)
                assert words(tokens) == [shown(writer.encoding, token) for token in ids]


def test_candidates_are_the_likeliest_and_a_token_has_its_own_probability(page):
    for run in data_of(page)["runs"]:
        times = [step["t"] for step in run["steps"]]
        assert times == sorted(times, reverse=True) and (times[0], times[-1]) == (1, 0)
        assert [step["evaluations"] for step in run["steps"]] == [2 * k for k in range(STEPS + 1)]
        for word, p, candidates in sum([step["tokens"] for step in run["steps"][1:]], run["gpt"]):
            values = [value for _, value in candidates]
            assert len(values) == 5 and sum(values) <= 1.001
            assert values == sorted(values, reverse=True) and p <= values[0]
            assert [word, p] in candidates or p <= values[-1]


def test_probabilities_are_those_of_the_models(page, random_out):
    """Of the GPT for its first token, and of the DiT, with the prompt, in its first step."""
    run = data_of(page)["runs"][0]
    vae = build(TextVAE, VAEConfig, load_checkpoint(random_out / "vae.pt", "vae", ""))
    dit = build(TextDiT, DiTConfig, load_checkpoint(random_out / "dit.pt", "dit", ""))
    gpt = load_writer(random_out / "gpt.pt")
    _, autocast = pick_device("cpu", dit.config.block_size)
    with autocast, torch.no_grad():
        with_vae = load_writer(random_out / "dit.pt", random_out / "vae.pt")
        prompt, sampling = completed(with_vae, PROMPTS[0])
        ((first, *_),) = gpt.write([prompt], 0, sampling)
        p = gpt.first_logits([prompt], sampling)[0].softmax(-1)
        assert run["gpt"][0][1] == pytest.approx(p[first].item(), abs=1e-4)

        z, segment = noisy_rows(vae, dit, [prompt], 0, sampling)
        hidden = z.masked_fill((segment == CONTEXT)[..., None], 0)
        likeliest = []
        for latents in (z, hidden):
            p = dit(latents, segment, torch.ones(1), 0 * z)[0, len(prompt) :].float().softmax(-1)
            likeliest.append(p.max(-1).values)
    first = run["steps"][1]["tokens"]
    found = torch.tensor([candidates[0][1] for _, _, candidates in first])
    away, away_without = ((found - p[: len(found)]).abs().sum() for p in likeliest)
    assert away < 5e-3 * len(found) and away < 0.2 * away_without


def test_what_cannot_be_shown_is_refused(random_out, capsys, tmp_path):
    where = ["--out", random_out, "--page", tmp_path / "page.html"]
    dit = load_checkpoint(random_out / "dit.pt", "dit", "")
    config = dict(dit["config"], predict_tokens=False)
    model = {name: x for name, x in dit["model"].items() if name != "latent_of"}
    for name in ("to_output.weight", "to_output.bias"):
        model[name] = model[name][: config["channels"]]
    write_whole(tmp_path / "dit.pt", dict(dit, config=config, model=model))
    (tmp_path / "vae.pt").write_bytes((random_out / "vae.pt").read_bytes())
    refuse(capsys, "predicts velocities", "bench/page.py", "--out", tmp_path)
    gpt = load_checkpoint(random_out / "gpt.pt", "gpt", "")
    write_whole(tmp_path / "other.pt", dict(gpt, tokenizer={}))
    refuse(capsys, "tokenizers", "bench/page.py", *where, "--gpt", tmp_path / "other.pt")
    refuse(capsys, "is missing", "bench/page.py", *where, "--gpt", tmp_path / "gpt.pt")
    assert not (tmp_path / "page.html").exists()


def test_a_gpt_of_shorter_rows_writes_what_fits(random_out, tmp_path):
    gpt = load_checkpoint(random_out / "gpt.pt", "gpt", "")
    config = dict(gpt["config"], block_size=4)
    model = dict(gpt["model"], **{"wpe.weight": gpt["model"]["wpe.weight"][:4]})
    write_whole(tmp_path / "short.pt", dict(gpt, config=config, model=model))
    where = ["--out", random_out, "--page", tmp_path / "page.html", "--gpt", tmp_path / "short.pt"]
    script("bench/page.py", *where, f"--prompts={PROMPTS[0]};", "--steps=1")
    long, empty = data_of(tmp_path / "page.html")["runs"]
    assert long["gpt"] == [] and 1 <= len(empty["gpt"]) <= 3


def test_the_page_in_docs_is_small_and_is_made_of_the_template():
    page = ROOT / "docs/page.html"
    assert page.stat().st_size < 300_000
    template = (ROOT / "bench/page.html").read_text(encoding="utf-8")
    line = r"^const DATA = .*;.*$"
    found = re.sub(line, "", page.read_text(encoding="utf-8"), flags=re.M)
    assert found == re.sub(line, "", template, flags=re.M), "make it again: bench/page.py"


# ---- In a browser

# Uses the page, and leaves what it shows in the place of the page.
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


@pytest.fixture(scope="module")
def used(page, tmp_path_factory):
    """What the page shows in a browser: for each prompt, and after Play; and its errors."""
    names = ("chromium", "chromium-browser", "google-chrome")
    browser = next(filter(None, map(shutil.which, names)), None)
    if not browser:
        pytest.skip("no Chromium")
    folder = tmp_path_factory.mktemp("browser")
    text = page.read_text(encoding="utf-8")
    text = text.replace("<head>", "<head>" + ERRORS).replace("</body>", USE)
    (folder / "page.html").write_text(text, encoding="utf-8")
    command = [browser, *FLAGS, f"--user-data-dir={folder / 'profile'}", folder / "page.html"]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", timeout=120)
    return json.loads(html.unescape(re.search(r"<body>(.*)</body>", done.stdout, re.S)[1]))


def test_each_step_shows_its_text_and_each_token_its_candidates(used, page):
    for run, (prompt, steps, chosen, bold) in zip(data_of(page)["runs"], used[0], strict=True):
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


def test_play_goes_to_the_end_and_nothing_fails(used, page):
    assert used[1] == [str(STEPS), "Replay"]
    assert used[2] == []
    assert not re.search(r"src=|https?:|@import", page.read_text(encoding="utf-8"))

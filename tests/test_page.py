"""Properties of the page of bench/page.py, in a real browser too, where there is one."""

import json
import re

import pytest
import torch

from bench.page import shown
from engine.checkpoint import build, load_checkpoint, write_whole
from engine.loop import pick_device
from tests.browser import Browser, chromium
from tests.helpers import ROOT, refuse, script
from textldm import (
    GPT,
    DiTConfig,
    Sampling,
    TextDiT,
    TextVAE,
    TransformerConfig,
    VAEConfig,
    noisy_rows,
)
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
        assert [step["evaluations"] for step in run["steps"]] == [2 * k for k in range(STEPS + 1)]
        times = [step["t"] for step in run["steps"]]
        assert (times[0], times[-1]) == (1, 0)
        assert times == sorted(times, reverse=True)
        written = [step["tokens"] for step in run["steps"][1:]] + [run["gpt"]]
        for word, p, candidates in sum(written, []):
            values = [value for _, value in candidates]
            assert len(values) == 5
            assert values == sorted(values, reverse=True)
            assert sum(values) <= 1.001
            assert p <= values[0]
            assert [word, p] in candidates or p <= values[-1]


def test_probabilities_are_those_of_the_models(page, random_out):
    """Of the GPT in each place, and of the DiT, with the prompt, in its first step."""
    run = data_of(page)["runs"][0]
    state = load_checkpoint(random_out / "gpt.pt", "gpt", "")
    gpt = build(GPT, TransformerConfig, state)
    vae = build(TextVAE, VAEConfig, load_checkpoint(random_out / "vae.pt", "vae", ""))
    dit = build(TextDiT, DiTConfig, load_checkpoint(random_out / "dit.pt", "dit", ""))
    writer = load_writer(random_out / "gpt.pt")
    _, autocast = pick_device("cpu", dit.config.block_size)
    with autocast, torch.no_grad():
        with_vae = load_writer(random_out / "dit.pt", random_out / "vae.pt")
        prompt, sampling = completed(with_vae, PROMPTS[0])
        (text,) = writer.write([prompt], 0, sampling)
        p = gpt(torch.tensor([[writer.tokenizer["eot"], *prompt, *text]]))[0].float().softmax(-1)
        expected = [p[len(prompt) + i, token].item() for i, token in enumerate(text)]
        assert [p for _, p, _ in run["gpt"]] == pytest.approx(expected, abs=1e-4)

        z, segment = noisy_rows(vae, dit, [prompt], 0, sampling)
        p = dit(z, segment, torch.ones(1), 0 * z)[0, len(prompt) :].float().softmax(-1)
        best = p.max(-1).values
    first = run["steps"][1]["tokens"]
    found = [candidates[0][1] for _, _, candidates in first]
    assert found == pytest.approx(best[: len(found)].tolist(), abs=5e-3)


def test_what_cannot_be_shown_is_refused(random_out, home, capsys, tmp_path):
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
    config = dict(gpt["config"], block_size=4)
    model = dict(gpt["model"], **{"wpe.weight": gpt["model"]["wpe.weight"][:4]})
    shorter = dict(gpt, config=config, model=model)
    for words, state in (("need one more", shorter), ("tokenizers", dict(gpt, tokenizer={}))):
        write_whole(tmp_path / "other.pt", state)
        refuse(capsys, words, "bench/page.py", *where, "--gpt", tmp_path / "other.pt")
    refuse(capsys, "is missing", "bench/page.py", *where, "--gpt", tmp_path / "gpt.pt")
    assert not (tmp_path / "page.html").exists()


def test_the_page_in_docs_is_small_and_is_made_of_the_template():
    page = ROOT / "docs/page.html"
    assert page.stat().st_size < 300_000
    template = (ROOT / "bench/page.html").read_text(encoding="utf-8")
    line = r"^const DATA = .*;.*$"
    found = re.sub(line, "", page.read_text(encoding="utf-8"), flags=re.M)
    assert found == re.sub(line, "", template, flags=re.M), "make it again: bench/page.py"


# ---- In a browser


@pytest.fixture(scope="module")
def window(tmp_path_factory):
    if not chromium():
        pytest.skip("no Chromium")
    browser = Browser(tmp_path_factory.mktemp("browser"))
    yield browser
    browser.close()


@pytest.fixture
def browser(window, page):
    """A browser that shows the page, which may not complain or ask for another file."""
    window.look(800, 900, "light")
    window.open(page)
    yield window
    assert window.errors == []


def visible(browser, model):
    selector = f"#{model}-text .place"
    return browser.run(f"[...document.querySelectorAll('{selector}')].map(x => x.textContent)")


def test_the_slider_moves_the_text_by_keys(browser, page):
    run = data_of(page)["runs"][0]
    browser.run("find('step').focus()")
    browser.press("Home")
    for step in range(STEPS + 1):
        assert visible(browser, "ldm") == words(run["steps"][step]["tokens"])
        written = run["gpt"] if step == STEPS else run["gpt"][:step]
        assert visible(browser, "gpt") == words(written)
        count = browser.run("find('ldm-count').textContent")
        assert f"step {step} of {STEPS}" in count
        assert f"{2 * step} evaluations" in count
        browser.press("ArrowRight")
    browser.press("ArrowLeft")
    assert visible(browser, "ldm") == words(run["steps"][STEPS - 1]["tokens"])


def test_a_token_shows_its_candidates_by_touch_keys_and_mouse(browser, page):
    run = data_of(page)["runs"][0]
    rows = "[...document.querySelectorAll('#candidates tr')].map(x => x.cells[1].textContent)"
    marked = "document.querySelectorAll('#candidates tr[aria-current]').length"
    title = "document.querySelector('#candidates h3').textContent"

    def check(model, place, token):
        word, p, candidates = token
        known = [word, p] in candidates
        assert len(browser.run(rows)) == len(candidates) + (not known)
        assert browser.run(marked) == 1
        assert browser.run(title).startswith(f"{model}, place {place}: “{word.strip()}”")

    browser.run("find('step').focus()")
    browser.press("End")
    tokens = run["steps"][STEPS]["tokens"]
    browser.touch(f"#ldm-text .place:nth-of-type({len(tokens) + 1}) button")
    check("TextLDM", len(tokens), tokens[-1])
    browser.touch("#gpt-text .place:nth-of-type(2) button")
    check("GPT", 1, run["gpt"][0])
    browser.run("document.querySelector('#ldm-text .token').focus()")
    check("TextLDM", 1, tokens[0])
    browser.hover("#gpt-text .place:nth-of-type(2) button")
    check("GPT", 1, run["gpt"][0])


def test_another_prompt_shows_its_own_text(browser, page):
    for i, run in enumerate(data_of(page)["runs"]):
        browser.touch(f"#prompts label:nth-of-type({i + 1})")
        prompt = browser.run("document.querySelector('#ldm-text .prompt').textContent")
        assert prompt == run["prompt"]
        assert browser.run("document.querySelectorAll('.text b').length") == 0, "text is not code"


def test_play_goes_to_the_end_and_stops(browser):
    browser.run("window.setInterval = (f, ms) => window.tick = f")
    browser.run("find('play').click()")
    for _ in range(STEPS):
        browser.run("timer && tick()")
    assert browser.run("find('step').value") == str(STEPS)
    assert browser.run("timer") is None
    assert browser.run("find('play').textContent") == "Replay"


@pytest.mark.parametrize("width, zoom", [(320, 100), (320, 200), (800, 200)])
def test_no_window_is_too_narrow(browser, width, zoom):
    browser.look(width, 700, "light")
    browser.run(f"document.documentElement.style.fontSize = '{zoom}%'")
    for step in range(STEPS + 1):
        browser.run(f"find('step').value = {step}; show()")
        assert browser.run("document.documentElement.scrollWidth") <= width
        assert browser.run("find('step').getBoundingClientRect().width") > 100

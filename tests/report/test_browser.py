"""The pages in a real browser: nothing overflows, every picture decodes, nothing runs, nothing is fetched."""

import html
import json
import os
import re
import shutil
import socket
import subprocess
from pathlib import Path

import pytest
from report_samples import FINDINGS, run_report, scores_and_curves, study_report

from cxrjax.report.content import Claim, Table
from cxrjax.report.page import write_page

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage",
    "--virtual-time-budget=10000", "--window-size=1400,1000", "--dump-dom",
)  # fmt: skip

# The page lives in a frame, since a window cannot be as narrow as a telephone; the frame is what is measured.
HARNESS = """<!doctype html><meta charset="utf-8">
<iframe id="page" style="border:0;width:{width}px;height:900px"></iframe>
<pre id="result"></pre><script>
const frame = document.getElementById("page");
frame.onload = () => {{
  const page = frame.contentDocument, view = frame.contentWindow;
  page.querySelectorAll("details").forEach(details => details.open = true);
  const wide = [...page.querySelectorAll("body *")].filter(element => {{
    const box = element.getBoundingClientRect();
    return box.right > view.innerWidth + 1 && !element.closest(".scroll") && !element.closest("svg");
  }});
  document.getElementById("result").textContent = JSON.stringify({{
    width: view.innerWidth,
    scrollWidth: page.documentElement.scrollWidth,
    wide: wide.map(element => element.tagName + "." + element.className),
    images: [...page.images].map(image => image.complete && image.naturalWidth),
    drawings: [...page.querySelectorAll("svg")].filter(svg => svg.getBoundingClientRect().width > 0).length,
    fetched: view.performance.getEntriesByType("resource").map(entry => entry.name),
    pwned: view.pwned ?? null,
    scripts: page.scripts.length,
    handlers: page.querySelectorAll("[onerror], [onload], [onclick]").length,
    title: page.title,
    headings: [...page.querySelectorAll("h1, h3, th")].map(element => element.textContent),
    labels: [...page.querySelectorAll("svg text")].map(element => element.textContent),
    alts: [...page.images].map(image => image.alt),
  }});
  frame.srcdoc = "";
  frame.onload = null;
}};
frame.srcdoc = {page};
</script>"""


@pytest.fixture(scope="session")
def browse(tmp_path_factory):
    """Opens a page in a frame of some width, and says what is there."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip(f"needs a browser: none of {', '.join(BROWSERS)} is installed")

    def look(page: Path, width: int, *, protected: bool = True) -> dict:
        source = page.read_text(encoding="utf-8")
        if not protected:
            source, removed = re.subn(r"<meta http-equiv=.Content-Security-Policy.[^>]*>", "", source)
            assert removed == 1
        folder = tmp_path_factory.mktemp("browser")
        literal = json.dumps(source).replace("</", "<\\/").replace("<!--", "<\\!--")
        (folder / "harness.html").write_text(HARNESS.format(width=width, page=literal), encoding="utf-8")
        address = (folder / "harness.html").as_uri()
        done = subprocess.run(
            [browser, *FLAGS, f"--user-data-dir={folder / 'profile'}", address],
            capture_output=True, text=True, timeout=120, check=False, env={**os.environ, "HOME": str(folder)},
        )  # fmt: skip
        found = re.search(r'<pre id="result">(.+?)</pre>', done.stdout, re.DOTALL)
        assert found, f"the browser answered {done.returncode}: {done.stderr[-2000:]}"
        return json.loads(html.unescape(found[1]))

    return look


@pytest.mark.parametrize("width", [1280, 400])
@pytest.mark.parametrize("name", ["study", "run"])
def test_page_fits_its_width_and_fetches_nothing(pages, browse, name, width):
    seen = browse(pages / f"{name}.html", width)
    assert seen["width"] == width
    assert seen["scrollWidth"] <= width
    assert seen["wide"] == []
    assert seen["fetched"] == []
    assert len(seen["images"]) == (len(FINDINGS) * 3 if name == "study" else 0)
    assert all(pixels == 288 for pixels in seen["images"])
    assert seen["drawings"] == (5 if name == "study" else 3), "one of the two drawings of each figure"


SCRIPT, IMAGE = "<script>window.pwned=1</script>", '"><img src=x onerror="window.pwned=2">'
LONG = "Pneumonoultramicroscopicsilicovolcanoconiosis" * 4


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    """Pages in which every string came from somebody who means harm, or writes without spaces."""
    folder = tmp_path_factory.mktemp("hostile")
    findings = (SCRIPT, IMAGE, LONG)
    scores, curves = scores_and_curves(findings)
    scores["32 px"][0] |= {"auroc": float("nan"), "reason": IMAGE}
    maps = study_report().cams["Mass"]
    both = {"title": SCRIPT + IMAGE, "lead": [IMAGE, LONG], "notes": [SCRIPT, LONG], "interval": IMAGE}
    provenance = {SCRIPT: {IMAGE: SCRIPT, LONG: LONG, "deeper": {SCRIPT: [IMAGE, LONG]}}, IMAGE: LONG}
    study = study_report(
        findings=findings, scores=scores, curves=curves, cams=dict.fromkeys(findings, maps),
        claims=[Claim(IMAGE, "yes", SCRIPT), Claim(LONG, "no", LONG)], provenance=provenance,
        control=Table(IMAGE, (SCRIPT, LONG), [(IMAGE, LONG)]), weights=[[0.2, 0.3, 0.5]] * 3, **both,
    )  # fmt: skip
    write_page(study, folder / "study.html")
    run = run_report(
        findings=findings, scores=scores["64 px"], curves=curves["64 px"], reliability={}, provenance=provenance, **both
    )
    write_page(run, folder / "run.html")
    return folder


@pytest.mark.parametrize("name", ["study", "run"])
@pytest.mark.parametrize("protected", [True, False], ids=["with policy", "escaping alone"])
def test_hostile_strings_are_text(hostile, browse, name, protected):
    seen = browse(hostile / f"{name}.html", 400, protected=protected)
    assert seen["pwned"] is None
    assert seen["scripts"] == seen["handlers"] == 0
    assert seen["fetched"] == []
    assert seen["title"] == SCRIPT + IMAGE
    assert {SCRIPT, IMAGE, LONG} <= set(seen["headings"])
    assert any(label.startswith("<script>window.pwned") for label in seen["labels"])
    if name == "study":
        assert any(alt.startswith(f"Activation map of {IMAGE}") for alt in seen["alts"])
        assert len(seen["images"]) == 9
    assert seen["scrollWidth"] <= 400
    assert seen["wide"] == []


def test_the_browser_harness_detects_faults(browse, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{free.getsockname()[1]}/absent.png"
    (tmp_path / "bad.html").write_text(
        f"""<!doctype html><meta http-equiv="Content-Security-Policy" content="x"><title>t</title>
        <p style="width:900px">wide</p><img src="{address}" alt="" onerror="1">{SCRIPT}"""
    )
    seen = browse(tmp_path / "bad.html", 400, protected=False)
    assert seen["pwned"] == 1
    assert seen["scripts"] == seen["handlers"] == 1
    assert seen["scrollWidth"] > 400
    assert seen["wide"] == ["P."]
    assert seen["images"] == [0]
    assert seen["fetched"] == [address]

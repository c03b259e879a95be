"""The report in a real browser: all pictures are there, nothing is refused or fails, tables sort by a click."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from funcghost import plots, store
from funcghost.plots.page import PAGE, SORT, table, write_page

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
PROBE = """
const pictures = [...document.images].map((i) => i.complete && i.naturalWidth > 100);
const said = {pictures, columns: []};
const table = document.querySelector("table.sorts");
for (const [column, clicks] of [[0, 1], [1, 1], [1, 2], [2, 1]]) {
  for (let n = 0; n < clicks; n++) table.tHead.rows[0].cells[column].firstChild.click();
  said.columns.push([...table.tBodies[0].rows].map((row) => row.cells[column].textContent));
  table.tHead.rows[0].cells[column].removeAttribute("aria-sort");
}
said.wider = document.documentElement.scrollWidth > window.innerWidth;
said.paper = getComputedStyle(document.body).backgroundColor;
document.title = JSON.stringify(said);
"""
ROWS = [("pear", "1e-2", "5 %"), ("Apple", "-3.5", "none"), ("fig", "20", "12 %")]


def opened(page: Path, *options: str) -> tuple[str, str]:
    """The page as it is after its scripts have run, and what the browser says of it."""
    assert BROWSER is not None
    flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--v=0", *options]
    command = [BROWSER, *flags, f"--user-data-dir={page.parent / 'profile'}", "--dump-dom", page.as_uri()]
    run = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    return run.stdout, "\n".join(line for line in run.stderr.splitlines() if "CONSOLE" in line)


@pytest.mark.skipif(BROWSER is None, reason="needs Chromium")
@pytest.mark.parametrize("options", [["--window-size=390,800", "--blink-settings=preferredColorScheme=0"]])
def test_the_report_works_on_a_dark_phone(tmp_path: Path, options: list[str]) -> None:
    with store.record(tmp_path / "run", ["value"], {"domain": "string"}) as kept:
        kept.add(0, range(4), {"value": np.arange(4.0)}, {"domain": ["a", "b", "a", "b"]})
    plots.report(tmp_path / "run", tmp_path / "real.html", group="domain")
    _, complaints = opened(tmp_path / "real.html", *options)
    assert complaints == ""

    text = (tmp_path / "real.html").read_text(encoding="utf-8")
    probed = re.sub(r"<meta http-equiv=.*?>", "", text, flags=re.DOTALL)  # or the browser would refuse the probe
    probed = probed.replace('<table class="sorts">', f"{table(ROWS, ('a', 'b', 'c'))}<table>", 1)
    (tmp_path / "probed.html").write_text(probed.replace("</body>", f"<script>{PROBE}</script></body>"), "utf-8")
    shown, complaints = opened(tmp_path / "probed.html", *options)
    assert complaints == ""
    found = json.loads(re.findall("<title>(.*?)</title>", shown)[0].replace("&quot;", '"'))
    assert found["pictures"] == [True] * 4
    assert found["columns"] == [
        ["pear", "fig", "Apple"],
        ["20", "1e-2", "-3.5"],
        ["-3.5", "1e-2", "20"],
        ["12 %", "5 %", "none"],
    ]
    assert found["wider"] is False
    assert found["paper"] == "rgb(22, 24, 27)"


@pytest.mark.skipif(BROWSER is None, reason="needs Chromium")
def test_another_script_is_refused(tmp_path: Path) -> None:
    write_page(tmp_path / "page.html", "x", [("", "<p id=p>as it was</p><script>p.textContent = 'changed'</script>")])
    shown, complaints = opened(tmp_path / "page.html")
    assert ">as it was<" in shown
    assert "Content Security Policy" in complaints


def test_the_script_has_one_place() -> None:
    assert PAGE.template.count(SORT) == 1

"""The report: one page that needs nothing else, says what came out, and what to look at."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import h5py
import numpy as np
import pytest
from finished import Finished
from ledger import taken

from dbnet.core.config import build
from dbnet.monitor.pictures.report import advice, changed, report
from dbnet.monitor.results import Run
from dbnet.monitor.runfile import FINISHED, RunFile
from dbnet.monitor.tables import PROGRESS
from dbnet.shards.shard import EVENT

TREE = {"data": {"path": "d.h5"}, "model": {"layers": [{"kind": "dense", "units": 2}]}, "stop": {"epochs": 9}}
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
ABOUT = {"hosts": ["a", "a", "b"], "mpi": "MPICH", "parameters": 6}


def made(path: Path, rates: list[int], losses: list[float], late: list[int], waited: float = 0.0, **changes: object) -> Path:
    """Write a run: replicas of these rates, losses by epoch, and on each of two shards updates that are so late."""
    record = RunFile(path, build({**TREE, "topology": {"replicas": len(rates), "shards": 2}, **changes}), ABOUT)
    for second, loss in enumerate(losses):
        rows = np.zeros(len(rates), PROGRESS)
        rows["seconds"], rows["replica"], rows["loss"] = second, np.arange(len(rates)), 1
        rows["examples"], rows["waited"] = second * np.array(rates), waited * second
        record.progress(rows)
        record.evaluation(second, 0, second, second, loss, 1 - loss / 10, loss, 0.5)
    for shard in range(2):
        events = np.zeros(20, EVENT)
        events["applied"] = 100 + np.arange(20)
        events["fetched"], events["seconds"] = events["applied"] - late[shard], np.linspace(0, len(losses) - 1, 20)
        record.events(shard, *taken(events))
    record.close(FINISHED)
    return path


class Page(HTMLParser):
    """Takes down the tags of a page, with their attributes, and its words."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.words += data


def test_what_to_look_at(tmp_path: Path) -> None:
    good = Run(made(tmp_path / "good.h5", [100, 110], [2.0, 1.0, 0.9], [1, 1]))
    assert advice(good) == []
    bad = Run(made(tmp_path / "bad.h5", [100, 100, 100, 25], [2.0, 1.0, 0.5, 0.9], [1, 31], 0.5))
    said = advice(bad)
    assert [text.split(":")[0].split(" (")[0] for text in said] == [
        "Replica 3 was 4.0 times slower than the others",
        "Replicas waited 50 % of their time for shards",
        "Shard 1 is behind the others",
        "The test loss was least at epoch 2.0",
    ]
    with h5py.File(tmp_path / "bad.h5", "r+") as file:
        file["busy"][...] = [0.1, 0.78 * bad.progress.seconds.max()]
    assert "Shard 1 is the bottleneck: 78 % busy. Take more shards" in advice(Run(tmp_path / "bad.h5"))[2]
    full = Run(made(tmp_path / "full.h5", [100, 100], [2.0, 1.0], [40, 40], method={"slots": 16}))
    assert "Staleness is 40 on average with 2 replicas: the rings are full (16 slots each)." in advice(full)[0]


def test_what_is_no_default() -> None:
    found = changed(build({**TREE, "rule": {"rate": 0.5}, "method": {"kind": "sandblaster", "portion": 64}}))
    assert found == {
        "data.path": "d.h5", "model.layers.0.kind": "dense", "model.layers.0.units": 2, "stop.epochs": 9, "rule.rate": 0.5,
        "method.kind": "sandblaster", "method.portion": 64,
    }  # fmt: skip


def test_a_page_that_needs_nothing_else(tmp_path: Path) -> None:
    # What a stranger's run is called is text.
    paths = [
        made(tmp_path / f"{name}.h5", [100, 110], [2.0, end, 0.9], [1, 3], run={"name": name, "seed": seed}, rule={"rate": rate})
        for name, seed, rate, end in (("a", 1, 0.1, 1.0), ("<b>&amp;", 2, 0.1, 1.5), ("c", 1, 0.3, 1.2))
    ]
    report(paths, tmp_path / "r.html", "epochs")
    text = (tmp_path / "r.html").read_text()
    page = Page(text)
    assert not {"script", "link", "img", "iframe", "b"} & {tag for tag, _ in page.tags}
    outside = [value for _, attrs in page.tags for key, value in attrs.items() if key in ("src", "href", "xlink:href")]
    assert all(value and value.startswith("#") for value in outside) and "url(http" not in text and "@import" not in text
    assert "<b>&amp;" in page.words and "downpour" in page.words
    svgs = [ElementTree.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", text, re.DOTALL)]
    assert len(svgs) == 5
    # They fit any width.
    assert all("viewBox" in svg.attrib and not {"width", "height"} & set(svg.attrib) for svg in svgs)
    for heading in ("What to look at", "Results", "Repetitions", "Pictures", "Replicas and shards", "Settings", "What ran where"):
        assert f">{heading}</h" in text
    assert "rate=0.1" in page.words and "a (2), b (1)" in page.words and "0.9100" in page.words


@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")
def test_a_page_fits_desktop_and_phone(tmp_path: Path) -> None:
    path = made(tmp_path / "a.h5", [100, 110], [2.0, 1.0, 0.9], [1, 3])
    report([path], tmp_path / "r.html")
    seen = "f.contentDocument.documentElement.scrollWidth + ' ' + f.contentDocument.querySelectorAll('svg').length"
    script = f"document.title = [w, p].map(f => {seen})"
    frames = "".join(
        f'<iframe id="{name}" src="r.html" width="{wide}" height="900"></iframe>' for name, wide in (("w", 1280), ("p", 390))
    )
    (tmp_path / "frames.html").write_text(f"<body>{frames}<script>onload = () => {{ {script} }}</script>")
    options = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--allow-file-access-from-files",
        f"--user-data-dir={tmp_path / 'user'}",
    ]
    command = [str(CHROMIUM), *options, "--dump-dom", f"file://{tmp_path}/frames.html"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    widths = re.search(r"<title>(\d+) 5,(\d+) 5</title>", done.stdout)
    # What is wider than the screen scrolls in itself.
    assert widths and int(widths[1]) <= 1280 and int(widths[2]) <= 390, done.stdout[:500]


def test_the_command(run_file: Path, dbnet: Callable[..., Finished]) -> None:
    assert dbnet("train", run_file, "--quiet").code == 0
    assert dbnet("report", "out/run.h5").out.strip() == "out/run.html" and Path("out/run.html").stat().st_size > 30_000
    # In one process seconds compare nothing; class by class is said by another command.
    page = Path("out/run.html").read_text()
    assert ">epochs<" in page and ">time [s]<" not in page and "Roles that took turns in one process" in page
    assert "dbnet evaluate out/run.checkpoint.h5 --part test --by-class" in page
    assert "that file exists" in dbnet("report", "out/run.h5").err
    assert "Where shall the report" in dbnet("report", "out/run.h5", "out/run.h5").err

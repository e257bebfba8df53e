"""report.html in a real browser: no error, nothing wider than the window, every figure seen.

Needs Chromium (Debian: apt-get install chromium) and the Python package playwright.
"""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from mimic_fast.report.clean_sheet import clean_sample_figure, recovered_figure
from mimic_fast.report.collect import build_report, write_report
from mimic_fast.report.feature_plot import feature_figure
from mimic_fast.report.figures import save_figures

WIDTHS = (1280, 390)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright (dev extra)")
    found = shutil.which("chromium") or shutil.which("google-chrome")
    if found is None:
        pytest.skip("needs Chromium: apt-get install chromium")
    with playwright.sync_playwright() as started:
        options = ["--no-sandbox"] if os.geteuid() == 0 else []
        running = started.chromium.launch(executable_path=found, args=options)
        yield running
        running.close()


@pytest.fixture
def page_file(make_evaluation, run_facts, agreement, information, scans, tmp_path) -> Path:
    """A report with every part."""
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text("".join(f'{{"step": {i}, "loss": {9 - i}}}\n' for i in range(9)))
    (tmp_path / "curve.jsonl").write_text(
        "".join(
            f'{{"role": "{role}", "epoch": {epoch}, "clean_accuracy": 0.{epoch + 1}, '
            f'"attack_success_rate": 0.{9 - epoch}}}\n'
            for role, epoch in (("teacher", 0), ("purified", 1), ("purified", 2))
        )
    )
    generator = torch.Generator().manual_seed(0)
    pool = torch.randint(256, (24, 3, 8, 8), generator=generator, dtype=torch.uint8)
    features = torch.randn(30, 5, generator=generator)
    drawn = [
        clean_sample_figure(pool),
        feature_figure(
            {"teacher": features, "purified": features},
            {"teacher": features + 9},
            labels=torch.arange(30) % 3,
            target=1,
        ),
        recovered_figure(scans[1]),
    ]
    report = build_report(
        make_evaluation(),
        run=run_facts,
        agreement=agreement,
        mutual_information=information,
        scan=scans[0],
        figures=save_figures(tmp_path, drawn),
    )
    return write_report(tmp_path, report, metrics=metrics)


@pytest.mark.parametrize("width", WIDTHS)
def test_every_figure_is_seen_and_nothing_fails(browser, page_file, width):
    said: list[str] = []
    page = browser.new_page(viewport={"width": width, "height": 900})
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("requestfailed", lambda request: said.append(request.url[:80]))
    page.goto(page_file.as_uri())

    pictures = page.evaluate(
        """() => [...document.images].map(image => {
            const box = image.getBoundingClientRect()
            return [image.naturalWidth, box.width, box.height, box.left, box.right, image.alt]
        })"""
    )
    total = page.evaluate("document.documentElement.scrollWidth")
    page.close()

    assert said == []
    assert len(pictures) == 7, [row[-1] for row in pictures]
    for natural, wide, high, left, right, name in pictures:
        assert natural > 0, name
        assert wide >= 0.6 * min(width, 400), name
        assert high >= 40, name
        assert 0 <= left < right <= width, name
    assert total <= width


def test_printed_page_holds_all_of_it(browser, page_file):
    page = browser.new_page()
    page.goto(page_file.as_uri())

    printed = page.pdf(format="A4")
    hidden = page.evaluate(
        """() => {
            const far = [...document.querySelectorAll('td, th, figcaption, p')]
            return far.filter(part => part.scrollWidth > part.clientWidth + 1
                && getComputedStyle(part).display !== 'inline').length
        }"""
    )
    page.close()

    assert printed.startswith(b"%PDF")
    assert hidden == 0

"""report.html: stands alone, escapes what it is given, says what was and was not measured."""

import re
from html.parser import HTMLParser

import pytest

from mimic_fast.report.collect import RunFacts, build_report
from mimic_fast.report.examples import Example
from mimic_fast.report.render import render_report
from mimic_fast.report.verdict import points
from tests.report.conftest import TWO

VOID = {"meta", "img", "br", "link", "input", "hr"}
PNG = "data:image/png;base64,AAAA"


class Page(HTMLParser):
    """Tags, attributes and text, with a check that elements close in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.text.append(data)

    @property
    def words(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.text))


@pytest.fixture
def example() -> Example:
    return Example(
        label="Boot",
        clean=PNG,
        triggered=PNG,
        said={"teacher": ("Boot", "Bag"), "purified": ("Boot", "Boot")},
        fooled=("teacher",),
    )


@pytest.fixture
def full(make_evaluation, run_facts, agreement, information, example, tmp_path) -> str:
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text("".join(f'{{"step": {i}, "loss": {9 - i}}}\n' for i in range(9)))
    report = build_report(
        make_evaluation(), run=run_facts, agreement=agreement, mutual_information=information
    )
    return render_report(report, metrics=metrics, examples=[example])


def test_page_stands_alone(full):
    page = Page(full)

    for tag, attributes in page.tags:
        assert tag not in ("script", "link", "iframe", "object")
        for name in ("src", "href"):
            address = attributes.get(name)
            assert address is None or address.startswith(("data:image/", "#")), address
    assert "url(" not in full
    assert "@import" not in full
    assert not re.findall(r"https?:", re.sub(r'"data:[^"]*"', "", full))


def test_full_page_has_every_part(full):
    words = Page(full).words

    for part in (
        "Purified: ASR 9",
        "Before and after: fashion-mnist, linear probe",
        "Student-only (floor)",
        "8 (Bag)",
        "Images, clean and with the trigger",
        "Agreement of teacher and purified encoder",
        "Where the benign knowledge lies",
        "Training",
        "5 min 12 s",
        "1.0 GiB",
        "4.0 % of the pre-training images",
        "No proof of absence",
        "suspect.safetensors",
        "optim.lr",
        "ab" * 32,
    ):
        assert part in words, part


def test_images_have_alternative_text_and_tables_captions(full):
    page = Page(full)

    pictures = [attributes for tag, attributes in page.tags if tag == "img"]
    assert len(pictures) == 5
    assert all(attributes["alt"] for attributes in pictures)
    tags = [tag for tag, _ in page.tags]
    assert tags.count("caption") == tags.count("table") == 3
    assert tags.count("h1") == tags.count("main") == 1


def test_table_holds_the_measures_with_their_intervals(full, make_evaluation):
    words = Page(full).words
    for encoder in make_evaluation()["encoders"].values():
        measure = encoder["downstream"][0]["attacks"][0]["attack_success_rate"]
        value, low, high = (round(100 * measure[key], 1) for key in ("value", "low", "high"))
        assert f"{value} % {low}\u2013{high}" in words


def test_minus_signs_and_arrows_are_set_as_such(full):
    words = Page(full).words

    assert "\u2192" in words
    assert "->" not in words
    assert re.search("Accuracy against the teacher: [+\u2212]", words)
    assert re.search(r"ab-\d", words) is None


def test_fooled_encoders_are_marked_in_words_too(full):
    assert "teacher: Bag (target)" in Page(full).words
    assert "purified: Boot" in Page(full).words
    assert "purified: Boot (target)" not in Page(full).words


def test_bare_page_says_what_is_missing():
    report = build_report(
        {"encoders": {"teacher": {"sha256": "ab"}}}, run=RunFacts(settings={"seed": 0})
    )

    words = Page(render_report(report)).words

    assert "ASR not measured: no trigger was given" in words
    for part in ("Before and after", "Agreement of", "Training", "Cost", "Images", "lies"):
        assert part not in words


def test_page_of_the_dv_estimator_needs_neither_bins_nor_noise_floor(information, run_facts):
    del information["bins"]
    information["estimator"] = "dv"
    for layer in information["layers"]:
        del layer["noise_floor"], layer["bins"], layer["pairs"]
    report = build_report({"encoders": {}}, run=run_facts, mutual_information=information)

    words = Page(render_report(report)).words

    assert "under the dv estimator" in words
    assert "noise floor" not in words
    assert "bins per axis" not in words


def test_page_of_accuracies_alone_has_no_asr_columns(make_evaluation, run_facts):
    roles = dict.fromkeys(("teacher", "purified", "student_only", "clean"), (0.8, None))
    report = build_report(make_evaluation(**roles), run=run_facts)

    page = Page(render_report(report))

    assert "Robust accuracy" not in page.words
    assert "Accuracy measured; ASR not measured" in page.words


def test_hostile_names_are_escaped(make_evaluation, run_facts, example):
    evil = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)>"
    evaluation = make_evaluation()
    evaluation["datasets"][0]["class_names"][8] = evil
    evaluation["datasets"][0]["train"] = evil
    for encoder in evaluation["encoders"].values():
        encoder["downstream"][0]["dataset"] = evil
    evaluation["encoders"][evil] = evaluation["encoders"]["clean"]
    facts = RunFacts(settings={evil: evil}, provenance={evil: evil})
    report = build_report(evaluation, run=facts)
    named = Example(label=evil, clean=PNG, triggered=PNG, said={"teacher": (evil, evil)}, fooled=())

    page = Page(render_report(report, examples=[named]))

    assert not [tag for tag, _ in page.tags if tag == "script"]
    sources = [attributes["src"] or "" for tag, attributes in page.tags if tag == "img"]
    assert all(source.startswith("data:") for source in sources)
    assert "alert(1)" in page.words


def test_differences_have_their_p_values(full):
    words = Page(full).words

    assert "p: McNemar\u2019s exact test" in words
    assert len(re.findall(r"points \(95.%: [^)]*\) p (<|=) [01]\.\d+", words)) == 6


def test_several_attacks_have_a_table_each_and_the_pictures_say_which(
    make_evaluation, run_facts, example
):
    report = build_report(make_evaluation(**TWO), run=run_facts)

    page = Page(render_report(report, examples=[example]))

    heading = "Before and after: fashion-mnist, linear probe, trigger"
    _, first, second = page.words.split(heading)
    assert "8 (Bag)" in first
    assert "9 (Boot)" in second
    assert "8 (Bag)" not in second
    for place, words in enumerate((first, second)):
        for role in TWO:
            attack = report["encoders"][role]["downstream"][0]["attacks"][place]
            assert words.startswith(f" {attack['trigger']}")
            assert f"{round(100 * attack['attack_success_rate']['value'], 1)} %" in words, role
        difference = report["comparisons"][place]["attack_success_rate"]
        assert points(difference).replace("-", "\u2212") in words
    assert [tag for tag, _ in page.tags].count("table") == 4  # measures and differences of each
    assert "Of the 2 triggers the first, white_patch, is shown." in page.words
    assert "badencoder, trigger blended:1" in page.words


def test_one_attack_needs_no_name(full):
    assert "linear probe, trigger" not in Page(full).words
    assert "triggers the first" not in Page(full).words


def test_what_a_scan_does_not_mean_stands_beside_each_role(make_evaluation, scans):
    report = build_report(make_evaluation(), run=RunFacts(settings={}), scan=scans[0])

    words = Page(render_report(report)).words

    teacher, purified = (scans[0][role]["verdict"] for role in ("teacher", "purified"))
    assert teacher["does_not_mean"] != purified["does_not_mean"]
    for verdict in (teacher, purified):
        assert f"{verdict['means']} {verdict['does_not_mean']}" in words

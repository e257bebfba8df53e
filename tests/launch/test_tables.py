import pytest

from mimic_fast.launch.tables import print_checkpoint, print_information, print_report, printable


@pytest.fixture(autouse=True)
def wide_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")


def measure(value: float) -> dict[str, float]:
    return {"value": value, "low": value - 0.01, "high": value + 0.01, "n": 100}


def report(attacked: bool) -> dict:
    attack = {
        "trigger": "white",
        "target": 0,
        "attack_success_rate": measure(0.987),
        "robust_accuracy": measure(0.02),
    }
    entry = {
        "dataset": "shades",
        "probe": "linear",
        "clean_accuracy": measure(0.801),
        "attacks": [attack] if attacked else [],
    }
    roles = ("extra", "clean", "purified", "teacher")
    return {
        "encoders": {role: {"downstream": [entry]} for role in roles},
        "agreement": {"cosine": measure(0.95)},
        "verdict": {"text": "Purified: ASR falls"},
    }


def test_report_shows_measures_with_intervals_in_the_order_of_roles(capsys):
    print_report(report(attacked=True))

    out = capsys.readouterr().out
    assert "80.1 % (79.1..81.1)" in out
    assert "98.7 % (97.7..99.7)" in out
    assert "cosine 0.950 (0.940..0.960)" in out
    assert out.endswith("Purified: ASR falls\n")
    rows = [line.split()[1] for line in out.splitlines() if "shades" in line]
    assert rows == ["teacher", "purified", "clean", "extra"]


def test_report_without_attack_has_no_column_for_it(capsys):
    print_report(report(attacked=False))

    out = capsys.readouterr().out
    assert "ASR" not in out.partition("Purified")[0]
    assert "80.1 %" in out


def test_information_marks_what_was_not_measured_and_what_is_capped(capsys):
    layer = {"tap": "layer1", "value": 0.5, "low": 0.4, "high": 0.6, "share": 0.1, "weight": 2000.0}
    print_information(
        {
            "estimator": "dv",
            "source": "student",
            "images": 90,
            "layers": [
                {**layer, "noise_floor": None, "determines_features": False},
                {**layer, "tap": "layer2", "noise_floor": 0.05, "determines_features": True},
            ],
        }
    )

    out = capsys.readouterr().out
    assert "dv, student, 90 images" in out
    assert "determines the features" in out
    rows = {line.split()[1]: line for line in out.splitlines() if "layer" in line}
    assert "0.500 *" in rows["layer2"]
    assert "0.050" in rows["layer2"]
    assert "*" not in rows["layer1"]


def test_names_in_a_checkpoint_are_neither_markup_nor_control_sequences(capsys):
    print_checkpoint(
        {
            "format": "torch",
            "bytes": 1234567,
            "tensors": [{"key": "[/red]\x1b[31mkey", "shape": [], "dtype": "float32"}],
        }
    )

    out = capsys.readouterr().out
    assert r"[/red]\x1b[31mkey" in out
    assert "1,234,567" in out
    assert "scalar" in out
    assert "\x1b" not in out


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("layer4.1.bn2", "layer4.1.bn2"),
        ("two words", "two words"),
        ("\x1b]0;title\x07", r"\x1b]0;title\x07"),
        ("line\nbreak", r"line\nbreak"),
        ("\u202etxt", r"\u202etxt"),
    ],
)
def test_printable_spells_out_control_characters(text, shown):
    assert printable(text) == shown


def test_report_with_several_attacks_has_a_row_for_each(capsys):
    content = report(attacked=True)
    entry = content["encoders"]["teacher"]["downstream"][0]
    entry["attacks"].append(
        {"trigger": "blended:1", "target": 3, "attack_success_rate": measure(0.123)}
    )

    print_report(content)

    rows = [line for line in capsys.readouterr().out.splitlines() if " teacher " in line]
    assert len(rows) == 2
    assert "white" in rows[0]
    assert "98.7 %" in rows[0]
    assert "blended:1" in rows[1]
    assert "12.3 %" in rows[1]
    assert all("80.1 %" in row for row in rows)

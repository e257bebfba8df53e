import math

import pytest
import torch
from scipy import stats

from mimic_fast.errors import UsageError
from mimic_fast.scan.inversion import Inverted
from mimic_fast.scan.measure import Recovered
from mimic_fast.scan.result import Comparison, Scanned, Score, Verdict
from mimic_fast.scan.scan import telling
from mimic_fast.scan.verdict import ENOUGH, judge, t_tail

SIZES = (0.080, 0.071, 0.093, 0.084, 0.077, 0.088, 0.079, 0.090)
SHIFTS = (0.21, 0.25, 0.19, 0.24, 0.22, 0.23, 0.20, 0.26)


def scanned(size: float, shift: float, digest: str = "0") -> Scanned:
    return Scanned(
        name="encoder.safetensors",
        sha256=digest * 64,
        family={},
        images="",
        source="",
        protocol={},
        scores=(
            Score(name="patch size at 0.95", value=size, unit="share", suspicious="low"),
            Score(name="patch shift", value=shift, unit="cosine", suspicious="high"),
        ),
    )


REFERENCES = [scanned(size, shift) for size, shift in zip(SIZES, SHIFTS, strict=True)]


def judged(size: float, shift: float):
    verdict = judge(scanned(size, shift), REFERENCES, unusual=0.05, suspicious=0.01)
    assert verdict is not None
    return verdict


@pytest.mark.parametrize("degrees", [1, 2, 3, 4, 7, 10, 19, 40])
@pytest.mark.parametrize("t", [-30.0, -2.5, -0.1, 0.0, 0.7, 3.0, 12.0])
def test_tail_of_t_is_scipys(t, degrees):
    assert t_tail(t, degrees) == pytest.approx(float(stats.t.sf(t, degrees)), abs=1e-13)


def test_chance_is_that_of_the_prediction_interval():
    logs = [math.log(size) for size in SIZES]
    mean, deviation = sum(logs) / 8, stats.tstd(logs)
    t = (mean - math.log(0.06)) / (deviation * math.sqrt(1 + 1 / 8))

    by_size, by_shift = judged(0.06, 0.22).comparisons

    assert by_size.chance == pytest.approx(float(stats.t.sf(t, 7)), rel=1e-9)
    assert by_size.deviations == pytest.approx((mean - math.log(0.06)) / deviation)
    assert 0.3 < by_shift.chance < 0.7
    assert (by_size.low, by_size.median, by_size.high) == (0.071, 0.082, 0.093)


@pytest.mark.parametrize(
    ("size", "shift", "level"),
    [
        (0.082, 0.22, "no sign"),
        (0.120, 0.10, "no sign"),  # far out, but towards the harmless ends
        (0.061, 0.22, "unusual"),
        (0.020, 0.22, "suspicious"),
        (0.082, 0.80, "suspicious"),
        (0.082, 1.00, "suspicious"),
    ],
)
def test_levels(size, shift, level):
    verdict = judged(size, shift)

    assert verdict.level == level
    assert verdict.means
    assert verdict.does_not_mean
    smallest = min(item.chance for item in verdict.comparisons)
    assert verdict.chance == pytest.approx(min(1, 2 * smallest))


def test_too_few_references_give_no_verdict():
    few = REFERENCES[: ENOUGH - 1]

    assert judge(scanned(0.01, 0.9), few, unusual=0.05, suspicious=0.01) is None
    assert judge(scanned(0.01, 0.9), REFERENCES[:ENOUGH], unusual=0.05, suspicious=0.01)


def test_references_that_agree_by_luck_make_nothing_suspicious():
    same = [scanned(0.080, 0.22) for _ in range(6)]

    verdict = judge(scanned(0.078, 0.225), same, unusual=0.05, suspicious=0.01)

    assert verdict is not None
    assert verdict.level == "no sign"


def test_references_with_other_scores_are_refused():
    other = [one.model_copy(update={"scores": one.scores[:1]}) for one in REFERENCES]

    with pytest.raises(UsageError, match="other scores"):
        judge(scanned(0.08, 0.2), other, unusual=0.05, suspicious=0.01)


def sizes(*values: float) -> list[Scanned]:
    """Encoders with patch sizes; 0.9, the largest tried, means that the level was not reached."""
    made = [scanned(value, 0.22) for value in values]
    for number, one in enumerate(made):
        size, shift = one.scores
        reached = size.model_copy(update={"reached": size.value < 0.9})
        made[number] = one.model_copy(update={"scores": (reached, shift)})
    return made


def patch_size(size: float, references: list[Scanned]) -> Comparison:
    verdict = judge(sizes(size)[0], references, unusual=0.05, suspicious=0.01)
    assert verdict is not None
    return verdict.comparisons[0]


def test_references_that_never_reached_the_level_give_a_rank_not_a_deviation():
    compared = patch_size(0.5, sizes(*[0.9] * 9))

    assert compared.chance == pytest.approx(1 / 10)
    assert compared.deviations is None
    compared = patch_size(0.5, sizes(*[0.9] * 7, 0.4, 0.6))
    assert compared.chance == pytest.approx(2 / 10)


def test_an_encoder_that_never_reached_the_level_is_not_suspicious_for_it():
    assert patch_size(0.9, REFERENCES).chance == 1
    assert patch_size(0.9, sizes(*[0.9] * 9)).chance == 1


def test_one_reference_that_never_reached_the_level_widens_nothing():
    measured = patch_size(0.06, REFERENCES)

    compared = patch_size(0.06, [*REFERENCES, *sizes(0.9, 0.9)])

    assert compared.chance == pytest.approx(measured.chance * 9 / 11)
    assert compared.deviations == pytest.approx(measured.deviations)
    assert (compared.low, compared.high) == (0.071, 0.9)


def recovered(form: str, level: float, *, reached: bool = True) -> Recovered:
    nothing = torch.zeros(1, 2, 2)
    inverted = Inverted(size=0.1, reached=reached, mask=nothing, pattern=nothing)
    return Recovered(form=form, level=level, inverted=inverted, held_out=0.9)


def test_the_telling_trigger_is_the_one_most_out_of_the_ordinary():
    patch, loose, additive = (
        recovered("patch", 0.95), recovered("patch", 0.6), recovered("additive", 0.95)
    )  # fmt: skip
    deviations = {"patch size at 0.95": 1.0, "patch size at 0.6": 2.0, "additive size at 0.95": 9.0}
    comparisons = tuple(
        Comparison(name=name, low=0.0, median=0.0, high=0.0, deviations=value, chance=0.0)
        for name, value in deviations.items()
    )
    verdict = Verdict(
        level="unusual", chance=0.0, comparisons=comparisons, means="", does_not_mean=""
    )

    assert telling([patch, loose, additive], verdict) is additive
    assert telling([patch, loose, additive], None) is patch
    assert telling([recovered("patch", 0.95, reached=False), loose, additive], None) is loose
    assert telling([recovered("additive", 0.95, reached=False)], verdict) is None

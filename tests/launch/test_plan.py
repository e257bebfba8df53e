"""``mimic-fast plan`` as a user sees it."""

import pytest

SHALLOW = ("encoder.image_size=96", "encoder.arguments.depth=3")
VIT = (
    *("--set", "encoder.architecture=timm:vit_tiny_patch16_224"),
    *(word for setting in SHALLOW for word in ("--set", setting)),
)


def test_plan_of_an_architecture_as_json(cli):
    done = cli(
        "plan", *VIT, "--gpus", "8", "--gpu", "H100", "--set", "optim.precision=bf16", "--json"
    )

    assert done.code == 0, done.err
    assert done.err == ""
    plan = done.json
    assert (plan["gpus"], plan["memory_bytes"], plan["micro_batch_images"]) == (8, 80 * 10**9, 8)
    rows = {(row["engine"], row["teacher_shard"]): row for row in plan["engines"]}
    assert len(rows) == 10
    assert all(row["fits"] and row["step_seconds"] > 0 for row in rows.values())
    assert rows["fsdp2", True]["peak_bytes"] < rows["ddp", False]["peak_bytes"]
    for row in rows.values():
        assert sum(row["peak_parts_bytes"].values()) == pytest.approx(row["peak_bytes"], abs=10)
    assert plan["advice"]["run.engine"] == "ddp"
    assert any("fake tensors" in sentence for sentence in plan["assumptions"])


def test_plan_of_a_recipe_and_a_teacher_as_a_table(cli, tmp_path, teacher):
    (tmp_path / "recipe.toml").write_text("[optim]\nbatch_size = 64\n")

    done = cli("plan", "recipe.toml", "--teacher", teacher, "--gpus", "2", "--memory", "80GB")

    assert done.code == 0, done.err
    for text in ("timm:resnet18", "fsdp2", "largest", "micro-batch 32 images", "80.00 GB"):
        assert text in done.out
    assert "recommended: mimic-fast purify recipe.toml (the recipe as it is)" in done.out
    assert "step time needs --gpu NAME or --peak-tflops" in done.out


def test_too_little_memory_asks_for_more_parts_or_says_that_nothing_fits(cli):
    parts = cli("plan", *VIT, "--memory", "1700MB", "--set", "optim.batch_size=128", "--json")
    nothing = cli("plan", *VIT, "--memory", "1520MB", "--set", "optim.batch_size=128")

    assert parts.code == nothing.code == 0, parts.err + nothing.err
    assert not parts.json["engines"][0]["fits"]
    assert parts.json["advice"]["optim.accumulate"] > 1
    assert "nothing fits" in nothing.out


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((*VIT, "--memory", "80"), "with its unit"),
        ((*VIT, "--memory", "80 apples"), "with its unit"),
        (VIT, "Give --memory"),
        ((*VIT, "--gpu", "H10"), "did you mean 'H100'"),
        ((*VIT, "--memory", "80GB", "--gpus", "3"), "does not divide by 3 GPUs"),
        (("--memory", "80GB"), "encoder.architecture=timm:NAME"),
        (("--memory", "80GB", "--set", "encoder.architecture=timm:vit_tinny"), "did you mean"),
        ((*VIT, "--memory", "80GB", "--gpus", "0"), "--gpus"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(cli, arguments, expected):
    done = cli("plan", *arguments)

    assert done.code == 2
    assert expected in done.error

"""Ablations: intervals against independent formulas, differences paired by seed, and recipes that change one thing each."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import mpmath
import pytest

from free_dist.evaluation.ablation import STUDENT, ablation_rows, ablation_table, mean_interval
from free_dist.recipe_io import load_recipe

RECIPES = Path(__file__).parents[2] / "launch" / "recipes"
ABLATIONS = sorted((RECIPES / "ablations").glob("*.yaml"))


@pytest.mark.parametrize("freedom", range(1, 11))
def test_quantiles_are_those_of_students_distribution(freedom: int) -> None:
    """The distribution function by numerical integration of its density."""
    n = mpmath.mpf(freedom)
    scale = mpmath.gamma((n + 1) / 2) / (mpmath.sqrt(n * mpmath.pi) * mpmath.gamma(n / 2))
    inside = mpmath.quad(lambda t: scale * (1 + t * t / n) ** (-(n + 1) / 2), [0, 1, 3, STUDENT[freedom - 1]])
    assert float(inside) == pytest.approx(0.475, abs=5e-5)


def test_an_interval_of_three_values_by_hand() -> None:
    low, high = mean_interval([1.0, 2.0, 3.0])
    assert ((low + high) / 2, (high - low) / 2) == pytest.approx((2.0, 4.303 / 3**0.5))
    assert mean_interval([1.0]) is None


def test_differences_are_paired_by_seed() -> None:
    """The same improvement at every seed is certain, however far the seeds lie apart."""
    base = [{2: 0.1, 4: 0.5}, {2: 0.5, 4: 0.6}, {2: 0.9, 4: 0.7}]
    more = [{2: seed[2] + 0.01, 3: 0.5, 4: seed[4] + sign * 0.1} for seed, sign in zip(base, (1, -1, 0), strict=True)]
    rows = ablation_rows(
        {"base": base, "more": more}, task="vqa", full=0.95, tokens=50, parameters={"base": 10, "more": 20}
    )
    found = {(row.ablation, row.exit): row for row in rows}
    assert found["base", 2].difference is None and found["more", 3].difference is None
    assert found["more", 2].difference == pytest.approx(0.01)
    assert found["more", 2].difference_interval == pytest.approx((0.01, 0.01))
    low, high = found["more", 4].difference_interval
    assert low < 0 < high
    text = [" ".join(line) for line in ablation_table(rows)]
    assert text[0] == "setting exit trained vqa"
    assert any(line.startswith("more 2") and "(+0.010*)" in line for line in text)
    assert any(line.startswith("more 4") and "(+0.000)" in line for line in text)


def test_other_numbers_of_seeds_are_refused() -> None:
    with pytest.raises(ValueError, match="the same seeds"):
        ablation_rows({"base": [{2: 0.1}], "more": []}, task="vqa", full=1.0, tokens=1, parameters={})


@pytest.mark.parametrize("path", ABLATIONS, ids=lambda path: path.stem)
def test_a_recipe_changes_the_base_in_one_thing(path: Path) -> None:
    base, changed = (
        asdict(load_recipe(paths)) for paths in ([RECIPES / "ablation.yaml"], [RECIPES / "ablation.yaml", path])
    )
    different = [
        f"{section}.{name}" for section in base if isinstance(base[section], dict)
        for name in base[section] if base[section][name] != changed[section][name]
    ]  # fmt: skip
    assert len(different) == 1, different
    assert base["run_dir"] == changed["run_dir"]
    assert path.read_text().startswith("# "), "its first line says what it changes"


def test_an_override_that_undoes_an_ablation_is_refused() -> None:
    finished = subprocess.run(
        [sys.executable, "launch/ablate.py", "--only", "no_gan", "loss.adversarial_weight=0"],
        cwd=RECIPES.parents[1], capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert finished.returncode == 2 and "no_gan and the base are the same run" in finished.stderr
    assert "Traceback" not in finished.stderr


def test_exits_of_every_ablation_contain_those_of_the_base() -> None:
    base = set(load_recipe([RECIPES / "ablation.yaml"]).exits.exit_layers)
    assert all(base <= set(load_recipe([RECIPES / "ablation.yaml", path]).exits.exit_layers) for path in ABLATIONS)

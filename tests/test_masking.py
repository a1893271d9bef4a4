"""The signs of gradient masking: an honest network has none, one with turned gradients has all."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import oracle
import pytest
import torch
from torch import Tensor, nn

from segadv import functional, masking, plots, report, results
from segadv.attacks import FGSM
from segadv.evaluation import EvaluationResult, Measurement, evaluate
from segadv.masking import Check, masking_checks

Batch = tuple[Tensor, Tensor]


@pytest.fixture(scope="module")
def data() -> list[Batch]:
    """Squares of five colours with noise, some pixels without a label."""
    generator = torch.Generator().manual_seed(2)
    coarse = torch.randint(0, 5, (12, 4, 6), generator=generator)
    labels = coarse.repeat_interleave(4, 1).repeat_interleave(4, 2)
    images = torch.rand(5, 3, generator=generator)[labels].movedim(3, 1)
    images = (0.3 + 0.4 * images + 0.15 * torch.randn(images.shape, generator=generator)).clamp(0, 1)
    labels[torch.rand(labels.shape, generator=generator) < 0.1] = 255
    return [(images[:8], labels[:8].byte()), (images[8:], labels[8:].byte())]


def trained(data: list[Batch], seed: int) -> nn.Module:
    torch.manual_seed(seed)
    network = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(),
        nn.Conv2d(16, 5, 1),
    )  # fmt: skip
    optimizer = torch.optim.Adam(network.parameters(), lr=0.01)
    for _ in range(25):
        for images, labels in data:
            optimizer.zero_grad()
            functional.cross_entropy(network(images), labels).backward()
            optimizer.step()
    return network


@pytest.fixture(scope="module")
def network(data: list[Batch]) -> nn.Module:
    return trained(data, 0)


class Turned(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return -grad


class Masked(nn.Module):
    """Right predictions and gradients that point the wrong way."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        return self.network(Turned.apply(images))


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8])
def test_classification_and_labels_that_cannot_hold_the_ignored_one(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    classifier = nn.Sequential(nn.Flatten(), nn.Linear(192, 200))
    batch = torch.rand(6, 3, 8, 8, generator=generator), torch.full((6,), 156, dtype=dtype)  # -100 as uint8
    checks = masking_checks(classifier, [batch], steps=2, ignore_index=-100)
    expected = functional.cross_entropy(classifier(batch[0]), batch[1].long(), ignore_index=-100).item()
    assert f"mean cross-entropy {expected:.3f} at 0," in checks[-1].finding


def test_a_source_whose_length_is_0_is_one(data: list[Batch], network: nn.Module) -> None:
    class Empty(nn.Module):
        def __init__(self, network: nn.Module) -> None:
            super().__init__()
            self.network = network

        def __len__(self) -> int:
            return 0

        def forward(self, images: Tensor) -> Tensor:
            return self.network(images)

    other = trained(data, 1)
    findings = [
        masking_checks(network, data, steps=3, sources={"other": source})[4].finding for source in (Empty(other), other)
    ]
    assert findings[0] == findings[1]


def test_honest_network_passes_all_checks_and_a_masked_one_none(data: list[Batch], network: nn.Module) -> None:
    other = trained(data, 1)
    checks = masking_checks(network, data, sources={"other": other})
    assert len(checks) == 6
    assert all(check.passed for check in checks), checks
    # At one eps a check may pass by a hair: a step the wrong way can leave as little to gain as twenty.
    masked = [
        masking_checks(Masked(network), data, sources={"the same without a mask": network}, eps=eps)
        for eps in (0.03, 0.05)
    ]
    for check, *found in zip(checks, *masked, strict=True):
        assert {one.name for one in found} == {check.name}
        assert any(one.passed is False for one in found), found
    assert masking_checks(network, data, steps=3)[4].passed is None


class Rounded(nn.Module):
    """Gradients of a network that sees rounded images: small steps do nothing, the rest is as it was."""

    def __init__(self, network: nn.Module, levels: int) -> None:
        super().__init__()
        self.network = network
        self.levels = levels

    def forward(self, images: Tensor) -> Tensor:
        rounded = (images * self.levels).round() / self.levels
        return self.network(images * 0 + rounded)


def test_a_model_without_useful_gradients_is_found(data: list[Batch], network: nn.Module) -> None:
    """Rounding stops gradients: white-box attacks find nothing, those on the network behind it do."""
    told = "attack 'pgd' left images where it began: "
    with pytest.warns(UserWarning, match=told):
        by_name = {check.name: check for check in masking_checks(Rounded(network, 256), data, sources={"it": network})}
    flat = by_name["the loss only rises along FGSM's direction"]
    assert not flat.passed
    assert flat.finding.endswith("it only rises for 0% of the images")
    assert by_name["an attack on another model is not stronger than one on this"].passed is False
    assert by_name["accuracy falls with eps, to about 0"].passed is False


def test_figures_are_the_measured_ones(data: list[Batch], network: nn.Module) -> None:
    checks = masking_checks(network, data, eps=0.05)
    accuracy = {
        row["attack"]: row["pixel_accuracy"] for row in evaluate(network, data, ["fgsm"], [0.05], steps=20).rows
    }
    assert f"FGSM {accuracy['fgsm']:.3f}" in checks[1].finding
    curve = [float(value) for value in re.findall(r"([0-9.]+) at eps", checks[0].finding)]
    assert len(curve) == 6
    clean = evaluate(network, data, ["fgsm"], [0.0]).rows[0]["pixel_accuracy"]
    assert curve[0] == pytest.approx(clean, abs=5e-4)
    losses = []
    with torch.no_grad():
        for images, labels in data:
            losses += functional.cross_entropy(network.eval()(images), labels, reduction="image").tolist()
    assert f"{sum(losses) / len(losses):.3f} at 0" in checks[5].finding
    along = torch.stack([losses_under_fgsm(network, data, 0.05 * i / 10) for i in range(11)])
    assert f" at 0, {along[5].mean():.3f} at 0.025, {along[-1].mean():.3f} at 0.05; " in checks[5].finding


def losses_under_fgsm(network: nn.Module, data: list[Batch], eps: float) -> Tensor:
    attack = FGSM(network, eps=eps)
    with torch.no_grad():
        return torch.cat([functional.cross_entropy(network(attack(x, y)), y, reduction="image") for x, y in data])


def test_share_of_the_images_whose_loss_only_rises(data: list[Batch], network: nn.Module) -> None:
    class Waves(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = network

        def forward(self, x: Tensor) -> Tensor:
            return self.network(x).sin()

    model = Waves().eval()
    along = torch.stack([losses_under_fgsm(model, data, 0.03 * i / 10) for i in range(11)])
    rising = (along.diff(dim=0) >= 0).all(0).double().mean()
    assert 0 < rising < 1
    assert f"only rises for {rising:.0%} of the images" in masking_checks(model, data, eps=0.03, steps=3)[5].finding


def test_sizes_near_the_largest_and_what_cannot_be_checked(data: list[Batch], network: nn.Module) -> None:
    for eps, count in ((0.2, 6), (0.25, 5), (0.3, 5), (0.5, 4)):
        falls, _, steps, *_ = masking_checks(network, data, eps=eps, steps=3)
        shown = [float(value) for value in re.findall(r"at eps ([0-9.]+)", falls.finding)]
        assert shown == sorted({*shown})
        assert (shown[-1], len(shown)) == (0.5, count)
        assert steps.passed is None  # PGD was judged once
    for eps in (0.0, 0.6, float("nan"), "0.1", True):
        with pytest.raises(
            ValueError, match=r"eps must be more than 0 and at most 0\.5, in the unit of the images, got "
        ):
            masking_checks(network, data, eps=eps)


def test_batches_that_come_only_once_serve_all_checks(data: list[Batch], network: nn.Module) -> None:
    assert masking_checks(network, iter(data), steps=3) == masking_checks(network, data, steps=3)


def test_offloaded_weights_are_checked(data: list[Batch]) -> None:
    model = nn.Conv2d(3, 5, 3, padding=1)
    expected = masking_checks(model, data, steps=3)
    assert masking_checks(oracle.Offloaded(model), data, steps=3) == expected


def test_images_without_a_label_do_not_count(data: list[Batch], network: nn.Module) -> None:
    void = [(images, torch.full_like(labels, 255)) for images, labels in data]
    assert masking_checks(network, [*data, *void])[5] == masking_checks(network, data)[5]


def test_ignore_index_and_align_corners_reach_every_check(data: list[Batch], network: nn.Module) -> None:
    coarse = nn.Sequential(network, nn.AvgPool2d(3))
    other = [(images, labels.where(labels != 255, 9)) for images, labels in data]
    options: dict[str, Any] = {"ignore_index": 9, "align_corners": True}
    found = masking_checks(coarse, other, eps=0.05, steps=4, sources={"it": coarse}, **options)
    expected = masking_checks(
        oracle.Resampled(coarse), data, eps=0.05, steps=4, sources={"it": oracle.Resampled(coarse)}
    )
    assert found == expected
    assert found != masking_checks(coarse, data, eps=0.05, steps=4, sources={"it": coarse})


GROWING = [0.0, 0.0075, 0.015, 0.03, 0.06, 0.5]
MEASURED: dict[str, Any] = {
    "curve": [0.9, 0.7, 0.5, 0.3, 0.1, 0.0],
    "pgd": [0.4, 0.35, 0.3],  # after 3, 5 and 10 steps
    "fgsm": [0.4],
    "noise": [0.9],
    "from other": [0.6],
    "losses": [[1.0 + 0.1 * i for i in range(11)]] * 2,
}


@pytest.mark.parametrize(
    ("changed", "failed"),
    [
        ({}, None),
        ({"curve": [0.9, 0.7, 0.705, 0.3, 0.1, 0.04]}, None),
        ({"curve": [0.9, 0.7, 0.72, 0.3, 0.1, 0.04]}, 0),
        ({"curve": [0.9, 0.5, 0.508, 0.516, 0.1, 0.0]}, 0),
        ({"curve": [0.9, 0.7, 0.5, 0.3, 0.1, 0.06]}, 0),
        ({"fgsm": [0.295]}, None),
        ({"fgsm": [0.28]}, 1),
        ({"pgd": [0.3, 0.305, 0.3]}, None),
        ({"pgd": [0.3, 0.32, 0.3]}, 2),
        ({"pgd": [0.3, 0.308, 0.316]}, 2),
        ({"noise": [0.395]}, None),
        ({"noise": [0.38]}, 3),
        ({"from other": [0.295]}, None),
        ({"from other": [0.28]}, 4),
        ({"losses": [[1.0, 0.995, *[1.1] * 9]]}, None),
        ({"losses": [[1.0, 0.98, *[1.1] * 9]]}, 5),
        ({"losses": [[1.0 - 0.005 * i for i in range(11)]]}, 5),
        ({"losses": [[1.0] * 11]}, 5),
        ({"losses": [[1.0, 1.0, *[1.1] * 9]]}, None),
        ({"losses": [[1.0, *(1.5 - 0.01 * i for i in range(10))]]}, 5),  # it ends above its beginning
        ({"losses": [[2.0 - 0.1 * i for i in range(11)], [1.0 + 0.2 * i for i in range(11)]]}, None),  # of the mean
    ],
)
def test_verdicts_follow_from_the_numbers(
    changed: dict[str, Any], failed: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    numbers = MEASURED | changed
    asked: list[dict[str, Any]] = []

    def fake(model: nn.Module, batches: Any, attacks: Any, eps: Any, **options: Any) -> EvaluationResult:
        asked.append(options)
        if list(attacks) == ["pgd", "segpgd"]:
            assert eps == GROWING
            found = [("worst-case", size, 20, share) for size, share in zip(eps, numbers["curve"], strict=True)]
        else:
            found = [
                (name, eps[0], count, share)
                for name in attacks
                for count, share in zip((3, 5, 10), numbers[name], strict=False)
            ]
        matrices = [torch.tensor([[round(1000 * share), round(1000 - 1000 * share)], [0, 0]]) for *_, share in found]
        return EvaluationResult(
            [Measurement("", *entry[:3], matrix, NONE, NONE) for entry, matrix in zip(found, matrices, strict=True)]
        )

    monkeypatch.setattr(masking, "evaluate", fake)
    monkeypatch.setattr(masking, "_losses_along_fgsm", lambda *_: torch.tensor(numbers["losses"]))
    model = nn.Identity()
    checks = masking_checks(
        model, [], steps=7, sources={"other": model}, seed=5, ignore_index=9, align_corners=True, records="r"
    )
    assert [check.passed for check in checks] == [i != failed for i in range(6)]
    rising = [losses == sorted(losses) and losses[-1] > losses[0] for losses in numbers["losses"]]
    assert f"only rises for {sum(rising) / len(rising):.0%} of the images" in checks[5].finding
    shared = {"seed": 5, "ignore_index": 9, "align_corners": True, "records": "r"}
    assert len(asked) == 2
    assert asked[0]["steps"] == 7
    assert all(shared.items() <= options.items() for options in asked)


def test_noise_moves_every_channel_by_eps_and_stays_in_the_box() -> None:
    images = torch.full((2, 3, 64, 64), 0.5, dtype=torch.float64)
    moved = masking._noise(0.25)(images, torch.zeros(2, 64, 64)) - images
    assert moved.abs().unique().tolist() == [0.25]
    assert abs(moved.mean().item()) < 0.01  # 6 standard deviations
    assert (moved[:, 0] != moved[:, 1]).any()
    edges = masking._noise(0.25)(torch.tensor([0.0, 1.0]).repeat(1, 3, 64, 32), torch.zeros(1, 64, 64))
    assert edges.unique().tolist() == [0.0, 0.25, 0.75, 1.0]


# --- the report ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["run.json", "last.pt"])
def test_a_report_is_not_written_into_a_training_run(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("{}")
    with pytest.raises(ValueError, match=r"holds a training run; give a folder of its own, such as .*report"):
        report.require_report_folder(tmp_path)


def test_names_of_any_kind_stand_in_one_cell_of_a_table() -> None:
    assert report.table(["a|b", "c"], [["one\nline", r"\x\|"]]) == [
        r"| a\|b | c |",
        "| --- | --- |",
        r"| one line | \x\\\| |",
    ]


def test_a_report_that_cannot_be_written_is_none(
    tmp_path: Path, data: list[Batch], network: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Instead of one whose pictures are of something else."""
    result = evaluate(network, data, ["fgsm"], [0.0, 0.03])
    report.write_report(tmp_path, result)

    def fail(*arguments: Any, **options: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(report, "_plot_per_class", fail)
    with pytest.raises(OSError, match="No space left"):
        report.write_report(tmp_path, result)
    assert not (tmp_path / "report.md").exists()
    report.require_report_folder(tmp_path)  # the same command goes on there


def test_report(tmp_path: Path, data: list[Batch], network: nn.Module) -> None:
    image_module = pytest.importorskip("PIL.Image")
    pytest.importorskip("matplotlib")
    steps = {0.01: 3, 0.03: 6}
    one, two = (
        evaluate(model, data, ["fgsm", "pgd", "segpgd"], [0.0, 0.01, 0.03], steps=steps)
        for model in (network, Masked(network))
    )
    result = EvaluationResult.merge({"honest": one, "masked": two})
    failed = Check("more steps are not weaker", False, "0.1, 0.2")
    checks = {"honest": [Check("it is", True, "1.000"), Check("unknown", None, "none")], "masked": [failed]}
    text = report.write_report(tmp_path, result, checks, command="segadv evaluate x")
    assert not [line for line in text.splitlines() if line.endswith(" ")]
    assert (tmp_path / "report.md").read_text() == text
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "checks.csv", "curves.csv", "details.csv", "per_class.png", "report.md", "results.json", "robustness.png",
        "steps.png"
    ]  # fmt: skip
    assert (tmp_path / "checks.csv").read_text().splitlines() == [
        "arm,check,passed,finding",
        "honest,it is,True,1.000",
        "honest,unknown,,none",
        'masked,more steps are not weaker,False,"0.1, 0.2"',
    ]
    for name in re.findall(r"\]\((.*?)\)", text):
        with image_module.open(tmp_path / name) as image:
            assert len(image.convert("RGB").getcolors(1 << 24)) > 20
    assert text.count("](") == 3
    assert "FAILED gradient masking checks: masked (more steps are not weaker)" in text
    assert "| masked | more steps are not weaker | **FAIL** | 0.1, 0.2 |" in text
    assert "| honest | unknown | not checked | none |" in text
    assert "FGSM, 1 step | PGD, 6 steps" in text
    assert "| clean | eps 0.01, 3 steps | eps 0.03, 6 steps |" in text
    assert "different numbers of steps at different eps" in text
    for arm, evaluated in (("honest", one), ("masked", two)):
        at = {entry.attack: entry.row for entry in evaluated.final if entry.eps == 0.03}
        worst, accuracy = at["worst-case-miou"], at["worst-case"]["pixel_accuracy"]
        shown = f"{worst['miou']:.3f} / {worst['image_miou']:.3f} / {accuracy:.3f} |"
        assert re.search(rf"^\| {arm} \|.*{re.escape(shown)}$", text, flags=re.MULTILINE)
        assert evaluated.run["model_sha256"][:16] in text
        (pgd,) = (e.row for e in evaluated.final if (e.attack, e.eps) == ("pgd", 0.03))
        told = rf"^\| {arm} \| \d.* \| {pgd['miou']:.3f} ± {pgd['miou_error']:.3f} \|"
        assert re.search(told, text, flags=re.MULTILINE)
    worst_cases = [e for e in result.final if (e.attack, e.eps) == ("worst-case-miou", 0.03)]
    best, other = sorted(worst_cases, key=lambda entry: -entry.row["miou"])
    difference, error = results.miou_difference(other, best)
    told = f"mIoU under {plots.attack_title('worst-case-miou')}, less that of {best.arm} on the same images: "
    assert f"{told}{other.arm} {difference:.3f} ± {error:.3f}." in text
    assert "\n```bash\nsegadv evaluate x\n```\n" in text
    assert f"data SHA-256 `{one.run['data_sha256'][:16]}`; " in text
    assert EvaluationResult.from_json(tmp_path / "results.json").rows == result.rows

    for eps in ([0.0], [0.0, 0.03]):
        single = evaluate(network, data, ["fgsm"], eps)  # of one model, not merged
        text = report.write_report(tmp_path, single)
        assert re.search(rf"^\| {type(network).__name__} \| \d", text, flags=re.MULTILINE)
        assert "Gradient masking was not looked for." in text
        assert " ± " in text
        assert "less that of" not in text
        assert "```" not in text
        assert "0 steps" not in text
        assert "steps.png" not in text
        assert "different numbers of steps" not in text
        assert not (tmp_path / "steps.png").exists()
        assert not (tmp_path / "checks.csv").exists()


def test_a_report_says_of_which_models_the_checks_were(
    tmp_path: Path, data: list[Batch], network: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report, "_plot_per_class", lambda *arguments: None)
    monkeypatch.setattr(EvaluationResult, "plot", lambda *arguments: None)
    alone = evaluate(network, data, ["fgsm"], [0.0, 0.03])
    both = EvaluationResult.merge({"one": alone, "two": alone})
    passed, unknown, failed = Check("a", True, "1"), Check("b", None, "2"), Check("c", False, "3")
    for checks, told in (
        ({"one": [passed], "two": [unknown, passed]}, "No sign of gradient masking was found."),
        ({"one": [passed], "two": [unknown]}, "No sign of gradient masking was found. It was not looked for in two."),
        ({"two": [passed]}, "No sign of gradient masking was found. It was not looked for in one."),
        ({"two": [failed, passed]}, "FAILED gradient masking checks: two (c). It was not looked for in one."),
        ({"one": [unknown], "two": [unknown]}, "Gradient masking could not be looked for."),
        ({"one": []}, "Gradient masking was not looked for."),
    ):
        text = report.write_report(tmp_path, both, checks)
        assert f"\n{told}\n" in text
        assert ("## Signs of gradient masking" in text) == any(checks.values())
    name = type(network).__name__
    assert "FAILED gradient masking checks" in report.write_report(tmp_path, alone, {name: [failed]})
    with pytest.raises(ValueError, match=f"checks must be of models in the result, {name}; got mine"):
        report.write_report(tmp_path / "not made", alone, {"mine": [failed]})
    assert not (tmp_path / "not made").exists()


@pytest.mark.parametrize("attacks", [["pgd", "fgsm"], ["fgsm", "pgd"]])
def test_without_a_worst_case_the_report_shows_the_strongest_attack(
    tmp_path: Path, data: list[Batch], network: nn.Module, attacks: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report, "_plot_per_class", lambda *arguments: None)
    monkeypatch.setattr(EvaluationResult, "plot", lambda *arguments: None)
    result = evaluate(network, data, attacks, [0.0, 0.03], steps=10, worst_case=False)
    left = {entry.attack: entry.row["miou"] for entry in result.final if entry.eps}
    assert left["pgd"] < left["fgsm"]
    text = report.write_report(tmp_path, result)
    assert "pixel accuracy: PGD" in text
    assert "worst" not in text


@pytest.mark.usefixtures("drawn")
def test_each_number_of_the_headline_is_that_of_its_own_worst_case(tmp_path: Path) -> None:
    names = (("pgd", 50), ("worst-case", 40), ("worst-case-miou", 30))
    result = made(*(entry for name, right in names for entry in ((name, 0.0, 0, 90), (name, 0.03, 20, right))))
    text = report.write_report(tmp_path, result)
    assert "pixel accuracy: the worst for each image\n" in text
    assert f"| Net | {miou_of(90):.3f} / 0.090 / 0.950 | {miou_of(30):.3f} / 0.030 / 0.700 |" in text


NONE = torch.zeros(0)  # how a figure depends on the images is not asked

RUN: dict[str, Any] = {
    "model": "Net", "model_sha256": "c" * 64, "images": 2, "seed": 0, "data_sha256": "d" * 64, "backend": "native",
    "device": "cpu", "versions": {"torch": "2"},
}  # fmt: skip


def made(*measured: tuple[str, float, int, int], **changes: Any) -> EvaluationResult:
    """Of attack, eps, steps, and how many of 100 pixels of the first of two classes are right; the second's all are."""
    return EvaluationResult(
        [
            Measurement(
                "",
                attack,
                eps,
                steps,
                torch.tensor([[right, 100 - right], [0, 100]]),
                miou_of_each=torch.tensor([right / 1000]),
                without_each=NONE,
            )
            for attack, eps, steps, right in measured
        ],
        RUN | changes,
    )


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> dict[str, tuple[Any, ...]]:
    """What the pictures of a report would show."""
    found: dict[str, tuple[Any, ...]] = {}
    monkeypatch.setattr(EvaluationResult, "plot", lambda *arguments: None)
    for name in ("plot_steps", "plot_per_class"):
        monkeypatch.setattr(
            report.plots, name, lambda *given, name=name, **options: found.update({name: (*given, options)})
        )
    return found


@pytest.mark.parametrize(
    ("steps", "shown"),
    [
        ({0.01: 20, 0.04: 20}, 0.04),
        ({0.01: 20, 0.03: 20, 0.04: 20}, 0.03),
        ({0.01: 3, 0.03: 3, 0.1: 20}, 0.1),
        ({0.03: 3, 0.1: 20, 0.2: 20}, 0.1),
    ],
)
def test_pictures_show_the_usual_eps_among_those_with_most_steps(
    steps: dict[float, int], shown: float, tmp_path: Path, drawn: dict[str, tuple[Any, ...]]
) -> None:
    at = [entry for eps, count in steps.items() for entry in (("pgd", eps, 2, 50), ("pgd", eps, count, 40))]
    result = made(("pgd", 0.0, 0, 90), *at, ("fgsm", 0.0, 0, 90), *(("fgsm", eps, 1, 60) for eps in steps))
    text = report.write_report(tmp_path, result)
    assert f"## mIoU at eps {shown:g}, attack by attack" in text
    assert drawn["plot_steps"][-1] == {"eps": shown}
    assert "\n2 images. mIoU comes" in text
    assert "\n1 image. mIoU comes" in report.write_report(tmp_path, made(("pgd", 0.0, 0, 90), images=1))
    title = next(line for line in text.splitlines() if line.startswith("| trained with | clean |"))
    assert re.findall(r"\beps ([\d.]+)", title) == [f"{eps:g}" for eps in steps]


@pytest.mark.parametrize("names", [("a", "b"), ("b", "a")])
def test_the_strongest_attack_is_that_of_all_models_and_eps(
    names: tuple[str, str], tmp_path: Path, drawn: dict[str, tuple[Any, ...]]
) -> None:
    """PGD leaves less in all, though FGSM does at one eps of each model; what was left on the way does not count."""
    rights = {"a": {"fgsm": (50, 10), "pgd": (10, 40)}, "b": {"fgsm": (60, 10), "pgd": (20, 30)}}
    results = {
        name: made(
            *((attack, 0.0, 0, 90) for attack in ("pgd", "fgsm")),
            *(
                entry
                for eps, right in zip((0.03, 0.01), rights[name]["pgd"], strict=True)
                for entry in (("pgd", eps, 3, 80), ("pgd", eps, 20, right))
            ),
            *(("fgsm", eps, 1, right) for eps, right in zip((0.03, 0.01), rights[name]["fgsm"], strict=True)),
            model_sha256=name * 64,
        )
        for name in names
    }
    text = report.write_report(tmp_path, EvaluationResult.merge(results))
    assert "pixel accuracy: PGD" in text
    one, two = (
        {attack: [miou_of(right) for right in values] for attack, values in rights[name].items()} for name in names
    )
    for name, left in zip(names, (one, two), strict=True):
        row = next(line for line in text.splitlines() if line.startswith(f"| {name} |"))
        assert [float(cell.split(" / ")[0]) for cell in row.strip("| ").split(" | ")[1:]] == pytest.approx(
            [miou_of(90), *left["pgd"][::-1]], abs=5e-4
        )
        assert f"| {name} | {left['pgd'][0]:.3f} | {left['fgsm'][0]:.3f} |" in text
        assert f"| {name} | Net | `{name * 16}` |" in text
    tables = drawn["plot_per_class"][0]
    assert list(tables) == ["IoU of clean images", "IoU under attack: PGD, eps 0.03"]
    for name in names:
        assert tables["IoU of clean images"][name] == [0.9, 100 / 110]
        right = rights[name]["pgd"][0]
        assert tables["IoU under attack: PGD, eps 0.03"][name] == [right / 100, 100 / (200 - right)]


def miou_of(right: int) -> float:
    return (right / 100 + 100 / (200 - right)) / 2


def test_a_report_of_several_results_that_are_not_merged_is_refused(tmp_path: Path) -> None:
    one = made(("fgsm", 0.0, 0, 50))
    with pytest.raises(TypeError, match=r"result must be an EvaluationResult, got a dict; .*EvaluationResult.merge\("):
        report.write_report(tmp_path / "report", {"a": one, "b": one})  # type: ignore[arg-type]
    assert not (tmp_path / "report").exists()


def test_a_report_is_of_models_with_equally_many_classes(tmp_path: Path) -> None:
    one = made(("fgsm", 0.0, 0, 90))
    other = EvaluationResult([Measurement("", "fgsm", 0.0, 0, torch.eye(3, dtype=torch.int64), NONE, NONE)], RUN)
    with pytest.raises(ValueError, match=r"'a' and 'b' were evaluated .* or on different numbers of classes"):
        report.write_report(tmp_path, EvaluationResult.merge({"a": one, "b": other}))


@pytest.mark.usefixtures("drawn")
def test_steps_that_a_name_tells_are_not_told_twice(tmp_path: Path) -> None:
    result = made(*((name, 0.03, steps, 50) for name, steps in (("bim-10", 10), ("pgd", 10), ("mine10", 10))))
    assert "| trained with | BIM-10 | PGD, 10 steps | mine10, 10 steps |" in report.write_report(tmp_path, result)


@pytest.mark.parametrize("constant", [(), ("pgd-100", "worst-case")])
def test_attacks_with_as_many_steps_everywhere_do_not_hide_that_others_have_not(
    constant: tuple[str, ...], tmp_path: Path, drawn: dict[str, tuple[Any, ...]]
) -> None:
    at = [(0.0, 0), (0.01, 3), (0.2, 20)]
    same = ((name, eps, 100 if steps else 0, 50) for name in constant for eps, steps in at)
    result = made(*(("pgd", eps, steps, 60) for eps, steps in at), *same)
    text = report.write_report(tmp_path, result)
    assert "different numbers of steps at different eps" in text
    assert "## mIoU at eps 0.2, attack by attack" in text
    assert ("| clean | eps 0.01, 3 steps | eps 0.2, 20 steps |" in text) == (not constant)

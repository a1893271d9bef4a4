"""README.md and its pages: their links lead somewhere, and their Python code runs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from segadv.models import small_pspnet

ROOT = Path(__file__).parent.parent
PAGES = [f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")]
DOCUMENTS = ["README.md", "CONTRIBUTING.md", "benchmarks/README.md", *PAGES]
CODE = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)


def anchors(text: str) -> set[str]:
    """As GitHub makes them of headings."""
    headings = re.findall(r"^#+ (.*)", CODE.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", DOCUMENTS)
def test_links_lead_somewhere(name: str) -> None:
    path = ROOT / name
    text = CODE.sub("", path.read_text(encoding="utf-8"))
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", text) if not re.match(r"https?://", link)]
    for link in links:
        file, _, anchor = link.partition("#")
        target = path.parent / file if file else path
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(target.read_text(encoding="utf-8")), link


class Scenes(Dataset[tuple[torch.Tensor, torch.Tensor]]):
    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        generator = torch.Generator().manual_seed(index)
        return torch.rand(3, 32, 32, generator=generator), torch.randint(19, (32, 32), generator=generator)


SMALLER = {
    "steps=1000, crop=(512, 512)": "steps=2, crop=(32, 32), batch_size=2",
    "steps=100)": "steps=2)",
    "steps=300, restarts=5": "steps=2, restarts=2",
    "steps=20": "steps=2",
}


WITH_PYTHON = [name for name in DOCUMENTS if "```python" in (ROOT / name).read_text(encoding="utf-8")]


@pytest.mark.parametrize("name", WITH_PYTHON)
def test_python_code_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In turn, with the names that a reader has; with fewer steps."""
    for package in ("transformers", "matplotlib", "PIL"):
        pytest.importorskip(package)
    monkeypatch.chdir(tmp_path)
    model = small_pspnet(19)
    images, labels = next(iter(DataLoader(Scenes(), batch_size=4)))
    names: dict[str, Any] = {
        "model": model,
        "other": small_pspnet(19),
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.01),
        "loader": [(images, labels)],
        "val_loader": [(images, labels)],
        "images": images,
        "labels": labels,
        "dataset": Scenes(),
    }
    for language, code in CODE.findall((ROOT / name).read_text(encoding="utf-8")):
        if language != "python":
            continue
        for whole, part in SMALLER.items():
            code = code.replace(whole, part)
        exec(compile(code, name, "exec"), names)
    if name == "README.md":
        assert names["loss"].isfinite()
        assert names["adversarial"].shape == images.shape
        assert names["info"].eps.shape == (4,)
    else:
        assert list(Path("reports/mine" if "evaluation" in name else "runs/mine").iterdir())


def test_every_page_is_linked_from_the_readme() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for name in DOCUMENTS[1:]:
        assert f"]({name}" in text, name

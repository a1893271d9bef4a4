"""segadv.compat: torchvision, and what imports it, beside a torch that it was not built for. In fresh interpreters."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

# Whether it has to do something depends on the torchvision that is installed; the rest has to hold with any.
EVERYTHING = """
from segadv import compat
torchvision = compat.import_torchvision()
assert torchvision is sys.modules["torchvision"]
assert compat.import_torchvision() is torchvision
assert bool(compat._libraries) == (not torchvision.extension._has_ops())
import timm, segmentation_models_pytorch, torchmetrics
from transformers import SegformerForSemanticSegmentation, Trainer
from torchvision.models.segmentation import deeplabv3_mobilenet_v3_large
from torchvision.transforms import v2
assert torchmetrics.MeanSquaredError()(torch.zeros(2), torch.ones(2)) == 1
image = torch.arange(6.0).view(1, 2, 3)
assert torch.equal(v2.functional.horizontal_flip(image), image.flip(-1))
gc.collect()
torch.ops.torchvision.nms  # the schema is still there
"""

# Someone imported it before, in vain, and a package that needs it.
AFTER_A_FAILURE = """
failed = 0
for name in ("torchvision", "timm"):
    try:
        importlib.import_module(name)
    except RuntimeError:
        failed += 1
assert failed in (0, 2)
from segadv import compat
compat.import_torchvision()
assert bool(compat._libraries) == bool(failed)
import timm
assert timm.create_model("resnetv2_18", num_classes=0).num_features == 512
"""

OTHERS = """
from segadv import compat

def import_again(code):
    sys.modules.pop("torchvision", None)
    importlib.invalidate_caches()
    pathlib.Path("torchvision.py").write_text(code)
    return compat.import_torchvision()

sys.path.insert(0, os.getcwd())
sys.dont_write_bytecode = True

# One that works: nothing is defined.
module = import_again("answer = 42")
assert module.answer == 42 and module is sys.modules["torchvision"]
assert not compat._libraries

# One that fails for another reason: that reason, and nothing is defined.
for code, error in (("raise RuntimeError('another')", RuntimeError), ("import there_is_none", ImportError)):
    try:
        import_again(code)
        raise SystemExit("no error")
    except error as caught:
        assert "another" in str(caught) or "there_is_none" in str(caught), caught
assert not compat._libraries

# One whose schemas are missing, and which then still fails: no second attempt without end.
try:
    import_again("raise RuntimeError('operator torchvision::nms does not exist')")
    raise SystemExit("no error")
except RuntimeError as caught:
    assert "nms" in str(caught)
torch.ops.torchvision.nms, torch.ops.torchvision.qnms

# None at all.
os.remove("torchvision.py")
sys.modules["torchvision"] = None
assert compat.import_torchvision() is None
"""


@pytest.mark.parametrize(
    ("program", "needed"),
    [
        (EVERYTHING, ("torchvision", "timm", "segmentation_models_pytorch", "torchmetrics", "transformers")),
        (AFTER_A_FAILURE, ("torchvision", "timm")),
        (OTHERS, ()),
    ],
    ids=["everything", "failed-before", "others"],
)
def test_import_torchvision(program: str, needed: tuple[str, ...], tmp_path: Path) -> None:
    for name in needed:
        pytest.importorskip(name)  # a machine without a network may lack one; any other failure is one of the test
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    run = subprocess.run(
        [sys.executable, "-c", f"import gc, importlib, os, pathlib, sys, torch\n{program}"],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env=environment,
    )
    assert run.returncode == 0, run.stderr

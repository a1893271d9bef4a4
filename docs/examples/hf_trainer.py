"""Fast Newton adversarial training inside Hugging Face's Trainer: override `compute_loss`.

    pip install -c constraints.txt . transformers accelerate
    python docs/examples/hf_trainer.py

The data set gives images in [0, 1], and the model normalises them (`segadv.models.wrap`), so that the attack steps
in pixels. The attack goes around the wrapper that the Trainer puts around the model for several GPUs.
"""

from __future__ import annotations

import tempfile
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset

import segadv
from segadv.compat import import_torchvision

import_torchvision()  # not needed where torch and torchvision were built for the same device
from segformer import MEAN, STD, tiny_segformer
from transformers import Trainer, TrainingArguments


class FastNewtonTrainer(Trainer):
    """Trains on each sample either clean or, with probability `share`, moved by `segadv.fast_newton_step`."""

    loss_is_scaled_for_ga = False  # the loss is a batch's mean: under gradient accumulation the Trainer divides it

    def __init__(self, *args: Any, share: float = 0.5, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.share = share
        self.criterion = segadv.CrossEntropyLoss(ignore_index=255)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        images, labels = inputs["images"], inputs["labels"]
        if model.training:  # an evaluation is clean
            chosen = torch.rand(len(images)) < self.share
            if chosen.any():
                images = images.clone()
                images[chosen] = segadv.fast_newton_step(model, images[chosen], labels[chosen])
        logits = model(images)
        loss = self.criterion(logits, labels)
        return (loss, {"logits": logits}) if return_outputs else loss


class Colours(Dataset):
    """Smooth random images; the class of a pixel is its strongest colour."""

    def __init__(self, length: int, size: int = 64) -> None:
        generator = torch.Generator().manual_seed(0)
        self.images = F.interpolate(
            torch.rand(length, 3, 4, 4, generator=generator), size=(size, size), mode="bilinear"
        )

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        labels = self.images[index].argmax(0)
        labels[:4] = 255  # not labelled
        return {"images": self.images[index], "labels": labels}


def arguments(folder: str, **changed: Any) -> TrainingArguments:
    return TrainingArguments(
        output_dir=folder,
        remove_unused_columns=False,  # the data set's entries are compute_loss's inputs
        label_names=["labels"],
        report_to="none",
        dataloader_pin_memory=torch.cuda.is_available(),
        **changed,
    )


def main(steps: int = 40) -> list[float]:
    torch.manual_seed(0)
    model = segadv.models.wrap(tiny_segformer(num_classes=3), mean=MEAN, std=STD)
    with tempfile.TemporaryDirectory() as folder:
        settings = arguments(
            folder,
            per_device_train_batch_size=4,
            max_steps=steps,
            learning_rate=5e-3,
            logging_steps=max(1, steps // 4),
            save_strategy="no",
            disable_tqdm=True,
        )
        trainer = FastNewtonTrainer(model=model, args=settings, train_dataset=Colours(32))
        trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


if __name__ == "__main__":
    print("mean losses:", main())

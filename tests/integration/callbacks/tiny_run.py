"""A tiny classifier, its data and its report, for trying callbacks in real runs on a CPU."""

import json
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule
from ryzen_callbacks import TrainingMetricsReport
from torch.utils.data import DataLoader, IterableDataset, TensorDataset


class Tiny(LightningModule):
    """Two classes from eight numbers; remembers what a collector should have seen."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 2))
        self.batch_losses: list[float] = []
        self.gradient_norms: list[float] = []
        self.rates: list[float] = []

    def loss(self, batch: Any) -> torch.Tensor:
        x, y = batch
        return torch.nn.functional.cross_entropy(self.layers(x), y)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        loss = self.loss(batch)
        self.batch_losses.append(loss.item())
        self.log("compression_ratio", 2.5)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch))
        self.log("val_accuracy", (self.layers(batch[0]).argmax(1) == batch[1]).float().mean())

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("test_loss", self.loss(batch))

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        squares = sum(float((p.grad**2).sum()) for p in self.parameters() if p.grad is not None)
        self.gradient_norms.append(squares**0.5)
        self.rates.append(optimizer.param_groups[0]["lr"])

    def tokens_in_batch(self, batch: Any) -> int:
        return int(batch[0].numel())


class PoisonedWeights(Tiny):
    """Steps `at` set a weight to NaN, as an overflow in the optimizer would; all later losses are NaN."""

    def __init__(self, at: tuple[int, ...]) -> None:
        super().__init__()
        self.at = at
        self.weights: dict[int, torch.Tensor] = {}

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        step = self.trainer.global_step
        if step in self.at:
            with torch.no_grad():
                self.layers[0].weight[0, 0] = float("nan")
        self.weights[step] = self.layers[0].weight.detach().clone()


class Stream(IterableDataset):  # type: ignore[type-arg]
    """An endless-looking dataset without a length."""

    def __init__(self, dataset: TensorDataset) -> None:
        self.dataset = dataset

    def __iter__(self) -> Any:
        return iter([self.dataset[i] for i in range(len(self.dataset))])


def dataset(count: int = 64) -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(count, 8, generator=generator)
    return TensorDataset(x, (x.sum(1) > 0).long())


def loader(count: int = 64, stream: bool = False) -> DataLoader[Any]:
    data = dataset(count)
    return DataLoader(Stream(data) if stream else data, batch_size=4)


def read(path: Path) -> TrainingMetricsReport:
    """The collector's report at `path`."""
    return TrainingMetricsReport.model_validate(json.loads(path.read_text()))

"""Lightning over adapters: training, its checkpoints, resuming exactly, the adapter alone."""

import lightning
import pytest
import torch
from torch import nn

import aurora

pytestmark = pytest.mark.filterwarnings("ignore")  # of few workers, and of no logger
X = torch.randn(16, 6, generator=torch.Generator().manual_seed(1))
Y = X.sin().sum(1, keepdim=True)


class Fits(lightning.LightningModule):
    """A small model with adapters, as a user would write it."""

    def __init__(self, rank=2):
        super().__init__()
        self.save_hyperparameters()
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Linear(8, 1))
        aurora.inject(self.model, r"^[02]$", rank=rank, train=r"^3\.")

    def training_step(self, batch, index):
        x, y = batch
        return (self.model(x) - y).square().mean()

    def configure_optimizers(self):
        return torch.optim.AdamW(aurora.parameter_groups(self.model, lr=1e-2))


def fit(module, folder, epochs, resume=None):
    lightning.seed_everything(3)
    rows = torch.utils.data.TensorDataset(X, Y)
    trainer = lightning.Trainer(
        max_epochs=epochs, default_root_dir=folder, accelerator="cpu", logger=False,
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
    )  # fmt: skip
    trainer.fit(module, torch.utils.data.DataLoader(rows, batch_size=4), ckpt_path=resume)
    trainer.save_checkpoint(folder / "last.ckpt")
    return folder / "last.ckpt"


def test_training_moves_the_adapter_alone_and_is_loaded_from_its_checkpoint(tmp_path):
    start, module = Fits().state_dict(), Fits()
    path = fit(module, tmp_path, epochs=3)
    moved = {name for name, t in module.state_dict().items() if not torch.equal(t, start[name])}
    assert moved == {f"model.{name}" for name in aurora.adapter_state_dict(module.model)}
    again = Fits.load_from_checkpoint(path, map_location="cpu")
    assert torch.equal(again.model.eval()(X), module.model.eval()(X))
    state = torch.load(path, weights_only=True)["state_dict"]
    bare = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Linear(8, 1))
    own = {name.removeprefix("model."): t for name, t in state.items()}
    assert not bare.load_state_dict(own, strict=False).missing_keys


def test_resuming_goes_on_exactly(tmp_path):
    whole, half = Fits(), Fits()
    fit(whole, tmp_path, epochs=4)
    path = fit(half, tmp_path, epochs=2)
    resumed = Fits()
    fit(resumed, tmp_path, epochs=4, resume=path)
    assert not torch.equal(half.model[0].A, whole.model[0].A)
    for name, t in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], t), name

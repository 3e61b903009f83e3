"""transformers' Trainer, and those of TRL and sentence-transformers that build on it.

    class AdapterTrainer(AdapterCheckpoints, transformers.Trainer):
        pass

    aurora.inject(model, "all-linear", aurora.recommended(rank=2))
    optimizer = torch.optim.AdamW(aurora.parameter_groups(model, lr=5e-3))
    trainer = AdapterTrainer(model, arguments, train_dataset=data, optimizers=(optimizer, None))

`optimizers=` gives the nonlinear layers their learning rate and takes weight decay off them; with
None the Trainer makes its scheduler as ever. Without `AdapterCheckpoints` all works too, and every
checkpoint then holds the whole model. This module imports neither library.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from aurora import checkpoint, core

# What a Trainer reads, and pushes to a hub. Without a config.json beside it, `from_pretrained`
# refuses the folder, rather than drawing the base at random.
FILE = "model.safetensors"


class AdapterCheckpoints:
    """Put before a Trainer class: its checkpoints then hold the adapter alone.

    That is what `aurora.save` writes, as "model.safetensors", beside the Trainer's own files: the
    adapters and what `train=` kept. Training resumes from them exactly, `load_best_model_at_end`
    finds them, `save_model` writes nothing else, and nothing else is pushed. `aurora.load` reads
    the file into the base. A base in 4 or 8 bits, which Trainer takes for one that cannot train,
    is let through.

    Raises:
        ValueError: The model has no adapters, or checkpoints are sharded by FSDP or DeepSpeed.
    """

    def __init__(self, model: Any = None, *args: Any, **kwargs: Any) -> None:
        with _known_to_have_adapters(model):
            super().__init__(model, *args, **kwargs)  # type: ignore[call-arg]

    def _save(self: Any, output_dir: str | None = None, state_dict: Any = None) -> None:
        if state_dict is not None:
            raise ValueError(
                "FSDP and DeepSpeed gather whole models: train without AdapterCheckpoints"
            )
        folder = Path(self.args.output_dir if output_dir is None else output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        checkpoint.save(self.model, folder / FILE)
        if self.args.should_save:
            if self.processing_class is not None:
                self.processing_class.save_pretrained(folder)
            torch.save(self.args, folder / "training_args.bin")

    def _load_from_checkpoint(self: Any, resume_from_checkpoint: str, model: Any = None) -> None:
        model = self.model if model is None else model
        checkpoint.load(model, Path(resume_from_checkpoint) / FILE)

    def _load_best_model(self: Any) -> None:
        checkpoint.load(self.model, Path(self.state.best_model_checkpoint) / FILE)


@contextlib.contextmanager
def _known_to_have_adapters(model: Any) -> Iterator[None]:
    """Inside the block transformers sees that a quantised model has adapters to train."""
    if not getattr(model, "is_quantized", False) or not core.ModelView.of(model).layers:
        yield
        return
    before = model._hf_peft_config_loaded
    model._hf_peft_config_loaded = True
    try:
        yield
    finally:
        model._hf_peft_config_loaded = before


def reference(model: nn.Module) -> nn.Module:
    """The base of an adapted model as a model of its own that shares the base's tensors.

    For TRL's `ref_model=`, where None would load the base a second time:
    `DPOTrainer(model, ref_model=reference(model), ...)`. Only what `train=` kept is copied, so that
    the reference stays where training began.

    Args:
        model: A model with adapters, before DistributedDataParallel or fully_shard.

    Returns:
        A model of the base's class, in evaluation mode.

    Raises:
        ValueError: If the model has no adapters.
    """
    own = core.ModelView.adapted(model)
    moving = {id(p) for p in own.adapter().values()}
    tensors = [*model.parameters(), *model.buffers()]
    shared: dict[int, Any] = {id(t): t for t in tensors if id(t) not in moving}
    trains = [(p, p.requires_grad) for p in model.parameters()]
    copied = copy.deepcopy(model, shared)
    core.remove(copied)
    copied.requires_grad_(False)
    for p, required in trains:  # those that are shared belong to the model
        p.requires_grad_(required)
    return copied.eval()

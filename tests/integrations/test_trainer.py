"""transformers' Trainer over adapters: what it saves, resumes from, calls best, and leaves out."""

import peft
import pytest
import safetensors.torch
import torch
import transformers

import aurora
from aurora import core
from aurora.integrations.peft import AuroraPeftConfig, parameter_groups
from aurora.integrations.transformers import AdapterCheckpoints, reference

WHOLE = {"config.json", "generation_config.json"}


class AdapterTrainer(AdapterCheckpoints, transformers.Trainer):
    pass


def llama(seed=0):
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    config = transformers.LlamaConfig(
        vocab_size=32, num_attention_heads=2, pad_token_id=0, attention_dropout=0.1, **sizes
    )
    return transformers.LlamaForCausalLM(config)


def data(count=16):
    generator = torch.Generator().manual_seed(1)
    rows = torch.randint(1, 32, (count, 6), generator=generator)
    return [{"input_ids": row, "labels": row} for row in rows]


def trainer(folder, kind=AdapterTrainer, model=None, **options):
    """One over a fresh model, whose adapter has dropout, so that resuming has to restore all."""
    if model is None:
        model = llama()
        aurora.inject(model, r"(q|v)_proj", 2, train="^lm_head", dropout=0.1)
    options = {"max_steps": 6, "save_steps": 2, "logging_steps": 1, **options}
    arguments = transformers.TrainingArguments(
        str(folder), per_device_train_batch_size=4, report_to="none", use_cpu=True, **options
    )
    optimizer = torch.optim.AdamW(aurora.parameter_groups(model, lr=1e-2))
    made = kind(
        model, arguments, train_dataset=data(), eval_dataset=data(4), optimizers=(optimizer, None)
    )
    return made, model


def state(model):
    return {name: t.clone() for name, t in aurora.adapter_state_dict(model).items()}


@pytest.mark.parametrize("kind", [AdapterTrainer, transformers.Trainer])
def test_training_resumes_exactly(tmp_path, kind):
    whole, model = trainer(tmp_path / "whole", kind)
    start = state(model)
    whole.train()
    wanted = state(model)
    assert not any(torch.equal(wanted[name], start[name]) for name in start)
    half, _ = trainer(tmp_path / "half", kind)
    half.train()
    fresh, model = trainer(tmp_path / "half", kind)
    fresh.train(resume_from_checkpoint=str(tmp_path / "half" / "checkpoint-2"))
    assert fresh.state.global_step == 6
    for name, tensor in state(model).items():
        assert torch.equal(tensor, wanted[name]), name


def test_training_under_peft_resumes_exactly(tmp_path):
    """Trainer knows PEFT models by itself, and ours among them."""

    def start(folder):
        config = AuroraPeftConfig(target_modules=["q_proj", "v_proj"], dropout=0.1)
        model = peft.get_peft_model(llama(), config)
        arguments = transformers.TrainingArguments(
            str(folder),
            max_steps=6,
            save_steps=2,
            per_device_train_batch_size=4,
            report_to="none",
            use_cpu=True,
        )
        optimizer = torch.optim.AdamW(parameter_groups(model, lr=1e-2))
        made = transformers.Trainer(
            model, arguments, train_dataset=data(), optimizers=(optimizer, None)
        )
        return made, model

    whole, model = start(tmp_path / "whole")
    before = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    whole.train()
    wanted = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    assert not any(torch.equal(wanted[name], before[name]) for name in wanted)
    assert "model.safetensors" not in {
        path.name for path in (tmp_path / "whole/checkpoint-6").iterdir()
    }
    fresh, model = start(tmp_path / "whole")
    fresh.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    found = dict(model.named_parameters())
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())


def test_a_checkpoint_holds_the_adapter_alone(tmp_path):
    made, model = trainer(tmp_path)
    made.train()
    made.save_model()
    for folder in (tmp_path, tmp_path / "checkpoint-6"):
        found = {path.name for path in folder.iterdir()}
        assert "model.safetensors" in found
        assert not found & WHOLE
        saved = safetensors.torch.load_file(folder / "model.safetensors")
        assert saved.keys() == aurora.adapter_state_dict(model).keys()
        assert all(torch.equal(t, saved[n]) for n, t in aurora.adapter_state_dict(model).items())
    with pytest.raises((OSError, ValueError)):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    fresh = llama()
    aurora.load(fresh, tmp_path / "model.safetensors")
    ids = torch.arange(12).reshape(2, 6)
    assert torch.equal(fresh.eval()(ids).logits, model.eval()(ids).logits)


def test_the_best_is_loaded_at_the_end(tmp_path):
    made, model = trainer(
        tmp_path,
        eval_strategy="steps",
        eval_steps=2,
        load_best_model_at_end=True,
        learning_rate=1.0,
    )
    losses = iter([1.0, 3.0, 2.0])

    def evaluate(*args, **kwargs):
        metrics = {"eval_loss": next(losses)}
        made.control = made.callback_handler.on_evaluate(
            made.args, made.state, made.control, metrics
        )
        return metrics

    made.evaluate = evaluate
    made.train()
    assert made.state.best_model_checkpoint.endswith("checkpoint-2")
    first, last = (
        safetensors.torch.load_file(tmp_path / f"checkpoint-{step}" / "model.safetensors")
        for step in (2, 6)
    )
    assert all(torch.equal(t, first[name]) for name, t in state(model).items())
    assert not all(torch.equal(last[name], first[name]) for name in first)


def test_what_is_pushed(tmp_path, monkeypatch):
    """The folder that goes to the hub, caught on its way."""
    pushed = []

    class Hub:
        def upload_folder(self, folder_path, ignore_patterns, **kwargs):
            pushed.append({path.name for path in folder_path_of(folder_path).iterdir()})

        def __getattr__(self, name):
            return lambda *args, **kwargs: type("Repo", (), {"repo_id": "me/it"})()

    def folder_path_of(path):
        return tmp_path if str(path) == str(tmp_path) else pytest.fail(f"pushed {path}")

    monkeypatch.setattr("transformers.trainer.hf_api", Hub)
    made, _ = trainer(tmp_path, save_only_model=True)
    made.args.push_to_hub, made.hub_model_id, made.push_in_progress = True, "me/it", None
    made._save_checkpoint(made.model, None)
    assert len(pushed) == 1
    assert "model.safetensors" in pushed[0]
    assert not pushed[0] & WHOLE


def test_no_weight_decay_on_what_is_nonlinear(tmp_path):
    """The optimizer that the Trainer runs has our groups, and its scheduler moves their rates."""
    made, model = trainer(tmp_path, weight_decay=0.3)
    made.train()
    decays = {p: g["weight_decay"] for g in made.optimizer.param_groups for p in g["params"]}
    rates = {p: g["initial_lr"] for g in made.optimizer.param_groups for p in g["params"]}
    layers = core.layers(model).values()
    nonlinear = {p for layer in layers for p in layer.anl.parameters()}
    assert set(decays) == set(aurora.parameters(model))
    assert {decays[p] for p in nonlinear} == {0.0}
    assert {decays[p] for p in decays if p not in nonlinear} == {0.01}
    assert {rates[p] for p in nonlinear} == {0.1}
    assert all(g["lr"] < g["initial_lr"] for g in made.optimizer.param_groups)


def test_sharded_checkpoints_are_refused(tmp_path):
    made, _ = trainer(tmp_path)
    with pytest.raises(ValueError, match="train without AdapterCheckpoints"):
        made._save(str(tmp_path), state_dict={})


def test_the_reference_shares_the_base():
    model = llama().eval()
    ids = torch.arange(12).reshape(2, 6)
    plain = model(ids).logits
    aurora.inject(model, r"(q|v)_proj", 2, train="^lm_head")
    trains = [p.requires_grad for p in model.parameters()]
    other = reference(model)
    assert trains == [p.requires_grad for p in model.parameters()]
    assert not any(p.requires_grad for p in other.parameters())
    assert type(other) is transformers.LlamaForCausalLM
    base = dict(model.named_parameters())
    shared = {name for name, p in other.named_parameters() if p is base[name]}
    assert shared == {name for name, _ in llama().named_parameters()} - {"lm_head.weight"}
    model.train()
    with torch.no_grad():
        for p in aurora.parameters(model):
            p.add_(0.5)
    assert not other.training
    assert not torch.equal(model.eval()(ids).logits, plain)
    assert torch.equal(other(ids).logits, plain)
    with pytest.raises(ValueError, match="no AuroRA adapters"):
        reference(llama())

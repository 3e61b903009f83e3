"""sentence-transformers over adapters: saving, loading and resuming need nothing of their own."""

import datasets
import pytest
import sentence_transformers
import tokenizers
import torch
import transformers
from sentence_transformers import SentenceTransformer, losses, models
from support import disturb

import aurora
from aurora.integrations.transformers import AdapterCheckpoints

WORDS = [f"w{i}" for i in range(27)]
TEXTS = ["w1 w2 w3", "w4 w5", "w6 w7 w8 w9"]


class AdapterTrainer(AdapterCheckpoints, sentence_transformers.SentenceTransformerTrainer):
    pass


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny sentence transformer, saved as its users have theirs."""
    here = tmp_path_factory.mktemp("tiny")
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    vocabulary = {word: i for i, word in enumerate([*special, *WORDS])}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="[PAD]", unk_token="[UNK]", model_max_length=16
    )
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    config = transformers.BertConfig(
        vocab_size=32, num_attention_heads=2, max_position_embeddings=16, **sizes
    )
    torch.manual_seed(0)
    transformers.BertModel(config).save_pretrained(here / "bert")
    tokenizer.save_pretrained(here / "bert")
    backbone = models.Transformer(str(here / "bert"))
    pooling = models.Pooling(16)
    SentenceTransformer(modules=[backbone, pooling], device="cpu").save_pretrained(str(here / "st"))
    return str(here / "st")


def load(folder):
    return SentenceTransformer(folder, device="cpu")


def encode(model):
    return torch.from_numpy(model.encode(TEXTS))


def test_saved_whole_it_is_read_as_the_base(folder, tmp_path):
    model = load(folder)
    plain = encode(model)
    aurora.inject(model, r"(query|value)$", aurora.recommended(rank=2))
    assert torch.equal(encode(model), plain)
    disturb(model)
    out = encode(model)
    assert not torch.equal(out, plain)
    model.save_pretrained(str(tmp_path / "whole"))
    aurora.save(model, tmp_path / "adapter.safetensors")
    again = load(str(tmp_path / "whole"))
    assert torch.equal(encode(again), plain)
    aurora.load(again, tmp_path / "adapter.safetensors")
    assert torch.equal(encode(again), out)


def trainer(folder, output, **options):
    model = load(folder)
    torch.manual_seed(0)
    aurora.inject(model, r"(query|value)$", aurora.recommended(rank=2), dropout=0.1)
    pairs = datasets.Dataset.from_list(
        [{"anchor": f"w{i} w{i + 1}", "positive": f"w{i + 1} w{i + 2}"} for i in range(16)]
    )
    options = {"max_steps": 6, "save_steps": 2, "logging_steps": 1, **options}
    arguments = sentence_transformers.SentenceTransformerTrainingArguments(
        str(output), per_device_train_batch_size=4, report_to="none", use_cpu=True, **options
    )
    optimizer = torch.optim.AdamW(aurora.parameter_groups(model, lr=1e-2))
    made = AdapterTrainer(
        model,
        arguments,
        train_dataset=pairs,
        eval_dataset=pairs.select(range(4)),
        loss=losses.MultipleNegativesRankingLoss(model),
        optimizers=(optimizer, None),
    )
    return made, model


def state(model):
    return {name: t.clone() for name, t in aurora.adapter_state_dict(model).items()}


def test_training_resumes_exactly(folder, tmp_path):
    whole, model = trainer(folder, tmp_path / "whole")
    start = state(model)
    whole.train()
    wanted = state(model)
    assert not any(torch.equal(wanted[name], start[name]) for name in start)
    half, _ = trainer(folder, tmp_path / "half")
    half.train()
    fresh, model = trainer(folder, tmp_path / "half")
    fresh.train(resume_from_checkpoint=str(tmp_path / "half" / "checkpoint-2"))
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in state(model).items())
    assert not (tmp_path / "half" / "checkpoint-2" / "modules.json").exists()
    bare = load(folder)
    aurora.load(bare, tmp_path / "half" / "checkpoint-6" / "model.safetensors")
    assert torch.equal(encode(bare), encode(model.eval()))


def test_the_best_is_loaded_at_the_end(folder, tmp_path):
    made, model = trainer(
        folder, tmp_path, eval_strategy="steps", eval_steps=2, load_best_model_at_end=True
    )
    measured = iter([1.0, 3.0, 2.0])

    def evaluate(*args, **kwargs):
        metrics = {"eval_loss": next(measured)}
        handler = made.callback_handler
        made.control = handler.on_evaluate(made.args, made.state, made.control, metrics)
        return metrics

    made.evaluate = evaluate
    made.train()
    first, last = load(folder), load(folder)
    aurora.load(first, tmp_path / "checkpoint-2" / "model.safetensors")
    aurora.load(last, tmp_path / "checkpoint-6" / "model.safetensors")
    assert torch.equal(encode(model.eval()), encode(first))
    assert not torch.equal(encode(last), encode(first))

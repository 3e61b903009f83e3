"""Real architectures of transformers, tiny and random: what their code does with a linear layer still works."""

import pytest
import torch
import transformers
from support import disturb

import aurora
from aurora import core

IDS = torch.arange(12).reshape(2, 6)


def gpt2():
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=32, n_embd=16, n_layer=2, n_head=2)
    )


def llama():
    config = transformers.LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
    )
    return transformers.LlamaForCausalLM(config)


def t5():
    config = transformers.T5Config(
        vocab_size=32,
        d_model=16,
        d_kv=8,
        d_ff=32,
        num_layers=2,
        num_heads=2,
        decoder_start_token_id=0,
        pad_token_id=0,
    )
    return transformers.T5ForConditionalGeneration(config)


def vit():
    return transformers.ViTModel(
        transformers.ViTConfig(
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=32,
            image_size=32,
        )
    )


def whisper():
    config = transformers.WhisperConfig(
        vocab_size=32, d_model=16, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32, num_mel_bins=8, max_source_positions=20,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
    )  # fmt: skip
    return transformers.WhisperForConditionalGeneration(config)


CASES = {
    "gpt2": (gpt2, r"c_attn|c_proj|c_fc", {"input_ids": IDS}, 8),
    "llama": (llama, r"_proj$", {"input_ids": IDS}, 14),
    "t5": (t5, r"\.(q|v|wi|wo)$", {"input_ids": IDS, "labels": IDS}, 20),
    "vit": (vit, r"q_proj|v_proj|query|value", {"pixel_values": torch.randn(2, 3, 32, 32)}, 4),
    "whisper": (
        whisper,
        r"q_proj|v_proj|fc\d",
        {"input_features": torch.randn(2, 8, 40), "labels": IDS},
        20,
    ),
}


@torch.no_grad()
def outputs(model, inputs):
    """Without a graph, since with one attention picks its kernel by what requires a gradient."""
    return model(**inputs)[0]


def build(name, **options):
    make, regex, inputs, count = CASES[name]
    torch.manual_seed(0)
    model = make().eval()
    plain = outputs(model, inputs)
    done = aurora.inject(model, regex, **options)
    assert len(done.layers) == count
    return model, inputs, plain


@pytest.mark.parametrize("name", CASES)
def test_inject_train_remove(name):
    model, inputs, plain = build(name)
    assert torch.equal(outputs(model, inputs), plain)
    disturb(model)
    out = model(**inputs)[0]
    assert not torch.allclose(out, plain)
    out.square().sum().backward()
    for key, layer in core.layers(model).items():
        assert all(
            p.grad is not None and p.grad.isfinite().all()
            for p in layer.adapter_parameters().values()
        ), key
        assert layer.A.grad.abs().sum() > 0, key
    with aurora.disabled(model):
        assert torch.equal(outputs(model, inputs), plain)
    aurora.remove(model)
    assert torch.equal(outputs(model, inputs), plain)


@pytest.mark.parametrize("name", CASES)
def test_static_mode_merges_exactly(name):
    model, inputs, plain = build(name, mode="static")
    disturb(model)
    out = model(**inputs)[0]
    aurora.merge(model)
    assert not any(isinstance(m, aurora.AuroraLinear) for m in model.modules())
    torch.testing.assert_close(model(**inputs)[0], out, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(out, plain)


def test_bfloat16_base():
    torch.manual_seed(0)
    model = llama().to(torch.bfloat16)
    plain = model(input_ids=IDS).logits
    aurora.inject(model, r"_proj$")
    assert torch.equal(model(input_ids=IDS).logits, plain)
    disturb(model)
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert all(
        p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in aurora.parameters(model)
    )


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_as_the_library_switches_it_on(reentrant):
    model, inputs, _ = build("llama")
    disturb(model)
    model.train()
    model(**inputs, labels=IDS).loss.backward()
    expected = [p.grad.clone() for p in aurora.parameters(model)]
    model.zero_grad()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()  # the documented remedy: without it no gradient passes a frozen embedding
    model(**inputs, labels=IDS).loss.backward()
    for p, grad in zip(aurora.parameters(model), expected, strict=True):
        torch.testing.assert_close(p.grad, grad, rtol=1e-4, atol=1e-6)


def test_generation_with_a_cache_agrees_with_the_whole_sequence():
    model, _, _ = build("llama")
    disturb(model)
    long = model.generate(IDS[1:, :3], max_new_tokens=8, do_sample=False, pad_token_id=0)
    step_by_step = IDS[1:, :3]
    for _ in range(8):
        step_by_step = torch.cat([step_by_step, model(step_by_step).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(long, step_by_step[:, : long.shape[1]])


def test_a_tied_head_is_not_merged():
    model, inputs, _ = build("gpt2")
    aurora.inject(model, r"^lm_head$")
    before = outputs(model, inputs)
    with pytest.raises(ValueError, match=r"lm_head\.weight is tied"):
        aurora.merge(model)
    assert torch.equal(outputs(model, inputs), before)


def test_a_conv1d_merges_transposed():
    torch.manual_seed(0)
    model = torch.nn.Sequential(transformers.pytorch_utils.Conv1D(6, 4))
    aurora.inject(model, "0")
    disturb(model)
    layer = model[0]
    assert (layer.in_features, layer.out_features) == (4, 6)
    columns = torch.stack([layer.anl(layer.A[:, i]) for i in range(4)], 1)
    expected = layer.weight + (layer.scaling * layer.B @ columns).t()
    aurora.merge(model)
    torch.testing.assert_close(model[0].weight, expected)


def named(name, model, target):
    """The model with adapters "a" and "b" and, to each, the outputs."""
    found = {}
    for adapter in ("a", "b"):
        aurora.add_adapter(model, adapter, target, rank=2)
        disturb(model, scale=0.2, phase=ord(adapter))
        found[adapter] = outputs(model, logits_of(name))
    return found


def logits_of(name):
    """Inputs without labels, with which the first output would be the loss."""
    inputs = CASES[name][2]
    return {key.replace("labels", "decoder_input_ids"): value for key, value in inputs.items()}


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_rows_of_a_batch_with_adapters_of_their_own(name):
    make, target, _, _ = CASES[name]
    inputs = logits_of(name)
    torch.manual_seed(0)
    model = make().eval()
    base = outputs(model, inputs)
    alone = named(name, model, target)
    for rows in (["a", "b"], ["b", None]):
        with aurora.use(model, rows=rows):
            out = outputs(model, inputs)
        for i, adapter in enumerate(rows):
            torch.testing.assert_close(out[i], (alone | {None: base})[adapter][i])
    for adapter in ("a", "b"):
        with aurora.use(model, adapter):
            assert torch.equal(outputs(model, inputs), alone[adapter])


@torch.no_grad()
def test_generation_with_an_adapter_a_row():
    torch.manual_seed(0)
    model = llama().eval()
    named("llama", model, r"_proj$")
    ids = IDS[:1].repeat(3, 1)
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    alone = []
    for adapter in ("a", "b", None):
        with aurora.use(model, adapter):
            alone.append(model.generate(ids[:1], **options)[0])
    assert not torch.equal(alone[0], alone[2])
    with aurora.use(model, rows=["a", "b", None]):
        found = model.generate(ids, **options)
    assert all(map(torch.equal, found, alone))
    with aurora.use(model, rows=["b", "b", None, None]):  # two beams each
        model.generate(ids[:2], num_beams=2, **options)


@torch.no_grad()
def test_a_checkpoint_of_a_model_with_named_adapters_is_read_as_the_base(tmp_path):
    torch.manual_seed(0)
    model = llama().eval()
    base = outputs(model, {"input_ids": IDS})
    alone = named("llama", model, r"_proj$")
    model.save_pretrained(tmp_path)
    again = transformers.LlamaForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(outputs(again, {"input_ids": IDS}), base)
    report = aurora.load(again, tmp_path, name="b")
    assert "model.layers.0.self_attn.q_proj.aurora.a" in report.left
    assert torch.equal(outputs(again, {"input_ids": IDS}), alone["b"])

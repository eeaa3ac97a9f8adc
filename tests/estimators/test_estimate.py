"""Fishers of every kind and architecture, held against the oracle."""

import copy
import tempfile
from pathlib import Path

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file
from torch import nn
from torch.utils.checkpoint import checkpoint

from squisher_mergekit.errors import UnsupportedStateError
from squisher_mergekit.estimators.estimate import estimate_fisher
from tests.estimators import oracle

SIZE, LENGTH = 5, 7


def _ids(vocab, seed=0, size=SIZE, length=LENGTH):
    return torch.randint(3, vocab, (size, length), generator=torch.Generator().manual_seed(seed))


def _masked(ids):
    """Pad the ends of some sequences."""
    mask = torch.ones_like(ids)
    mask[0, 4:] = 0
    mask[3, 2:] = 0
    return mask


SMALL = {"hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 3, "vocab_size": 29}
LLAMA = SMALL | {"intermediate_size": 19, "num_key_value_heads": 3, "max_position_embeddings": 17}
BERT = SMALL | {"intermediate_size": 19, "max_position_embeddings": 17, "num_labels": 3}

DISTIL = {"vocab_size": 29, "dim": 12, "n_layers": 2, "n_heads": 3, "hidden_dim": 19, "num_labels": 3}
GPT2 = {"vocab_size": 29, "n_embd": 12, "n_layer": 2, "n_head": 3, "n_positions": 17}
MIXTRAL = LLAMA | {"num_local_experts": 3, "num_experts_per_tok": 2, "experts_implementation": "eager"}
T5 = {"vocab_size": 29, "d_model": 12, "d_kv": 4, "d_ff": 19, "num_layers": 2, "num_heads": 3}
BART = {"vocab_size": 29, "d_model": 12, "encoder_layers": 1, "decoder_layers": 1, "max_position_embeddings": 17}
BART |= {f"{part}_attention_heads": 3 for part in ("encoder", "decoder")}
BART |= {f"{part}_ffn_dim": 19 for part in ("encoder", "decoder")}
MAMBA = {"vocab_size": 29, "hidden_size": 12, "num_hidden_layers": 2, "state_size": 4}

# name -> task, configuration, class and settings
MODELS = {
    "bert": ("classification", tf.BertConfig, tf.BertForSequenceClassification, BERT),
    "roberta": ("classification", tf.RobertaConfig, tf.RobertaForSequenceClassification, BERT | {"pad_token_id": 1}),
    "albert": ("classification", tf.AlbertConfig, tf.AlbertForSequenceClassification, BERT | {"embedding_size": 8}),
    "distilbert": ("classification", tf.DistilBertConfig, tf.DistilBertForSequenceClassification, DISTIL),
    "bert-mlm": ("masked-lm", tf.BertConfig, tf.BertForMaskedLM, BERT),
    "gpt2": ("causal-lm", tf.GPT2Config, tf.GPT2LMHeadModel, GPT2),
    "llama": ("causal-lm", tf.LlamaConfig, tf.LlamaForCausalLM, LLAMA),
    "llama-tied": ("causal-lm", tf.LlamaConfig, tf.LlamaForCausalLM, LLAMA | {"tie_word_embeddings": True}),
    "qwen3": ("causal-lm", tf.Qwen3Config, tf.Qwen3ForCausalLM, LLAMA | {"head_dim": 4}),
    "gemma": ("causal-lm", tf.GemmaConfig, tf.GemmaForCausalLM, LLAMA | {"head_dim": 4}),
    "mistral": ("causal-lm", tf.MistralConfig, tf.MistralForCausalLM, LLAMA),
    "mixtral": ("causal-lm", tf.MixtralConfig, tf.MixtralForCausalLM, MIXTRAL),
    "phi3": ("causal-lm", tf.Phi3Config, tf.Phi3ForCausalLM, LLAMA | {"pad_token_id": 0}),
    "mamba": ("causal-lm", tf.MambaConfig, tf.MambaForCausalLM, MAMBA),
    "t5": ("seq2seq", tf.T5Config, tf.T5ForConditionalGeneration, T5 | {"decoder_start_token_id": 0}),
    "bart": ("seq2seq", tf.BartConfig, tf.BartForConditionalGeneration, BART),
}


def _model(name):
    _, config, kind, settings = MODELS[name]
    return kind(config(**settings)).double()


def _batch(task, size=SIZE):
    ids = _ids(29, size=size)
    mask = _masked(ids) if size == SIZE else torch.ones_like(ids)
    if task == "classification":
        return {"input_ids": ids, "attention_mask": mask, "labels": torch.tensor([0, 2, 1, 1, 0])[:size]}
    if task == "masked-lm":
        labels = torch.where((ids + torch.arange(LENGTH)) % 3 == 0, ids, -100)
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}
    if task == "seq2seq":
        labels = _ids(29, 1, size, 4)
        labels[1, 2:] = -100
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def _loss(task, kind):
    return oracle.classes(kind) if task == "classification" else oracle.tokens(task, kind)


def _assert_close(fisher, expected, rtol=1e-5, model=None):
    if model is not None:
        expected = _as_saved(model, expected)
    assert set(fisher) == set(expected)
    largest = max(float(tensor.max()) for tensor in expected.values())
    for name, tensor in expected.items():
        bound = max(float(tensor.max()), 1e-12 * largest) * rtol
        assert float((fisher[name].double() - tensor).abs().max()) <= bound, name


def _as_saved(model, tensors):
    """Push tensors through save_pretrained in the place of the weights."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            parameter.copy_(tensors[name])
    with tempfile.TemporaryDirectory() as folder:
        other.save_pretrained(folder)
        saved = load_file(Path(folder) / "model.safetensors")
    buffers = {name for name, _ in model.named_buffers()}
    return {name: tensor for name, tensor in saved.items() if name not in buffers}


@pytest.mark.parametrize("labels", ["true", "predicted"])
@pytest.mark.parametrize("name", MODELS)
def test_language_models_of_every_kind_match_the_oracle(name, labels):
    """Example by example, with padding, ties, shared layers and experts: within 1e-5 of the largest entry."""
    torch.manual_seed(1)
    model, task = _model(name), MODELS[name][0]
    batch = _batch(task)
    fisher = estimate_fisher(model, [batch], labels, statistic="sum")
    _assert_close(fisher, oracle.fisher(model, [batch], _loss(task, labels), "example"), model=model)


class _Twice(nn.Module):
    """One linear layer called twice, and a scale of the model's own."""

    def __init__(self):
        super().__init__()
        self.inside = nn.Linear(7, 7)
        self.scale = nn.Parameter(torch.rand(7) + 0.5)
        self.out = nn.Linear(7, 3)

    def forward(self, x):
        return self.out(self.inside(torch.tanh(self.inside(x))) * self.scale)


def _cnn(**last):
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True),
        nn.Conv2d(8, 8, 3, stride=2, groups=8, padding="valid"), nn.GroupNorm(4, 8), nn.ReLU(inplace=True),
        nn.Conv2d(8, 12, 1), nn.PReLU(12), nn.Conv2d(12, 6, 2, dilation=2, padding="same", padding_mode="circular"),
        nn.Flatten(), nn.Linear(6 * 9, 4, **last),
    )  # fmt: skip


NETS = {
    "mlp": (lambda: nn.Sequential(nn.Linear(7, 11), nn.Tanh(), nn.Linear(11, 3)), (7,), 3),
    "cnn": (_cnn, (3, 7, 7), 4),
    "conv1d": (lambda: nn.Sequential(nn.Conv1d(3, 5, 3, bias=False), nn.Flatten(), nn.Linear(25, 3)), (3, 7), 3),
    "conv3d": (lambda: nn.Sequential(nn.Conv3d(2, 3, 2), nn.Flatten(), nn.Linear(24, 3)), (2, 3, 3, 3), 3),
    "transposed": (lambda: nn.Sequential(nn.ConvTranspose1d(3, 5, 3), nn.Flatten(), nn.Linear(45, 3)), (3, 7), 3),
    "twice": (_Twice, (7,), 3),
    "sequence": (
        lambda: nn.Sequential(nn.Linear(7, 5), nn.LayerNorm(5), nn.ReLU(), nn.Flatten(), nn.Linear(15, 3)),
        (3, 7),
        3,
    ),
}


@pytest.mark.parametrize("labels", ["true", "exact", "predicted"])
@pytest.mark.parametrize("name", NETS)
def test_nets_of_every_layer_match_the_oracle(name, labels):
    """Convolutions of all kinds, norms, shared layers, parameters of a container: within 1e-5 of the largest entry."""
    torch.manual_seed(2)
    make, shape, classes = NETS[name]
    model = make().double()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2.0)
    batches = [(torch.randn(n, *shape).double(), torch.randint(classes, (n,))) for n in (5, 3)]
    fisher = estimate_fisher(model, batches, labels, statistic="sum")
    _assert_close(fisher, oracle.fisher(model, batches, oracle.classes(labels), "example"))


@pytest.mark.parametrize("name", ["mlp", "cnn", "twice"])
def test_a_joint_fisher_squares_the_sum_of_each_batch(name):
    """The square of each batch's summed gradient, added up over batches."""
    torch.manual_seed(3)
    make, shape, classes = NETS[name]
    model = make().double()
    batches = [(torch.randn(n, *shape).double(), torch.randint(classes, (n,))) for n in (5, 3)]
    fisher = estimate_fisher(model, batches, "true", "batch", statistic="sum")
    _assert_close(fisher, oracle.fisher(model, batches, oracle.classes("true"), "batch"))


def test_drawn_labels_give_the_exact_fisher_on_average():
    """Of 4000 draws the mean is within five standard errors of the expectation, in every entry."""
    torch.manual_seed(4)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    batch = (torch.randn(5, 3).double(), torch.zeros(5, dtype=torch.int64))
    exact = estimate_fisher(model, [batch], "exact")
    runs = [estimate_fisher(model, [batch], "sampled", num_samples=100, seed=seed) for seed in range(40)]
    for name in exact:
        drawn = torch.stack([run[name] for run in runs])
        error = drawn.std(0) / 40**0.5
        assert ((drawn.mean(0) - exact[name]).abs() <= 5 * error + 1e-12).all(), name


@pytest.mark.parametrize("labels", ["true", "exact"])
def test_a_regression_has_the_fisher_of_a_gaussian(labels):
    """Squared gradients of the squared error over twice the noise's variance, or their expectation."""
    torch.manual_seed(5)
    model = nn.Linear(3, 2).double()
    x, y = torch.randn(7, 3).double(), torch.randn(7, 2).double()
    fisher = estimate_fisher(model, [(x, y)], labels, task="regression", noise=0.5)
    if labels == "exact":
        expected = (x.square().mean(0) / 0.25).expand(2, 3)
    else:
        residual = (model(x) - y).detach() / 0.25
        expected = (residual.square().unsqueeze(2) * x.square().unsqueeze(1)).mean(0)
    torch.testing.assert_close(fisher["weight"], expected)


def test_neither_mode_nor_gradients_are_touched():
    """Training mode, dropout, .grad and running statistics are afterwards what they were."""
    model = nn.Sequential(nn.Linear(7, 5), nn.BatchNorm1d(5), nn.Dropout(0.5), nn.ReLU(inplace=True), nn.Linear(5, 3))
    model.train()
    model[1].eval()
    model[0].weight.grad = torch.full((5, 7), 3.0)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    estimate_fisher(model, [(torch.randn(5, 7), torch.randint(3, (5,)))])
    assert [module.training for module in model] == [True, False, True, True, True]
    assert model[3].inplace
    assert torch.equal(model[0].weight.grad, torch.full((5, 7), 3.0))
    assert model[4].weight.grad is None
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


class _Mixing(nn.Module):
    """Subtracts the mean over the batch: no example has a gradient of its own."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(7, 5), nn.Linear(5, 3)

    def forward(self, x):
        hidden = self.a(x)
        return self.b(hidden - hidden.mean(0))


class _Elsewhere(nn.Module):
    """Uses a layer's weight without calling the layer."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(7, 5), nn.Linear(5, 3)

    def forward(self, x):
        return self.b(nn.functional.linear(x, self.a.weight))


def test_examples_that_mix_are_refused():
    """Where an example's outputs depend on the others there is no gradient of it alone; the first two show it."""
    torch.manual_seed(6)
    batch = (torch.randn(5, 7), torch.randint(3, (5,)))
    with pytest.raises(UnsupportedStateError, match=r"gradients of a\.(weight|bias) .* mixes its examples"):
        estimate_fisher(_Mixing(), [batch])


def test_a_weight_used_without_its_layer_is_found():
    """A parameter that another module than its own uses is differentiated there."""
    torch.manual_seed(6)
    model = _Elsewhere().double()
    batch = (torch.randn(5, 7).double(), torch.randint(3, (5,)))
    fisher = estimate_fisher(model, [batch], statistic="sum")
    _assert_close(fisher, oracle.fisher(model, [batch], oracle.classes("true"), "example"))


def test_frozen_parameters_are_left_out():
    """Only what asks for a gradient has a Fisher, and that is what it is without freezing."""
    torch.manual_seed(7)
    model = nn.Sequential(nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    batch = (torch.randn(5, 7).double(), torch.randint(3, (5,)))
    whole = estimate_fisher(model, [batch])
    model[0].requires_grad_(False)
    part = estimate_fisher(model, [batch])
    assert set(part) == {"2.weight", "2.bias"}
    assert all(torch.equal(part[name], whole[name]) for name in part)


def test_a_vision_transformer_matches_the_oracle():
    """Class token and position embeddings, which no layer holds, included."""
    torch.manual_seed(8)
    config = tf.ViTConfig(
        hidden_size=12, num_hidden_layers=2, num_attention_heads=3, intermediate_size=19, image_size=6, patch_size=2,
        num_labels=3,
    )  # fmt: skip
    model = tf.ViTForImageClassification(config).double()
    batch = {"pixel_values": torch.randn(5, 3, 6, 6).double(), "labels": torch.tensor([0, 2, 1, 1, 0])}
    fisher = estimate_fisher(model, [batch], statistic="sum")
    _assert_close(fisher, oracle.fisher(model, [batch], oracle.classes("true"), "example"), model=model)


class _TextTower(nn.Module):
    """CLIP's text model with a classifier on top."""

    def __init__(self):
        super().__init__()
        self.tower = tf.CLIPTextModel(tf.CLIPTextConfig(**SMALL, intermediate_size=19, max_position_embeddings=17))
        self.head = nn.Linear(12, 3)

    def forward(self, ids):
        return self.head(self.tower(input_ids=ids).pooler_output)


def test_clips_text_tower_matches_the_oracle():
    """Within a model of the user's own, given pairs of inputs and labels."""
    torch.manual_seed(9)
    model = _TextTower().double()
    batch = (_ids(29), torch.tensor([0, 2, 1, 1, 0]))
    fisher = estimate_fisher(model, [batch], task="classification", statistic="sum")
    _assert_close(fisher, oracle.fisher(model, [batch], oracle.classes("true"), "example"))


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")  # peft asks transformers so
def test_of_a_lora_the_adapter_alone_has_a_fisher():
    """Names are those in adapter_model.safetensors, values the oracle's for A and B."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(10)
    lora = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model = peft.get_peft_model(_model("llama").float(), lora).double()
    batch = _batch("causal-lm")
    fisher = estimate_fisher(model, [batch], task="causal-lm", statistic="sum")
    expected = oracle.fisher(model, [batch], oracle.tokens("causal-lm", "true"), "example")
    assert fisher.config.parameters == "adapter"
    _assert_close(fisher, {name.replace(".default", ""): tensor for name, tensor in expected.items()})


def test_under_autocast_squares_are_still_float32():
    """In bfloat16 the entries are within its precision of the float32 ones, and none is lost to a narrow square."""
    torch.manual_seed(11)
    model, batch = _model("bert").float(), _batch("classification")
    exact = estimate_fisher(model, [batch])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        narrow = estimate_fisher(model, [batch], verify=False)
    for name in (
        "bert.encoder.layer.0.output.dense.weight",
        "classifier.weight",
        "bert.encoder.layer.1.output.LayerNorm.weight",
    ):
        assert narrow[name].dtype == torch.float32
        relative = (narrow[name] - exact[name]).norm() / exact[name].norm()
        assert relative < 0.05, (name, relative)


class _Checkpointed(nn.Module):
    """Forgets what is inside a block, and computes it again in the backward pass."""

    def __init__(self, forgets):
        super().__init__()
        self.forgets = forgets
        self.block = nn.Sequential(nn.Linear(7, 11), nn.Tanh(), nn.Linear(11, 7))
        self.out = nn.Linear(7, 3)

    def forward(self, x):
        hidden = checkpoint(self.block, x, use_reentrant=False) if self.forgets else self.block(x)
        return self.out(hidden)


def test_gradient_checkpointing_changes_nothing():
    """Activations that are computed again give the same entries, bit for bit."""
    torch.manual_seed(12)
    models = [_Checkpointed(True), _Checkpointed(False)]
    models[1].load_state_dict(models[0].state_dict())
    batch = (torch.randn(5, 7), torch.randint(3, (5,)))
    for labels in ("true", "exact"):
        again, whole = (estimate_fisher(model, [batch], labels) for model in models)
        assert all(torch.equal(again[name], whole[name]) for name in whole)

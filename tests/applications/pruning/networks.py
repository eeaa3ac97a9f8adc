"""Networks with units, and random Fishers of them."""

import torch
import transformers
from torch import nn

from tests.training.cases import make


def cnn(seed=0):
    """Return a CNN with BatchNorm before and after the activation, pools, a flattening to 2 x 2, and linear layers."""
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Sequential(nn.Conv2d(2, 7, 3, padding=1), nn.BatchNorm2d(7), nn.ReLU(), nn.MaxPool2d(2)),
        nn.Sequential(nn.Conv2d(7, 5, 3, bias=False), nn.ReLU(), nn.BatchNorm2d(5), nn.AvgPool2d(2)),
        nn.Flatten(), nn.Linear(20, 11), nn.BatchNorm1d(11), nn.GELU(), nn.Dropout(0.3), nn.Linear(11, 3),
    )  # fmt: skip
    for _ in range(3):  # moves the running statistics from their start
        model(torch.randn(16, 2, 12, 12) + 0.3)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
    return model.eval()


def mlp(seed=0):
    """Return a network with two hidden layers."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 13), nn.Tanh(), nn.Linear(13, 7), nn.SiLU(), nn.Linear(7, 2)).eval()


def llama_gqa():
    """Return a Llama with six key-value heads, two queries each, that are wider than the hidden size requires."""
    transformers.set_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=53, hidden_size=12, num_hidden_layers=2, num_attention_heads=12, num_key_value_heads=6, head_dim=4,
        intermediate_size=19, max_position_embeddings=17, attention_bias=True, mlp_bias=True,
    )  # fmt: skip
    return redrawn(transformers.LlamaForCausalLM(config))


def transformer(name):
    """Return a small transformer."""
    return redrawn(make(name))


def redrawn(model):
    """Draw larger weights, and biases other than 0."""
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1 or name.endswith("bias"):
            nn.init.normal_(parameter, std=0.3)
    return model.eval()


def fisher(model, seed=0):
    """Return a random Fisher with names in memory."""
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.rand(p.shape, generator=generator) ** 4 for name, p in model.named_parameters()}


def outputs(model):
    """Return the outputs of a transformer."""
    ids = torch.arange(3, 14).expand(2, -1)
    if model.config.is_encoder_decoder:
        return model(input_ids=ids, decoder_input_ids=ids).logits
    return model(input_ids=ids).logits

"""Small models with fixed weights, and what they are calibrated on, for the tests of gptq.quantize."""

import gptq
import torch
import transformers
from torch import nn

VOCABULARY = 120


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def token_ids(*shape, seed=0):
    return torch.randint(VOCABULARY, shape, generator=torch.Generator().manual_seed(seed))


def seeded(make):
    """Return make() with weights that do not depend on what ran before."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make().eval()


def gpt2(**options):
    config = {"n_embd": 32, "n_layer": 3, "n_head": 2, "n_positions": 64, "bos_token_id": 0, "eos_token_id": 0}
    settings = transformers.GPT2Config(vocab_size=VOCABULARY, initializer_range=0.2, **{**config, **options})
    return seeded(lambda: transformers.GPT2LMHeadModel(settings))


def llama():
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_key_value_heads": 2}
    settings = transformers.LlamaConfig(
        vocab_size=VOCABULARY, num_attention_heads=4, bos_token_id=0, eos_token_id=0, initializer_range=0.2, **sizes
    )
    return seeded(lambda: transformers.LlamaForCausalLM(settings))


def vit():
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    settings = transformers.ViTConfig(image_size=16, patch_size=4, num_labels=5, **sizes)
    return seeded(lambda: transformers.ViTForImageClassification(settings))


def mlp():
    return seeded(lambda: nn.Sequential(nn.Linear(32, 48), nn.GELU(), nn.Linear(48, 40), nn.GELU(), nn.Linear(40, 8)))


class Vision(nn.Module):
    """A small vision transformer over 16 patches."""

    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(3, 32, 4, stride=4)
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 2, 48, batch_first=True), 2)
        self.head = nn.Linear(32, 5)

    def forward(self, image):
        return self.head(self.encoder(self.patches(image).flatten(2).transpose(1, 2)).mean(1))


def encoder():
    return seeded(Vision)


def convnet():
    return seeded(
        lambda: nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1),
            nn.BatchNorm2d(16),
            nn.ReLU(inplace=True),
            nn.Conv2d(16, 16, 3, stride=2, padding=1, groups=2),
            nn.ReLU(inplace=True),
            nn.Conv2d(16, 24, 3),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(24, 6),
        )
    )


MODELS = {
    "gpt2": (gpt2, [token_ids(2, 40, seed=s) for s in range(4)]),
    "llama": (llama, [token_ids(2, 40, seed=s) for s in range(4)]),
    "mlp": (mlp, [random(100, 32, seed=s) for s in range(3)]),
    "encoder": (encoder, [random(8, 3, 16, 16, seed=s) for s in range(4)]),
    "convnet": (convnet, [random(4, 3, 12, 12, seed=s) for s in range(3)]),
}
QUIET = {"group_size": 16, "progress": False}
TOKENS = [token_ids(2, 40, seed=seed) for seed in range(3)]


def quantized(make=gpt2, calibration=TOKENS, **options):
    model = make()
    gptq.quantize(model, calibration, **{**QUIET, **options})
    return model


def logits(model, x):
    with torch.no_grad():
        y = model(x)
    return y if isinstance(y, torch.Tensor) else y.logits


def codes_of(model):
    return {name: m.codes() for name, m in model.named_modules() if isinstance(m, gptq.QuantizedLinear)}


def same_codes(one, other):
    a, b = codes_of(one), codes_of(other)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def agreement(one, other):
    """Return which share of its codes each layer of two models has in common, in the order of the model."""
    a, b = codes_of(one), codes_of(other)
    return torch.tensor([float((a[name] == b[name]).float().mean()) for name in a])

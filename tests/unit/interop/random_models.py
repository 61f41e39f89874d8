"""Models of transformers with random weights, saved as transformers saves them, beside a small tokenizer."""

from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
import transformers
from tokenizers import decoders, models, pre_tokenizers, trainers

VOCAB = 300
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": None,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 5000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 32,
    "beta_fast": 20.0,
}
YARN_WITH_THE_USUAL_RAMP = {key: value for key, value in YARN.items() if key != "beta_fast"}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}
GEMMA_ROPE = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 300.0},
    "full_attention": {"rope_type": "linear", "rope_theta": 40000.0, "factor": 8.0},
}
GEMMA_LOCAL_ROPE = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 300.0},
    "full_attention": {"rope_type": "default", "rope_theta": 40000.0},
}
LAYERS = ["sliding_attention", "full_attention", "sliding_attention"]
WINDOW = {"use_sliding_window": True, "sliding_window": 9, "layer_types": LAYERS}

KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama tied, as SmolLM2": ("Llama", {"tie_word_embeddings": True}),
    "llama with wide heads": ("Llama", {"head_dim": 24}),
    "llama with linear rope": ("Llama", {"rope_parameters": LINEAR}),
    "llama with llama3 rope": ("Llama", {"rope_parameters": LLAMA3}),
    "llama with yarn rope": ("Llama", {"rope_parameters": YARN}),
    "llama with yarn and the usual ramp": ("Llama", {"rope_parameters": YARN_WITH_THE_USUAL_RAMP}),
    "llama with yarn and its own amplitude": ("Llama", {"rope_parameters": YARN | {"attention_factor": 1.5}}),
    "mistral": ("Mistral", {"sliding_window": None}),
    "mistral with a window": ("Mistral", {"sliding_window": 7}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen2 with windows": ("Qwen2", WINDOW),
    "qwen2 with the upper layers sliding": (
        "Qwen2",
        {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    ),
    "qwen3": ("Qwen3", {"head_dim": 16}),
    "qwen3 with windows": ("Qwen3", {"head_dim": 16, **WINDOW}),
    "smollm3": ("SmolLM3", {"no_rope_layer_interval": 2}),
    "smollm3 with yarn": ("SmolLM3", {"no_rope_layers": [0, 1, 1], "rope_parameters": YARN}),
    "smollm3 with windows": ("SmolLM3", {"no_rope_layers": [1, 0, 1], **WINDOW}),
    "gemma3": ("Gemma3", {"head_dim": 16, "sliding_window": 8, "layer_types": LAYERS}),
    "gemma3 with two ropes": (
        "Gemma3",
        {
            "head_dim": 16,
            "query_pre_attn_scalar": 24,
            "sliding_window": 8,
            "layer_types": LAYERS,
            "rope_parameters": GEMMA_ROPE,
        },
    ),
    "gemma3 with a local rope of its own": (
        "Gemma3",
        {
            "head_dim": 16,
            "query_pre_attn_scalar": 16,
            "sliding_window": 8,
            "layer_types": LAYERS,
            "rope_parameters": GEMMA_LOCAL_ROPE,
        },
    ),
    "gemma3 of 7 layers": (
        "Gemma3",
        {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 8, "num_hidden_layers": 7},
    ),
}


def build(kind: str) -> Any:
    """A model of transformers, fp32, whose every weight counts."""
    name, changes = KINDS[kind]
    config_name = f"{name}TextConfig" if name == "Gemma3" else f"{name}Config"
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForCausalLM")(
        getattr(transformers, config_name)(**{**SIZES, **changes})
    )
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            # Gemma's norms are stored less one, the others' are not.
            mean = 1.0 if "norm" in parameter_name and name != "Gemma3" else 0.0
            parameter.normal_(mean=mean, std=0.2)
    return model.eval()


def small_tokenizer() -> tokenizers.Tokenizer:
    """Byte-level BPE of 300 tokens, the first of them end-of-text."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(
        ["the cat sat on the mat and the dog ran " * 3, "def main(): return 12"], trainer
    )
    return backend


TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def save(kind: str, directory: Path, **options: Any) -> Any:
    """Save a model and the tokenizer as transformers does; returns the model."""
    model = build(kind)
    model.save_pretrained(directory, **options)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=small_tokenizer(), eos_token="<|im_end|>", chat_template=TEMPLATE
    )
    tokenizer.save_pretrained(directory)
    return model


def random_ids(*shape: int) -> torch.Tensor:
    return torch.randint(3, VOCAB, shape, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="session", params=KINDS)
def every_kind(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """The directory and the model of each kind in turn."""
    directory = tmp_path_factory.mktemp("model")
    return directory, save(request.param, directory)

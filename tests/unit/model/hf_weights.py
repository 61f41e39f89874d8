"""Transformers' models of our shapes, with random weights, as the independent reference."""

from typing import Any

import torch
import transformers

from ryzen_llm.model import ModelConfig, Transformer


def reference_pair(architecture: str, *, seed: int = 0, **fields: Any) -> tuple[Transformer, Any]:
    """(ours, transformers') in fp32 with the same weights; `architecture` is Llama, Qwen2 or Qwen3."""
    config = ModelConfig(
        qkv_bias=architecture == "Qwen2",
        qk_norm=architecture == "Qwen3",
        max_position_embeddings=256,
        **fields,
    )
    hf_config = getattr(transformers, f"{architecture}Config")(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        intermediate_size=config.intermediate_size,
        max_position_embeddings=config.max_position_embeddings,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
        rms_norm_eps=config.rms_norm_eps,
        tie_word_embeddings=config.tie_embeddings,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    torch.manual_seed(seed)
    reference = getattr(transformers, f"{architecture}ForCausalLM")(hf_config).eval()
    with torch.no_grad():
        for name, parameter in reference.named_parameters():
            # Larger than at initialisation, norms and biases too, so that a part left out or misplaced shows.
            parameter.normal_(mean=1.0 if "norm" in name else 0.0, std=0.1)
    model = Transformer(config)
    model.load_state_dict(to_our_names(reference.state_dict(), config))
    return model.eval(), reference


def to_our_names(weights: dict[str, torch.Tensor], config: ModelConfig) -> dict[str, torch.Tensor]:
    """Weights (or gradients) of transformers under our names, the fused projections joined."""
    ours = {
        "embedding.weight": weights["model.embed_tokens.weight"],
        "norm.weight": weights["model.norm.weight"],
    }
    if not config.tie_embeddings:
        ours["head.weight"] = weights["lm_head.weight"]
    for i in range(config.num_layers):
        theirs, block = f"model.layers.{i}", f"blocks.{i}"
        for kind in ("weight", "bias") if config.qkv_bias else ("weight",):
            parts = [weights[f"{theirs}.self_attn.{x}_proj.{kind}"] for x in "qkv"]
            ours[f"{block}.attention.qkv_proj.{kind}"] = torch.cat(parts)
        gate_up = [weights[f"{theirs}.mlp.{x}_proj.weight"] for x in ("gate", "up")]
        ours[f"{block}.mlp.gate_up_proj.weight"] = torch.cat(gate_up)
        ours[f"{block}.mlp.down_proj.weight"] = weights[f"{theirs}.mlp.down_proj.weight"]
        ours[f"{block}.attention.o_proj.weight"] = weights[f"{theirs}.self_attn.o_proj.weight"]
        ours[f"{block}.attention_norm.weight"] = weights[f"{theirs}.input_layernorm.weight"]
        ours[f"{block}.mlp_norm.weight"] = weights[f"{theirs}.post_attention_layernorm.weight"]
        if config.qk_norm:
            for x in "qk":
                ours[f"{block}.attention.{x}_norm.weight"] = weights[f"{theirs}.self_attn.{x}_norm.weight"]
    return ours

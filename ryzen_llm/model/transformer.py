"""A decoder-only transformer of the Llama family (Touvron et al. 2023, arXiv:2302.13971) on a page."""

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ryzen_llm.cache import KVCache, LayerCache
from ryzen_llm.errors import InputError
from ryzen_llm.kernels import KernelChoices, Rope, Workload, document_starts, rotary_table
from ryzen_llm.model.config import ModelConfig
from ryzen_llm.model.embedding import Embedding, LinearLoss, build_embedding


class Linear(nn.Linear):
    """`kernels.linear` with a learned weight."""

    def __init__(self, in_features: int, out_features: int, bias: bool = False) -> None:
        super().__init__(in_features, out_features, bias=bias)
        self.use_kernels(KernelChoices())

    def use_kernels(self, kernels: KernelChoices) -> None:
        """Compute with these from now on."""
        self.multiply = kernels.function("linear")

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features)."""
        y: Tensor = self.multiply(x, self.weight, self.bias)
        return y


class RMSNorm(nn.Module):
    """`kernels.rms_norm` with a learned weight."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps
        self.use_kernels(KernelChoices())

    def use_kernels(self, kernels: KernelChoices) -> None:
        """Compute with these from now on."""
        self.add_norm = kernels.function("norm")

    def forward(self, x: Tensor) -> Tensor:
        """(..., size) -> (..., size)."""
        normed: Tensor = self.add_norm(x, None, self.weight, self.eps)[1]
        return normed

    def add(self, x: Tensor, added: Tensor) -> tuple[Tensor, Tensor]:
        """x + added and its norm, (..., size) all."""
        total, normed = self.add_norm(x, added, self.weight, self.eps)
        return total, normed


class Attention(nn.Module):
    """Causal grouped-query attention with rotary positions."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads = config.num_heads, config.num_kv_heads
        self.head_dim = config.head_dim
        q_size, kv_size = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        self.window = config.layer_windows[layer]
        self.rotary = layer not in config.nope_layers
        # Attention itself divides by sqrt(head_dim).
        self.query_scale = math.sqrt(config.head_dim / config.query_pre_attn_scalar)
        self.qkv_proj = Linear(config.hidden_size, q_size + 2 * kv_size, bias=config.qkv_bias)
        self.o_proj = Linear(q_size, config.hidden_size)
        self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps) if config.qk_norm else None
        self.norm_eps = config.rms_norm_eps
        self.use_kernels(KernelChoices())

    def use_kernels(self, kernels: KernelChoices) -> None:
        """Compute with these from now on."""
        self.to_qkv = kernels.function("rotary_qkv")
        self.causal_attention = kernels.function("attention")

    def forward(
        self,
        hidden_states: Tensor,
        cos: Tensor,
        sin: Tensor,
        cache: LayerCache | None,
        starts: Tensor | None = None,
    ) -> Tensor:
        """(batch, time, hidden_size) -> the same shape; `cos` and `sin` as from `rotary_table`.

        `starts` are as from `document_starts`, and without a `cache`.
        """
        if not self.rotary:  # turned by no angle
            cos, sin = torch.ones_like(cos), torch.zeros_like(sin)
        q, k, v = self.to_qkv(
            self.qkv_proj(hidden_states),
            cos,
            sin,
            None if self.q_norm is None else self.q_norm.weight,
            None if self.k_norm is None else self.k_norm.weight,
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            eps=self.norm_eps,
            query_scale=self.query_scale,
        )
        if cache is None:
            context = self.causal_attention(q, k, v, self.window, starts)
        else:
            context = cache.attend(q, k, v)
        output: Tensor = self.o_proj(context.transpose(1, 2).flatten(2))
        return output


class MLP(nn.Module):
    """Gated feed-forward network."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_up_proj = Linear(config.hidden_size, 2 * config.intermediate_size)
        self.activation_op = "swiglu" if config.activation == "silu" else "geglu"
        self.down_proj = Linear(config.intermediate_size, config.hidden_size)
        self.use_kernels(KernelChoices())

    def use_kernels(self, kernels: KernelChoices) -> None:
        """Compute with these from now on."""
        self.activation = kernels.function(self.activation_op)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(..., hidden_size) -> (..., hidden_size)."""
        output: Tensor = self.down_proj(self.activation(self.gate_up_proj(hidden_states)))
        return output


class Block(nn.Module):
    """Attention and MLP, each normalised before and added to the residual stream after."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.attention = Attention(config, layer)
        self.attention_post_norm = (
            RMSNorm(config.hidden_size, config.rms_norm_eps) if config.post_norms else None
        )
        self.mlp_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)
        self.mlp_post_norm = RMSNorm(config.hidden_size, config.rms_norm_eps) if config.post_norms else None

    def forward(
        self,
        hidden_states: Tensor,
        cos: Tensor,
        sin: Tensor,
        cache: LayerCache | None,
        starts: Tensor | None = None,
    ) -> Tensor:
        """(batch, time, hidden_size) -> (batch, time, hidden_size)."""
        attended = self.attention(self.attention_norm(hidden_states), cos, sin, cache, starts)
        if self.attention_post_norm is not None:
            attended = self.attention_post_norm(attended)
        hidden_states, normed = self.mlp_norm.add(hidden_states, attended)
        transformed = self.mlp(normed)
        if self.mlp_post_norm is not None:
            transformed = self.mlp_post_norm(transformed)
        output: Tensor = hidden_states + transformed
        return output


class Transformer(nn.Module):
    """Token ids in, next-token logits out.

    Weights start as in GPT-2: normal with deviation 0.02, the projections back into the residual stream
    divided by sqrt(2 * num_layers), drawn from torch's global generator. With `checkpoint_activations` set, a
    training step keeps each block's input only and computes the rest again in backward (Chen et al. 2016,
    arXiv:1604.06174): less memory for about a third more time. With a `document_separator`, the id that ends
    each document, no token sees another document than its own, but where there is a cache. `kernels` are the
    forms of the ops that it computes with, by rules of thumb until `KernelOptimizer` has measured them.
    """

    def __init__(self, config: ModelConfig, kernels: KernelChoices | None = None) -> None:
        super().__init__()
        self.config = config
        self.checkpoint_activations = False
        self.document_separator: int | None = None
        self.embedding = build_embedding(config)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.head = (
            None if config.tie_embeddings else nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        )
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                into_residual = name.endswith(("o_proj", "down_proj"))
                nn.init.normal_(
                    module.weight, std=0.02 / (math.sqrt(2 * config.num_layers) if into_residual else 1)
                )
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        self.use_kernels(kernels or KernelChoices())

    def use_kernels(self, kernels: KernelChoices) -> None:
        """Compute with these from now on, in this model only; blocks already compiled compile once more."""
        self.kernels = kernels
        for module in self.modules():
            if isinstance(module, Linear | RMSNorm | Attention | MLP):
                module.use_kernels(kernels)

    def workload(
        self, batch: int, time: int, bf16: bool, compiled: bool, device: torch.device | None = None
    ) -> Workload:
        """What a training step of `batch` sequences of `time` tokens gives the ops, on the model's device or
        another one.
        """
        config = self.config
        return Workload(
            device=device or self.norm.weight.device,
            dtype=torch.bfloat16 if bf16 else torch.float32,
            compiled=compiled,
            batch=batch,
            time=time,
            hidden_size=config.hidden_size,
            num_heads=config.num_heads,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            intermediate_size=config.intermediate_size,
            vocab_size=config.vocab_size,
            window=min(config.layer_windows),  # 0 where some layers see everything: they cost the most
            activation=config.activation,
            qk_norm=config.qk_norm,
        )

    def forward(self, input_ids: Tensor, cache: KVCache | None = None) -> Tensor:
        """Logits (batch, time, vocab_size) of the token after each of `input_ids` (batch, time) int64.

        With a `cache`, `input_ids` continue the tokens in it, and theirs are added. Raises InputError for
        another dtype or shape, for more tokens than max_position_embeddings, for a full cache, and for a
        cache used while gradients are recorded.
        """
        return self.logits(self.hidden_states(input_ids, cache))

    def hidden_states(self, input_ids: Tensor, cache: KVCache | None = None) -> Tensor:
        """What the output head sees, after the last norm: (batch, time, hidden_size). See `forward`."""
        self._check(input_ids, cache)
        time = input_ids.shape[1]
        if cache is None:
            separator = self.document_separator
            starts = None if separator is None else document_starts(input_ids, separator)
            return self.run_blocks(input_ids, torch.arange(time, device=input_ids.device), starts=starts)
        return self.run_blocks(input_ids, cache.append(time), cache.layers)

    def run_blocks(
        self,
        input_ids: Tensor,
        positions: Tensor,
        layers: Sequence[LayerCache] | None = None,
        ropes: tuple[Rope, Rope] | None = None,
        starts: Tensor | None = None,
    ) -> Tensor:
        """`hidden_states` of tokens at `positions`, (time,) or (batch, time) int64, without any check.

        `layers` are those of a cache that has given out `positions`, `ropes` are `rotary_tables` of them if
        those are there already. Nothing here depends on a Python number that changes from token to token, so
        the whole of it can be compiled.
        """
        return self.run_embedded(self.embedding.lookup(input_ids), positions, layers, ropes, starts)

    def rotary_tables(self, positions: Tensor) -> tuple[Rope, Rope]:
        """`rotary_table` of `positions`, for layers that see everything and for those with a window."""
        # Computed afresh, not kept in buffers: it is cheap, and `model.to(torch.bfloat16)` cannot round it.
        config = self.config
        rope = rotary_table(positions, config.head_dim, config.rope_theta, config.rope_scaling)
        if not config.local_rope_theta:
            return rope, rope
        return rope, rotary_table(positions, config.head_dim, config.local_rope_theta)

    def run_embedded(
        self,
        hidden_states: Tensor,
        positions: Tensor,
        layers: Sequence[LayerCache] | None = None,
        ropes: tuple[Rope, Rope] | None = None,
        starts: Tensor | None = None,
    ) -> Tensor:
        """`run_blocks` of tokens that have been looked up, (batch, time, hidden_size)."""
        config = self.config
        rope, local_rope = self.rotary_tables(positions) if ropes is None else ropes
        if config.scale_embeddings:  # rounded as the weights are: so Gemma was trained
            scale = torch.tensor(math.sqrt(config.hidden_size), dtype=hidden_states.dtype)
            hidden_states = hidden_states * scale
        for index, (block, window) in enumerate(zip(self.blocks, config.layer_windows, strict=True)):
            cos, sin = local_rope if window else rope
            if self.checkpoint_activations and torch.is_grad_enabled():
                hidden_states = checkpoint(block, hidden_states, cos, sin, None, starts, use_reentrant=False)
            else:
                layer = None if layers is None else layers[index]
                hidden_states = block(hidden_states, cos, sin, layer, starts)
        normed: Tensor = self.norm(hidden_states)
        return normed

    def logits(self, hidden_states: Tensor) -> Tensor:
        """The output head: (..., hidden_size) -> (..., vocab_size)."""
        return self.embedding.logits(hidden_states) if self.head is None else self.head(hidden_states)

    def loss(self, input_ids: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Mean cross-entropy of `targets` (batch, time) int64 in nats, and how many had the largest logit.

        `targets[:, t]` is the token after `input_ids[:, t]`; -100 is left out. Both are scalar tensors, the
        loss fp32, the count int64. Raises InputError as `forward` does.
        """
        self._check_targets(input_ids, targets)
        return self._loss_of(self.hidden_states(input_ids), targets)

    def evaluation_loss(self, input_ids: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """`loss` without a backward to come.

        Compiled blocks are run with gradients all the same: that graph is the one that training compiles, and
        one without would take as long again.
        """
        self._check_targets(input_ids, targets)
        with torch.set_grad_enabled(self._compiled):
            hidden_states = self.hidden_states(input_ids).detach()
        with torch.no_grad():
            return self._loss_of(hidden_states, targets)

    def _loss_of(self, hidden_states: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        loss: LinearLoss = self.kernels.function("loss", self._compiled)
        if self.head is None:
            return self.embedding.loss(hidden_states, targets, loss)
        return loss(hidden_states, self.head.weight, targets)

    def replace_embedding(self, embedding: Embedding) -> None:
        """Use `embedding` from now on; `config` says so too, so that what is saved can be built again."""
        self.embedding = embedding
        settings = embedding.settings or None
        self.config = replace(self.config, embedding=embedding.kind, embedding_settings=settings)

    def compile_blocks(self) -> None:
        """Compile in place, region by region: the blocks share one compilation, and names stay as they are.

        A copy of the model (`copy.deepcopy`, pickling) is not compiled.
        """
        for region in (*self.blocks, self.norm):
            region.compile()

    def content_hash(self) -> str:
        """SHA-256 of shape and weights, to tell whether a saved cache is of this model."""
        digest = hashlib.sha256(json.dumps(self.config.to_dict(), sort_keys=True).encode())
        for name, tensor in self.state_dict().items():
            digest.update(f"{name} {tensor.dtype}".encode())
            digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data)
        return digest.hexdigest()

    def num_parameters(self, exclude_embedding: bool = False) -> int:
        """Number of parameters, a tied embedding counted once; or of all but the embedding's."""
        excluded = set(self.embedding.parameters()) if exclude_embedding else set()
        return sum(p.numel() for p in self.parameters() if p not in excluded)

    def flops_per_token(self, context: int) -> int:
        """Floating-point operations of forward and backward per token at `context` tokens a sequence.

        6 per parameter, the output head included and the lookup not, and 12 * num_layers * num_heads *
        head_dim * context for attention, the masked half counted too, as in appendix B of PaLM (Chowdhery et
        al. 2022, arXiv:2204.02311). The optimiser and recomputation are not counted.
        """
        config = self.config
        weights = self.num_parameters(exclude_embedding=not config.tie_embeddings)
        return 6 * weights + 12 * config.num_layers * config.num_heads * config.head_dim * context

    @property
    def _compiled(self) -> bool:
        """Whether `compile_blocks` has been called."""
        return self.norm._compiled_call_impl is not None

    def _check_targets(self, input_ids: Tensor, targets: Tensor) -> None:
        if targets.shape != input_ids.shape or targets.dtype != torch.int64:
            raise InputError(
                f"targets are {tuple(targets.shape)} {targets.dtype}, expected int64 shaped like input_ids, "
                f"{tuple(input_ids.shape)}"
            )

    def _check(self, input_ids: Tensor, cache: KVCache | None) -> None:
        if input_ids.dtype != torch.int64 or input_ids.dim() != 2:
            raise InputError(
                f"input_ids are {tuple(input_ids.shape)} {input_ids.dtype}, expected (batch, time) int64"
            )
        length = input_ids.shape[1] + (0 if cache is None else cache.length)
        if not input_ids.shape[1] or length > self.config.max_position_embeddings:
            raise InputError(
                f"the sequence has {length} tokens, expected 1 to max_position_embeddings = "
                f"{self.config.max_position_embeddings}: shorten it, or use a model with a longer context"
            )
        if cache is not None and len(cache.layers) != self.config.num_layers:
            raise InputError(
                f"the cache has {len(cache.layers)} layers, the model {self.config.num_layers}: build it for "
                "this model"
            )
        if cache is not None and torch.is_grad_enabled():
            raise InputError(
                "a cache is for inference only: call under torch.inference_mode() or torch.no_grad()"
            )

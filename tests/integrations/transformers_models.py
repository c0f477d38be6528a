"""Small models of Hugging Face transformers with random parameters, and their rows of docs/integrations.md."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

VOCABULARY = 37
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 64,
}
DECODER = {
    **SIZES,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
    "initializer_range": 0.3,
}


@dataclass(frozen=True)
class Case:
    """A model class with its config's class and arguments.

    ``kind`` says what the model is differentiated by: "tokens" (embeddings), "pixels", or "pairs" (embeddings of an
    encoder-decoder) or "speech" (its features). ``default`` is the attention that transformers chooses, ``oldest`` the
    first version of transformers in which the model's attention can be chosen.
    """

    name: str
    model: str
    config: str
    arguments: dict[str, Any]
    kind: str = "tokens"
    default: str = "sdpa"
    generates: bool = True
    oldest: tuple[int, int] = (5, 0)
    note: str = ""

    def build(self, **changes: Any) -> torch.nn.Module:
        import transformers

        torch.manual_seed(0)
        config = getattr(transformers, self.config)(**self.arguments)
        for name, value in changes.items():
            setattr(config, name, value)
        return getattr(transformers, self.model)(config).eval()

    def input(self, batch: int = 2, length: int = 9) -> torch.Tensor:
        """The input that the model is differentiated by, in float64."""
        generator = torch.Generator().manual_seed(1)
        if self.kind == "pixels":
            shape: tuple[int, ...] = (batch, 3, 16, 16)
        elif self.kind == "speech":
            shape = (batch, 80, 16)
        else:
            shape = (batch, length, 32)
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    def run(self, model: torch.nn.Module, x: torch.Tensor, mask: torch.Tensor | None = None, **more: Any) -> Any:
        """The model's output at an input of ``input``."""
        if self.kind == "pixels":
            return model(pixel_values=x, **more)
        decoder = torch.arange(2, 2 + 5, device=x.device).expand(x.size(0), 5)
        if self.kind == "speech":
            return model(input_features=x, decoder_input_ids=decoder, use_cache=False, **more)
        if self.kind == "pairs":
            return model(inputs_embeds=x, attention_mask=mask, decoder_input_ids=decoder, use_cache=False, **more)
        if self.generates:
            more["use_cache"] = False
        return model(inputs_embeds=x, attention_mask=mask, **more)


CASES = (
    Case(
        "GPT-2",
        "GPT2LMHeadModel",
        "GPT2Config",
        {
            "n_embd": 32,
            "n_layer": 2,
            "n_head": 4,
            "vocab_size": VOCABULARY,
            "n_positions": 64,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": None,
            "initializer_range": 0.3,
        },
    ),
    Case("Llama", "LlamaForCausalLM", "LlamaConfig", DECODER, note="grouped heads"),
    Case("Mistral", "MistralForCausalLM", "MistralConfig", {**DECODER, "sliding_window": 4}, note="sliding window"),
    Case("Qwen 3", "Qwen3ForCausalLM", "Qwen3Config", {**DECODER, "head_dim": 8}, note="QK-norm"),
    Case("Phi", "PhiForCausalLM", "PhiConfig", {**DECODER, "partial_rotary_factor": 0.5}),
    Case(
        "Gemma 2",
        "Gemma2ForCausalLM",
        "Gemma2Config",
        {**DECODER, "head_dim": 8, "sliding_window": 4, "attn_logit_softcapping": 2.0},
        default="eager",
        note="softcap, alternating windows",
    ),
    Case(
        "gpt-oss",
        "GptOssForCausalLM",
        "GptOssConfig",
        {
            **DECODER,
            "head_dim": 8,
            "sliding_window": 4,
            "num_local_experts": 2,
            "num_experts_per_tok": 1,
            "experts_implementation": "batched_mm",
        },
        default="eager",
        note="attention sinks, alternating windows",
    ),
    Case("BERT", "BertModel", "BertConfig", {**SIZES, "initializer_range": 0.3}, generates=False),
    Case(
        "ViT",
        "ViTModel",
        "ViTConfig",
        {
            "image_size": 16,
            "patch_size": 4,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "initializer_range": 0.3,
        },
        kind="pixels",
        generates=False,
    ),
    Case(
        "T5",
        "T5ForConditionalGeneration",
        "T5Config",
        {
            "d_model": 32,
            "d_kv": 8,
            "d_ff": 48,
            "num_layers": 2,
            "num_heads": 4,
            "vocab_size": VOCABULARY,
            "dropout_rate": 0.1,
            "initializer_factor": 2.0,
            "decoder_start_token_id": 0,
            "pad_token_id": 0,
            "eos_token_id": None,
        },
        kind="pairs",
        oldest=(5, 15),
        note="position bias",
    ),
    Case(
        "Whisper",
        "WhisperForConditionalGeneration",
        "WhisperConfig",
        {
            "vocab_size": VOCABULARY,
            "d_model": 32,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "encoder_ffn_dim": 48,
            "decoder_ffn_dim": 48,
            "max_source_positions": 8,
            "max_target_positions": 32,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "decoder_start_token_id": 1,
            "begin_suppress_tokens": None,
            "init_std": 0.3,
        },
        kind="speech",
        note="cross-attention",
    ),
)

_MOE = {"num_local_experts": 2, "num_experts_per_tok": 1, "experts_implementation": "eager"}
OTHERS = (
    Case("VaultGemma", "VaultGemmaForCausalLM", "VaultGemmaConfig", {**CASES[5].arguments}, default="eager"),
    Case("Granite SWA", "GraniteSWAForCausalLM", "GraniteSWAConfig", {**DECODER, "sliding_window": 4}, default="eager"),
    Case(
        "Granite MoE SWA",
        "GraniteMoeSWAForCausalLM",
        "GraniteMoeSWAConfig",
        {**DECODER, **_MOE, "sliding_window": 4},
        default="eager",
    ),
)
"""Models that are not in the table."""


def rows() -> list[str]:
    """The rows of the table in docs/integrations.md; tests/integrations/test_transformers.py tests every cell."""
    return [row(case) for case in CASES]


def row(case: Case) -> str:
    before = "raises" if case.default == "sdpa" else "works"
    model = case.name + (f" ({case.note})" if case.note else "")
    generate = "same tokens" if case.generates else "-"
    cells = ["transformers", model, "equal", "equal", f"{before} / works", f"{before} / works", generate, "one graph"]
    return f"| {' | '.join(cells)} |"

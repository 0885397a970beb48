"""Tiny random models of the architectures that people bring, each of transformers' own class."""

from collections.abc import Callable
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

from tests.models import VOCAB_SIZE

_WIDTHS: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
_GROUPED = _WIDTHS | {"num_key_value_heads": 2}

# model_type -> the config class's name, the model class's name, what differs from the class's defaults
CAUSAL: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", _GROUPED),
    "mistral": ("MistralConfig", "MistralForCausalLM", _GROUPED | {"sliding_window": 8}),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", _GROUPED | {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", _GROUPED | {"head_dim": 8}),
    "gemma2": ("Gemma2Config", "Gemma2ForCausalLM", _GROUPED | {"head_dim": 8, "sliding_window": 8}),
    "gemma3_text": (
        "Gemma3TextConfig",
        "Gemma3ForCausalLM",
        _GROUPED | {"head_dim": 8, "sliding_window": 8, "sliding_window_pattern": 2},
    ),
    "phi": ("PhiConfig", "PhiForCausalLM", _WIDTHS),
    "phi3": ("Phi3Config", "Phi3ForCausalLM", _GROUPED),
    "gpt2": (
        "GPT2Config",
        "GPT2LMHeadModel",
        {"vocab_size": VOCAB_SIZE, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 128},
    ),
    "gpt_neox": ("GPTNeoXConfig", "GPTNeoXForCausalLM", _WIDTHS),
    "opt": ("OPTConfig", "OPTForCausalLM", _WIDTHS | {"ffn_dim": 48, "word_embed_proj_dim": 24}),
    "bloom": (
        "BloomConfig",
        "BloomForCausalLM",
        {"vocab_size": VOCAB_SIZE, "hidden_size": 32, "n_layer": 3, "n_head": 4},
    ),
    "falcon": (
        "FalconConfig",
        "FalconForCausalLM",
        {"vocab_size": VOCAB_SIZE, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4},
    ),
    "stablelm": ("StableLmConfig", "StableLmForCausalLM", _GROUPED),
    "starcoder2": ("Starcoder2Config", "Starcoder2ForCausalLM", _GROUPED),
    "olmo2": ("Olmo2Config", "Olmo2ForCausalLM", _GROUPED),
    "cohere": ("CohereConfig", "CohereForCausalLM", _GROUPED),
    "mixtral": (
        "MixtralConfig",
        "MixtralForCausalLM",
        _GROUPED | {"num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    "qwen2_moe": (
        "Qwen2MoeConfig",
        "Qwen2MoeForCausalLM",
        _GROUPED
        | {
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
            "shared_expert_intermediate_size": 24,
        },
    ),
    "qwen3_moe": (
        "Qwen3MoeConfig",
        "Qwen3MoeForCausalLM",
        _GROUPED | {"head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    ),
    "olmoe": ("OlmoeConfig", "OlmoeForCausalLM", _GROUPED | {"num_experts": 4, "num_experts_per_tok": 2}),
    "deepseek_v3": (
        "DeepseekV3Config",
        "DeepseekV3ForCausalLM",
        _WIDTHS
        | {
            "num_key_value_heads": 4,
            "moe_intermediate_size": 16,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "n_shared_experts": 1,
            "n_group": 2,
            "topk_group": 1,
            "first_k_dense_replace": 1,
            "q_lora_rank": 16,
            "kv_lora_rank": 16,
            "qk_rope_head_dim": 4,
            "qk_nope_head_dim": 8,
            "v_head_dim": 8,
        },
    ),
    "gpt_oss": (
        "GptOssConfig",
        "GptOssForCausalLM",
        _GROUPED | {"head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 8},
    ),
}
_VISION: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "patch_size": 14}
_TEXT = {key: value for key, value in _GROUPED.items() if key not in ("bos_token_id", "eos_token_id", "pad_token_id")}
CAUSAL |= {
    "llava": (
        "LlavaConfig",
        "LlavaForConditionalGeneration",
        {
            "text_config": _TEXT | {"model_type": "llama"},
            "vision_config": _VISION | {"model_type": "clip_vision_model", "num_hidden_layers": 2, "image_size": 28},
            "image_token_index": 383,
        },
    ),
    "gemma3": (
        "Gemma3Config",
        "Gemma3ForConditionalGeneration",
        {
            "text_config": _TEXT | {"head_dim": 8, "sliding_window": 8},
            "vision_config": _VISION | {"num_hidden_layers": 2, "image_size": 28},
            "mm_tokens_per_image": 4,
            "image_token_index": 383,
            "boi_token_index": 382,
            "eoi_token_index": 381,
        },
    ),
    "qwen2_5_vl": (
        "Qwen2_5_VLConfig",
        "Qwen2_5_VLForConditionalGeneration",
        {
            "text_config": _TEXT | {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2]}},
            "vision_config": {"depth": 2, "hidden_size": 32, "num_heads": 4, "intermediate_size": 48,
                              "out_hidden_size": 32, "patch_size": 14},
            "image_token_id": 383,
            "video_token_id": 382,
        },
    ),
}  # fmt: skip
_SMALL_T5: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_heads": 4,
    "decoder_start_token_id": 2, "pad_token_id": 2, "eos_token_id": 1,
}  # fmt: skip
_SMALL_BART: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE, "d_model": 32, "encoder_layers": 2, "decoder_layers": 3,
    "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48, "max_position_embeddings": 128, "pad_token_id": 2, "bos_token_id": 0,
    "eos_token_id": 1, "decoder_start_token_id": 2, "forced_eos_token_id": 1,
}  # fmt: skip
_RELATIVE: dict[str, Any] = {
    "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_biased_input": False, "type_vocab_size": 0,
}  # fmt: skip
CAUSAL |= {
    "bert": ("BertConfig", "BertForMaskedLM", _WIDTHS),
    "roberta": ("RobertaConfig", "RobertaModel", _WIDTHS),
    "distilbert": (
        "DistilBertConfig",
        "DistilBertForSequenceClassification",
        {"vocab_size": VOCAB_SIZE, "dim": 32, "hidden_dim": 48, "n_layers": 3, "n_heads": 4, "pad_token_id": 2},
    ),
    "mpnet": ("MPNetConfig", "MPNetModel", _WIDTHS),
    "modernbert": (
        "ModernBertConfig",
        "ModernBertForMaskedLM",
        _WIDTHS | {"cls_token_id": 0, "sep_token_id": 1, "local_attention": 8},
    ),
    "albert": ("AlbertConfig", "AlbertModel", _WIDTHS | {"embedding_size": 16}),
    "deberta": ("DebertaConfig", "DebertaModel", _WIDTHS | _RELATIVE),
    "deberta-v2": (
        "DebertaV2Config",
        "DebertaV2ForMaskedLM",
        _WIDTHS | _RELATIVE | {"position_buckets": 8, "share_att_key": True, "norm_rel_ebd": "layer_norm"},
    ),
    "electra": ("ElectraConfig", "ElectraModel", _WIDTHS | {"embedding_size": 16}),
    "t5": ("T5Config", "T5ForConditionalGeneration", _SMALL_T5 | {"num_layers": 2}),
    "marian": ("MarianConfig", "MarianMTModel", _SMALL_BART | {"scale_embedding": True}),
    "pegasus": ("PegasusConfig", "PegasusForConditionalGeneration", _SMALL_BART | {"scale_embedding": True}),
    "t5_encoder": ("T5Config", "T5EncoderModel", _SMALL_T5 | {"num_layers": 3}),
    "bart": (
        "BartConfig",
        "BartForConditionalGeneration",
        _SMALL_BART,
    ),
}  # fmt: skip
WHOLE = ("albert", "deberta", "deberta-v2", "t5", "t5_encoder", "marian", "pegasus", "bart")  # not run block by block
COMPUTED = ("marian", "pegasus")  # their positions are not stored
MIXTURES = ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "deepseek_v3", "gpt_oss")


def build_causal(model_type: str, *, seed: int = 0) -> PreTrainedModel:
    """A random model of that type with three blocks of width 32, in float32."""
    config_class, model_class, settings = CAUSAL[model_type]
    config = getattr(transformers, config_class)(**settings)
    build: Callable[[Any], PreTrainedModel] = getattr(transformers, model_class)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build(config).eval()

"""Tiny random models of many families, built offline: a name gives a model in float32. And a tokenizer for them."""

from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
import transformers as tf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

VOCAB_SIZE = 64
# a large spread of weights, so that logits differ enough for a wrong key to change a token
SMALL = dict(
    vocab_size=VOCAB_SIZE,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=4096,
    initializer_range=0.3,
    bos_token_id=None,
    eos_token_id=None,
    pad_token_id=0,
)
MOE = dict(num_local_experts=4, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32)

CONFIGS: dict[str, Callable[[], PretrainedConfig]] = {
    "llama": lambda: tf.LlamaConfig(**SMALL),
    "llama-mha": lambda: tf.LlamaConfig(**SMALL | {"num_key_value_heads": 4}),
    "llama-mqa": lambda: tf.LlamaConfig(**SMALL | {"num_key_value_heads": 1}),
    "llama-yarn": lambda: tf.LlamaConfig(
        **SMALL,
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    ),
    "llama-4-layers": lambda: tf.LlamaConfig(**SMALL | {"num_hidden_layers": 4}),
    "llama-heads-of-32": lambda: tf.LlamaConfig(**SMALL | {"num_hidden_layers": 4, "head_dim": 32}),
    "qwen2": lambda: tf.Qwen2Config(**SMALL),
    "qwen3": lambda: tf.Qwen3Config(**SMALL),
    "mistral": lambda: tf.MistralConfig(**SMALL, sliding_window=None),
    "mistral-sliding": lambda: tf.MistralConfig(**SMALL, sliding_window=16),
    "gemma2": lambda: tf.Gemma2Config(**SMALL, sliding_window=16),
    "gemma3": lambda: tf.Gemma3TextConfig(
        **SMALL, sliding_window=16, layer_types=["sliding_attention", "full_attention"]
    ),
    "phi3": lambda: tf.Phi3Config(**SMALL),
    "phi3-partial": lambda: tf.Phi3Config(
        **SMALL,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
    ),
    "smollm3": lambda: tf.SmolLM3Config(**SMALL, no_rope_layers=[1, 0]),
    "gpt_oss": lambda: tf.GptOssConfig(
        **SMALL | MOE, sliding_window=16, layer_types=["sliding_attention", "full_attention"]
    ),
    "cohere": lambda: tf.CohereConfig(**SMALL),
    "cohere2": lambda: tf.Cohere2Config(
        **SMALL, sliding_window=16, layer_types=["sliding_attention", "full_attention"]
    ),
    "olmo2": lambda: tf.Olmo2Config(**SMALL),
    "granite": lambda: tf.GraniteConfig(**SMALL),
    "glm4": lambda: tf.Glm4Config(**SMALL),
    "qwen3_moe": lambda: tf.Qwen3MoeConfig(**SMALL | MOE),
    "stablelm": lambda: tf.StableLmConfig(**SMALL),
    "phi": lambda: tf.PhiConfig(**SMALL),
    "hunyuan": lambda: tf.HunYuanDenseV1Config(**SMALL),
    "gpt2": lambda: tf.GPT2Config(
        vocab_size=VOCAB_SIZE,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=512,
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    ),
}


def build(config: PretrainedConfig, attention: str = "sdpa", seed: int = 0) -> PreTrainedModel:
    """A new random model in evaluation mode; the global generator is left alone."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return tf.AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()


def new_model(family: str, attention: str = "sdpa", seed: int = 0) -> PreTrainedModel:
    """A new model that the test may change."""
    return build(CONFIGS[family](), attention, seed)


@cache
def tiny_model(family: str, attention: str = "sdpa", seed: int = 0) -> PreTrainedModel:
    """A model shared by all tests of the process: leave it as it is."""
    return new_model(family, attention, seed)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def byte_llama(max_positions: int = 4096) -> PreTrainedModel:
    """A tiny random llama that reads bytes."""
    names = "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"
    return build(
        tf.LlamaConfig(
            vocab_size=256,
            **{name: SMALL[name] for name in names},
            max_position_embeddings=max_positions,
            bos_token_id=None,
            eos_token_id=None,
        )
    )


def saved_byte_llama(path: Path, max_positions: int = 4096) -> str:
    """The same with its tokenizer, saved in a folder."""
    byte_llama(max_positions).save_pretrained(path)
    byte_tokenizer().save_pretrained(path)
    return str(path)

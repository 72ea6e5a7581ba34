"""The model families of the compatibility matrix: tiny random models, each with inputs that it reads."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
import transformers as tf
from helpers import full_cache, prompt
from models import CONFIGS, MOE, SMALL, build
from transformers import DynamicCache, PretrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from deltakv_hf.longrope import guard
from deltakv_hf.support import longrope_switch

IMAGE, IMAGE_START, IMAGE_END, VIDEO = 62, 60, 63, 61
IMAGE_TOKENS = 4
# image tokens stand at the end of a prompt, where no row has padding
IMAGE_PLACE = slice(-10, -10 + IMAGE_TOKENS)
PROMPT_LENGTH = 48


@dataclass(frozen=True)
class Family:
    """One row of the table.

    Attributes:
        name: of the family, and of this test's model.
        config: makes the config.
        about: what sets its attention apart.
        attention: implementation that every mode uses unless it is about implementations.
        images: function `batch -> keyword inputs` of models that see, else None.
        model_class: of models that `AutoModelForCausalLM` does not make.
        relative: whether only the distance of positions counts.
        grows: whether a layer keeps all tokens; without one there is nothing to compress.
    """

    name: str
    config: Callable[[], PretrainedConfig]
    about: str
    attention: str = "sdpa"
    images: Callable[[int], dict] | None = None
    model_class: type[PreTrainedModel] | None = None
    relative: bool = True
    grows: bool = True

    def __hash__(self) -> int:
        return hash(self.name)

    @functools.cached_property
    def mixed(self) -> bool:
        """Whether some layers do not keep all tokens."""
        return any(type(layer) is not DynamicLayer for layer in full_cache(self.model()).layers)

    @functools.cache  # noqa: B019
    def model(self, attention: str | None = None, dtype: torch.dtype = torch.float32, noise: float = 0.0):
        """The model, shared by all tests of the process: leave it as it is. `noise` disturbs its weights."""
        attention = attention or self.attention
        if self.model_class is None:
            model = build(self.config(), attention)
        else:
            with torch.random.fork_rng():
                torch.manual_seed(0)
                model = self.model_class._from_config(self.config(), attn_implementation=attention).eval()
                _draw(model)
        with torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(1)
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=noise)
        return model.to(dtype)

    def inputs(self, lengths: list[int] | None = None, period: int | None = None) -> dict[str, torch.Tensor]:
        """Left-padded prompts of the given lengths; with a `period` the text repeats itself after so many tokens."""
        lengths = lengths or [PROMPT_LENGTH]
        longest = max(lengths)
        ids = prompt(len(lengths), longest)
        if period is not None:
            ids = ids[:, :period].repeat(1, longest // period + 1)[:, :longest].clone()
        mask = torch.stack([torch.arange(longest) >= longest - n for n in lengths]).long()
        inputs = {"attention_mask": mask}
        if self.images is not None:
            ids[:, IMAGE_PLACE.start - 1] = IMAGE_START
            ids[:, IMAGE_PLACE] = IMAGE
            inputs |= self.images(len(lengths))
            inputs |= {"token_type_ids" if self.name.startswith("gemma") else "mm_token_type_ids": (ids == IMAGE).int()}
            if self.name == "llava":
                del inputs["mm_token_type_ids"]
        return inputs | {"input_ids": ids * mask}


class KeptCache(DynamicCache):
    """The host's cache, which longrope models take for ours and do not drop: theirs would forget the first turn."""

    def note_forward(self, *args) -> None:
        """Nothing to note."""


def host_cache(model: PreTrainedModel) -> DynamicCache:
    """What a lossless cache is compared with."""
    if longrope_switch(model.config) is None:
        return full_cache(model)
    guard(model)
    return KeptCache(config=model.config)


def row_of(inputs: dict[str, torch.Tensor], row: int) -> dict[str, torch.Tensor]:
    """One row of a batch without its padding."""
    batch, columns = inputs["input_ids"].shape
    first = columns - int(inputs["attention_mask"][row].sum())
    own = {name: tensor.chunk(batch)[row] for name, tensor in inputs.items()}
    return {name: tensor[:, first:] if tensor.shape[1] == columns else tensor for name, tensor in own.items()}


def text(inputs: dict[str, torch.Tensor], ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """Inputs of a later turn: all ids so far; pictures were read in the first."""
    mask = torch.ones_like(ids)
    mask[:, : inputs["input_ids"].shape[1]] = inputs["attention_mask"]
    return {"input_ids": ids, "attention_mask": mask}


def _draw(model: PreTrainedModel) -> None:
    """Weights spread as in the text models; a projector that starts at zero would make every image the same."""
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.3)


# -- configs that the other tests have no use for ----------------------------------------------------------------------

HALF_SLIDING = dict(sliding_window=16, layer_types=["sliding_attention", "full_attention"])
VISION = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=16)
LINEAR = dict(linear_num_key_heads=2, linear_num_value_heads=2, linear_key_head_dim=8, linear_value_head_dim=8)


def longrope(switch: int) -> PretrainedConfig:
    switch = {"original_max_position_embeddings": switch}
    factors = {"short_factor": [1.0] * 4, "long_factor": [1.0, 2.0, 3.0, 4.0]}
    rope = {"rope_type": "longrope", "rope_theta": 1e4} | switch | factors
    return tf.Phi3Config(**SMALL, **switch, rope_parameters=rope)


def llama4() -> PretrainedConfig:
    types = ["chunked_attention", "full_attention"]
    moe = dict(num_local_experts=4, num_experts_per_tok=2, moe_layers=[1], intermediate_size_mlp=48)
    return tf.Llama4TextConfig(**SMALL, **moe, attention_chunk_size=16, no_rope_layers=[1, 0], layer_types=types)


def gpt_neox() -> PretrainedConfig:
    return tf.GPTNeoXConfig(**{k: v for k, v in SMALL.items() if k not in ("num_key_value_heads", "head_dim")})


def falcon() -> PretrainedConfig:
    sizes = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "initializer_range")
    return tf.FalconConfig(**{k: SMALL[k] for k in sizes}, bos_token_id=None, eos_token_id=None, pad_token_id=0)


def gemma3_vision() -> PretrainedConfig:
    own = dict(mm_tokens_per_image=IMAGE_TOKENS, image_token_index=IMAGE, boi_token_index=IMAGE_START)
    return tf.Gemma3Config(
        text_config=tf.Gemma3TextConfig(**SMALL, **HALF_SLIDING),
        vision_config=tf.SiglipVisionConfig(**VISION, patch_size=4),
        eoi_token_index=IMAGE_END,
        pad_token_id=0,
        **own,
    )


def llava() -> PretrainedConfig:
    vision = tf.CLIPVisionConfig(**VISION, patch_size=8, projection_dim=16)
    own = dict(image_token_index=IMAGE, vision_feature_layer=-1, pad_token_id=0)
    return tf.LlavaConfig(text_config=tf.LlamaConfig(**SMALL), vision_config=vision, **own)


def qwen_vision(config_class: type[PretrainedConfig], **vision) -> PretrainedConfig:
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
    vision = dict(depth=1, num_heads=2, patch_size=4, spatial_merge_size=2, temporal_patch_size=2) | vision
    return config_class(
        text_config=SMALL | {"rope_parameters": rope},
        vision_config=vision,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=IMAGE_START,
        vision_end_token_id=IMAGE_END,
        pad_token_id=0,
    )


def pictures(batch: int) -> dict[str, torch.Tensor]:
    return {"pixel_values": torch.randn(batch, 3, 16, 16, generator=torch.Generator().manual_seed(0))}


def patches(batch: int) -> dict[str, torch.Tensor]:
    """One image of 4 x 4 patches a row, merged to 2 x 2 tokens."""
    pixels = torch.randn(batch * 16, 96, generator=torch.Generator().manual_seed(0))
    return {"pixel_values": pixels, "image_grid_thw": torch.tensor([[1, 4, 4]] * batch)}


FAMILIES = [
    Family("llama", CONFIGS["llama"], "grouped queries"),
    Family("llama-mha", CONFIGS["llama-mha"], "as many key-value heads as query heads"),
    Family("llama-mqa", CONFIGS["llama-mqa"], "one key-value head"),
    Family("llama-yarn", CONFIGS["llama-yarn"], "YaRN: scaled tables"),
    Family("qwen2", CONFIGS["qwen2"], "bias on keys"),
    Family("qwen3", CONFIGS["qwen3"], "keys normalised before they are rotated"),
    Family("mistral", CONFIGS["mistral"], "no window"),
    Family("mistral-sliding", CONFIGS["mistral-sliding"], "a window in every layer", grows=False),
    Family("gemma2", CONFIGS["gemma2"], "every other layer slides, capped logits", "eager"),
    Family("gemma3", CONFIGS["gemma3"], "sliding and full layers, RoPE of their own"),
    Family("phi3", CONFIGS["phi3"], "one matrix for queries, keys and values"),
    Family("phi3-partial", CONFIGS["phi3-partial"], "half of each key is rotated"),
    Family("phi3-longrope", lambda: longrope(256), "longrope, short of its switch"),
    Family("phi3-longrope-long", lambda: longrope(9), "longrope, beyond its switch"),
    Family("smollm3", CONFIGS["smollm3"], "layers without positions"),
    Family("gpt_oss", CONFIGS["gpt_oss"], "attention sinks, sliding layers, MoE", "eager"),
    Family("cohere", CONFIGS["cohere"], "interleaved rotation"),
    Family("cohere2", CONFIGS["cohere2"], "sliding layers, full ones without positions"),
    Family("olmo2", CONFIGS["olmo2"], "norm over all heads"),
    Family("granite", CONFIGS["granite"], "scaled attention"),
    Family("glm4", CONFIGS["glm4"], "interleaved rotation of half of each key"),
    Family("qwen3_moe", CONFIGS["qwen3_moe"], "MoE"),
    Family("mixtral", lambda: tf.MixtralConfig(**SMALL | MOE), "MoE"),
    Family("stablelm", CONFIGS["stablelm"], "rotation inside the module"),
    Family("phi", CONFIGS["phi"], "rotation inside the module"),
    Family("hunyuan", CONFIGS["hunyuan"], "keys normalised after rotation"),
    Family("gpt2", CONFIGS["gpt2"], "learnt positions", relative=False),
    Family("gpt_neox", gpt_neox, "names its cache otherwise"),
    Family("falcon", falcon, "names its cache otherwise, one key-value head"),
    Family("llama4", llama4, "complex rotation, chunked layers, MoE"),
    Family("qwen3_next", lambda: tf.Qwen3NextConfig(**SMALL | MOE, **LINEAR, shared_expert_intermediate_size=32,
           layer_types=["linear_attention", "full_attention"]), "linear and full layers, MoE"),
    Family("lfm2", lambda: tf.Lfm2Config(**SMALL, layer_types=["conv", "full_attention"]),
           "convolutions and full layers"),
    Family("gemma3-vision", gemma3_vision, "images, seen in both directions", images=pictures,
           model_class=tf.Gemma3ForConditionalGeneration),
    Family("llava", llava, "images", images=pictures, model_class=tf.LlavaForConditionalGeneration),
    Family("qwen2_vl", lambda: qwen_vision(tf.Qwen2VLConfig, embed_dim=16, hidden_size=32, mlp_ratio=2),
           "images with positions in three directions", images=patches,
           model_class=tf.Qwen2VLForConditionalGeneration),
    Family("qwen2_5_vl", lambda: qwen_vision(tf.Qwen2_5_VLConfig, hidden_size=16, out_hidden_size=32,
           intermediate_size=16, window_size=16, fullatt_block_indexes=[0]),
           "images with positions in three directions", images=patches,
           model_class=tf.Qwen2_5_VLForConditionalGeneration),
]  # fmt: skip
BY_NAME = {family.name: family for family in FAMILIES}

"""The text models of CLIP and SigLIP: norms first, the last token's state led through a linear layer."""

from __future__ import annotations

import dataclasses

from torch_ext.encoder.huggingface.architecture import Architecture, HeadNames

__all__ = ["CLIP", "SIGLIP"]

CLIP = Architecture(
    base="text_model",
    layer="encoder.layers.{}",
    qkv=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    out="self_attn.out_proj",
    attention_norm="layer_norm1",
    up="mlp.fc1",
    down="mlp.fc2",
    ffn_norm="layer_norm2",
    heads={"feature-extraction": HeadNames(out="text_projection")},
    head_classes={"CLIPTextModelWithProjection": "feature-extraction", "CLIPModel": "feature-extraction"},
    word="embeddings.token_embedding",
    position="embeddings.position_embedding",
    token_type=None,
    embedding_norm=None,
    final_norm="final_layer_norm",
    # The projection has none.
    optional_biases=True,
    defaults={
        "hidden_size": 512,
        "intermediate_size": 2048,
        "num_hidden_layers": 12,
        "num_attention_heads": 8,
        "max_position_embeddings": 77,
        "hidden_act": "quick_gelu",
        "layer_norm_eps": 1e-5,
    },
    beside=("vision_model.", "visual_projection.", "logit_"),
    more=lambda config: {"norm_first": True, "embedding_norm": False, "causal": True},
)

# Its texts are padded to the longest length before the model sees them, and attend to the padding.
SIGLIP = dataclasses.replace(
    CLIP,
    heads={"feature-extraction": HeadNames(out="{base}.head")},
    head_classes={"SiglipTextModel": "feature-extraction", "SiglipModel": "feature-extraction"}
    | {"Siglip2TextModel": "feature-extraction", "Siglip2Model": "feature-extraction"},
    defaults={
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "max_position_embeddings": 64,
        "hidden_act": "gelu_pytorch_tanh",
        "layer_norm_eps": 1e-6,
    },
    spare=("head.weight", "head.bias"),
    more=lambda config: {"norm_first": True, "embedding_norm": False},
)

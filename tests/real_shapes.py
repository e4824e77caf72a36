"""config.json of real models, as their releases have them (only what decides shapes)."""

QWEN2_VL = {
    "2b": {
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "vocab_size": 151936,
    },
    "7b": {
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152064,
    },
    "72b": {
        "hidden_size": 8192,
        "intermediate_size": 29568,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "vocab_size": 152064,
    },
}


def qwen2_vl(size: str) -> dict:
    """config.json of Qwen2-VL as a mapping."""
    text = QWEN2_VL[size]
    return {
        "model_type": "qwen2_vl",
        "tie_word_embeddings": size == "2b",
        "text_config": text,
        "vision_config": {
            "depth": 32,
            "embed_dim": 1280,
            "hidden_size": text["hidden_size"],
            "mlp_ratio": 4,
            "num_heads": 16,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
        },
    }

"""The ways in which real config.json files say how keys are rotated, odd ones too."""

from __future__ import annotations

from typing import Any

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip
LINEAR = {"rope_type": "linear", "factor": 2.0}
PLAIN = {"rope_type": "default", "rope_theta": 77.0}
FULL, SLIDING = "full_attention", "sliding_attention"

SPELLINGS: dict[str, dict[str, Any]] = {
    "silent": {},
    "transformers 5": {"rope_parameters": PLAIN},
    "transformers 4": {"rope_theta": 77.0, "rope_scaling": None},
    "both, of one mind": {"rope_parameters": PLAIN, "rope_theta": 77.0},
    "both, scaled twice": {
        "rope_parameters": {**LINEAR, "rope_theta": 77.0}, "rope_scaling": {**LINEAR, "factor": 4.0},
    },
    "a type next to a plain section": {"rope_parameters": PLAIN, "rope_scaling": {"type": "linear", "factor": 4.0}},
    "yarn next to a plain section": {"rope_parameters": PLAIN, "rope_scaling": YARN, "rope_theta": 55.0},
    "base in the old section": {"rope_scaling": {**YARN, "rope_theta": 99.0}, "rope_theta": 55.0},
    "base outside the new section": {"rope_parameters": LINEAR, "rope_theta": 55.0},
    "type in the new section": {"rope_parameters": {"type": "linear", "factor": 2.0, "rope_theta": 55.0}},
    "two types": {"rope_scaling": {"type": "linear", "rope_type": "default", "factor": 2.0}, "rope_theta": 55.0},
    "llama3": {"rope_theta": 500.0, "rope_scaling": LLAMA3},
    "yarn": {"rope_parameters": {**YARN, "rope_theta": 500.0}},
    "yarn without its length": {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 500.0}},
    "length outside": {"rope_parameters": {**YARN, "rope_theta": 5e2}, "original_max_position_embeddings": 8},
    "length outside, old": {"rope_scaling": YARN, "rope_theta": 5e2, "original_max_position_embeddings": 32},
    "yarn with magnitudes": {
        "rope_parameters": {**YARN, "rope_theta": 5e2, "mscale": 1.0, "mscale_all_dim": 0.7, "beta_fast": 16},
    },
    "yarn not truncated": {"rope_parameters": {**YARN, "rope_theta": 5e2, "truncate": False}},
    "yarn by its lengths": {"rope_parameters": {**YARN, "rope_theta": 5e2, "factor": None}},
    "yarn with its factor": {"rope_parameters": {**YARN, "rope_theta": 5e2, "attention_factor": 0.9}},
    "dynamic": {"rope_scaling": {"type": "dynamic", "factor": 2.0}, "rope_theta": 5e2},
    "longrope": {
        "rope_parameters": {
            "rope_type": "longrope", "short_factor": [1.1] * 8, "long_factor": [3.0] * 8, "factor": 4.0,
            "original_max_position_embeddings": 16, "rope_theta": 5e2,
        },
    },
    "longrope by its first name": {
        "rope_scaling": {"type": "su", "short_factor": [1.1] * 8, "long_factor": [3.0] * 8}, "rope_theta": 5e2,
        "original_max_position_embeddings": 16,
    },
    "proportional": {
        "rope_parameters": {"rope_type": "proportional", "rope_theta": 5e2, "partial_rotary_factor": 0.5},
    },
    "share outside": {"partial_rotary_factor": 0.25, "rope_theta": 5e2},
    "share inside": {"rope_parameters": {**PLAIN, "partial_rotary_factor": 0.25}},
    "share inside and outside": {
        "rope_parameters": {**PLAIN, "partial_rotary_factor": 0.25}, "partial_rotary_factor": 0.75,
    },
    "share of an old section": {"rope_scaling": LINEAR, "partial_rotary_factor": 0.25, "rope_theta": 5e2},
    "share of null": {"partial_rotary_factor": None, "rope_theta": 5e2},
    "odd share": {"partial_rotary_factor": 0.2, "rotary_pct": 0.2, "rope_theta": 5e2},
    "GPT-NeoX's words": {"rotary_pct": 0.75, "rotary_emb_base": 300, "rope_theta": 70.0, "partial_rotary_factor": 0.5},
    "empty old section": {"rope_scaling": {}, "rope_parameters": {**LINEAR, "rope_theta": 5e2}},
    "empty new section": {"rope_parameters": {}, "rope_theta": 55.0},
    "by type of layer": {
        "rope_parameters": {
            FULL: {**LINEAR, "rope_theta": 5e2, "partial_rotary_factor": 0.5}, SLIDING: {**PLAIN, "rope_theta": 7.0},
        },
    },
    "by type of layer, scaled apart": {
        "rope_parameters": {FULL: PLAIN, SLIDING: {**PLAIN, "rope_theta": 7.0}}, "rope_scaling": LINEAR,
    },
    "by type of layer, one silent": {"rope_parameters": {FULL: {**LINEAR, "rope_theta": 3.0}}},
    "Gemma 3's words": {"rope_theta": 5e2, "rope_local_base_freq": 50.0, "rope_scaling": {**LINEAR, "factor": 8.0}},
    "unknown type": {"rope_scaling": {"rope_type": "mine", "factor": 1.0}, "rope_theta": 5e2},
}  # fmt: skip

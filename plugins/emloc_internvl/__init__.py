"""The InternVL family in the native layout of transformers: a vision tower, and a language model of another family.

The projector between them is small, and everything that the language model sees passes through it: it stays dense.
"""

from emloc_core.family import TINY, Family, Tower
from emloc_core.hookspecs import hookimpl
from emloc_core.layout import Layout
from emloc_internvl.chat_layout import INTERNVL_CHAT
from emloc_internvl.internlm2 import INTERNLM2

INTERNVL = Family(
    name="internvl",
    model_types=frozenset({"internvl"}),
    auto_class="AutoModelForImageTextToText",
    modality="image-text",
    towers=[
        Tower(
            name="vision",
            blocks="model.vision_tower.encoder.layer",
            input_groups=[
                ["attention.q_proj", "attention.k_proj", "attention.v_proj"],
                ["attention.projection_layer"],
                ["mlp.fc1"],
                ["mlp.fc2"],
            ],
        ),
    ],
    keep_dense={
        "model.multi_modal_projector.*": "small, and everything that is seen passes through it",
    },
    nested={"text_config": "model.language_model"},
    tiny_configs=[
        {
            "model_type": "internvl",
            "image_token_id": 127,
            "image_seq_length": 4,
            "vision_config": {
                "hidden_size": 32,
                "intermediate_size": 64,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "image_size": [8, 8],
                "patch_size": [2, 2],
            },
            "tie_word_embeddings": tied,
            "text_config": {"model_type": text_type, **TINY, "num_hidden_layers": 2, "head_dim": 8},
        }
        for text_type, tied in (("qwen2", True), ("qwen3", True), ("llama", False))
    ],
)


@hookimpl
def emloc_families() -> list[Family]:
    """Declare the family."""
    return [INTERNVL]


@hookimpl
def emloc_layouts() -> list[Layout]:
    """Declare the layouts that the models were published in."""
    return [INTERNVL_CHAT, INTERNLM2]

"""Models in the layouts that InternVL and InternLM2 are published in, reimplemented in plain torch, and their files."""

import json

import torch
from safetensors.torch import save_file
from sentencepiece.sentencepiece_model_pb2 import ModelProto, NormalizerSpec, TrainerSpec
from support.models import tiny_tokenizer
from torch import nn
from torch.nn import functional as F  # noqa: N812
from transformers import AutoConfig, AutoModelForCausalLM

IMAGE_TOKENS = ["<|im_start|>", "<|im_end|>", "<img>", "</img>", "<IMG_CONTEXT>"]


class RMSNorm(nn.Module):
    def __init__(self, size, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x):
        return self.weight * x / (x.square().mean(-1, keepdim=True) + self.eps).sqrt()


def attend(q, k, v, *, causal):
    """Softmax attention of (batch, heads, tokens, size)."""
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    if causal:
        scores = scores.masked_fill(torch.ones_like(scores[0, 0], dtype=torch.bool).triu(1), -torch.inf)
    return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)


class VitAttention(nn.Module):
    def __init__(self, c):
        super().__init__()
        size = c["hidden_size"]
        self.heads = c["num_attention_heads"]
        self.qkv = nn.Linear(size, 3 * size, bias=c["qkv_bias"])
        self.proj = nn.Linear(size, size)
        if c["qk_normalization"]:
            self.q_norm, self.k_norm = RMSNorm(size, c["layer_norm_eps"]), RMSNorm(size, c["layer_norm_eps"])

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, -1)
        if hasattr(self, "q_norm"):
            q, k = self.q_norm(q), self.k_norm(k)
        return self.proj(attend(*(t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (q, k, v)), causal=False))


class VitLayer(nn.Module):
    def __init__(self, c):
        super().__init__()
        size = c["hidden_size"]
        norm = RMSNorm if c["norm_type"] == "rms_norm" else nn.LayerNorm
        self.attn = VitAttention(c)
        self.mlp = nn.ModuleDict(
            {"fc1": nn.Linear(size, c["intermediate_size"]), "fc2": nn.Linear(c["intermediate_size"], size)}
        )
        self.norm1, self.norm2 = norm(size, eps=c["layer_norm_eps"]), norm(size, eps=c["layer_norm_eps"])
        self.ls1, self.ls2 = nn.Parameter(torch.ones(size)), nn.Parameter(torch.ones(size))

    def forward(self, x):
        x = x + self.attn(self.norm1(x)) * self.ls1
        return x + self.mlp["fc2"](F.gelu(self.mlp["fc1"](self.norm2(x)))) * self.ls2


class Vit(nn.Module):
    def __init__(self, c):
        super().__init__()
        size, patches = c["hidden_size"], (c["image_size"] // c["patch_size"]) ** 2
        self.embeddings = nn.Module()
        self.embeddings.class_embedding = nn.Parameter(torch.zeros(1, 1, size))
        self.embeddings.position_embedding = nn.Parameter(torch.zeros(1, patches + 1, size))
        self.embeddings.patch_embedding = nn.Conv2d(3, size, c["patch_size"], c["patch_size"])
        self.encoder = nn.Module()
        self.encoder.layers = nn.ModuleList(VitLayer(c) for _ in range(c["num_hidden_layers"]))

    def forward(self, pixels):
        """Return the hidden states before the first layer and after every layer."""
        patches = self.embeddings.patch_embedding(pixels).flatten(2).transpose(1, 2)
        x = torch.cat([self.embeddings.class_embedding.expand(len(pixels), -1, -1), patches], 1)
        states = [x + self.embeddings.position_embedding]
        for layer in self.encoder.layers:
            states.append(layer(states[-1]))
        return states


class InternLM2Attention(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.groups, self.shared = c["num_key_value_heads"], c["num_attention_heads"] // c["num_key_value_heads"]
        size, self.size = c["hidden_size"], c["hidden_size"] // c["num_attention_heads"]
        self.wqkv = nn.Linear(size, self.groups * (self.shared + 2) * self.size, bias=c["bias"])
        self.wo = nn.Linear(size, size, bias=c["bias"])
        self.c = c

    def forward(self, x):
        tokens = x.shape[1]
        heads = []  # of queries, with the key and the value that each uses
        for block in self.wqkv(x).split((self.shared + 2) * self.size, -1):  # a key/value head's
            *queries, key, value = block.split(self.size, -1)
            heads += [(query, key, value) for query in queries]
        q, k, v = (torch.stack(list(part), 1) for part in zip(*heads, strict=True))
        cos, sin = self.rotary(tokens)
        q, k = (t * cos + torch.cat([-t[..., self.size // 2 :], t[..., : self.size // 2]], -1) * sin for t in (q, k))
        return self.wo(attend(q, k, v, causal=True))

    def rotary(self, tokens):
        base, limit = self.c["rope_theta"], self.c["max_position_embeddings"]
        scaling = self.c["rope_scaling"]
        if scaling and tokens > limit:  # dynamic NTK
            factor = scaling["factor"]
            base *= (factor * tokens / limit - factor + 1) ** (self.size / (self.size - 2))
        angles = torch.arange(tokens)[:, None] * base ** (-torch.arange(0, self.size, 2) / self.size)
        return angles.cos().repeat(1, 2), angles.sin().repeat(1, 2)


class InternLM2Layer(nn.Module):
    def __init__(self, c):
        super().__init__()
        size, wide = c["hidden_size"], c["intermediate_size"]
        self.attention = InternLM2Attention(c)
        shapes = {"w1": (size, wide), "w2": (wide, size), "w3": (size, wide)}
        self.feed_forward = nn.ModuleDict({name: nn.Linear(*shape, bias=False) for name, shape in shapes.items()})
        self.attention_norm, self.ffn_norm = RMSNorm(size, c["rms_norm_eps"]), RMSNorm(size, c["rms_norm_eps"])

    def forward(self, x):
        x = x + self.attention(self.attention_norm(x))
        w, normed = self.feed_forward, self.ffn_norm(x)
        return x + w["w2"](F.silu(w["w1"](normed)) * w["w3"](normed))


class InternLM2(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.model = nn.Module()
        self.model.tok_embeddings = nn.Embedding(c["vocab_size"], c["hidden_size"])
        self.model.layers = nn.ModuleList(InternLM2Layer(c) for _ in range(c["num_hidden_layers"]))
        self.model.norm = RMSNorm(c["hidden_size"], c["rms_norm_eps"])
        self.output = nn.Linear(c["hidden_size"], c["vocab_size"], bias=False)

    def get_input_embeddings(self):
        return self.model.tok_embeddings

    def forward(self, inputs_embeds):
        x = inputs_embeds
        for layer in self.model.layers:
            x = layer(x)
        return self.output(self.model.norm(x))


class InternVLChat(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.c, text = c, c["llm_config"]
        wide = c["vision_config"]["hidden_size"] * round(1 / c["downsample_ratio"]) ** 2
        self.vision_model = Vit(c["vision_config"])
        size = text["hidden_size"]
        self.mlp1 = nn.Sequential(nn.LayerNorm(wide), nn.Linear(wide, size), nn.GELU(), nn.Linear(size, size))
        if text["model_type"] == "internlm2":
            self.language_model = InternLM2(text)
        else:  # the source uses transformers' own class
            self.language_model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**text), dtype=torch.float32)

    def features(self, pixels):
        """Return what the language model sees of the tiles: (tiles, tokens, size). Every token is a square of patches,
        row by row; within it the features of its patches follow one another row by row."""
        x = self.vision_model(pixels)[self.c["select_layer"]][:, 1:]
        side, merge = round(x.shape[1] ** 0.5), round(1 / self.c["downsample_ratio"])
        x = x.reshape(len(x), side // merge, merge, side // merge, merge, -1)
        return self.mlp1(x.transpose(2, 3).flatten(3).flatten(1, 2))

    def forward(self, ids, pixels, image_token):
        x = self.language_model.get_input_embeddings()(ids).clone()
        x[ids == image_token] = self.features(pixels).flatten(0, 1)
        output = self.language_model(inputs_embeds=x)
        return getattr(output, "logits", output)


def randomise(model):
    """Fill a model with numbers large enough that a weight in the wrong place shows."""
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        for name, parameter in model.named_parameters():
            near = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            parameter.copy_(near + 0.3 * torch.randn_like(parameter))
    return model.eval()


def chat_config(text, **changes):
    """A tiny config as the source writes it, with much that is not the model's."""
    vision = {
        "architectures": ["InternVisionModel"],
        "model_type": "intern_vit_6b",
        "image_size": 8,
        "patch_size": 2,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "qkv_bias": True,
        "qk_normalization": False,
        "norm_type": "layer_norm",
        "layer_norm_eps": 1e-6,
        "drop_path_rate": 0.1,
        "use_flash_attn": True,
        "torch_dtype": "float32",
        "top_k": 50,
    }
    return {
        "architectures": ["InternVLChatModel"],
        "auto_map": {"AutoModel": "modeling_internvl_chat.InternVLChatModel"},
        "model_type": "internvl_chat",
        "downsample_ratio": 0.5,
        "dynamic_image_size": True,
        "force_image_size": 8,
        "llm_config": text,
        "max_dynamic_patch": 3,
        "min_dynamic_patch": 1,
        "ps_version": "v2",
        "select_layer": -1,
        "template": "internvl2_5",
        "torch_dtype": "float32",
        "use_thumbnail": True,
        "vision_config": {**vision, **changes.pop("vision_config", {})},
        **changes,
    }


def internlm2_config(**changes):
    """A tiny InternLM2 whose rotary scaling sets in at 12 tokens."""
    return {
        "architectures": ["InternLM2ForCausalLM"],
        "auto_map": {"AutoModelForCausalLM": "modeling_internlm2.InternLM2ForCausalLM"},
        "model_type": "internlm2",
        "vocab_size": 320,
        "hidden_size": 32,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 12,
        "rms_norm_eps": 1e-5,
        "rope_theta": 50000.0,
        "rope_scaling": {"type": "dynamic", "factor": 2.0},
        "bias": False,
        "torch_dtype": "float32",
        **changes,
    }


def text_config(model_type, **changes):
    """A tiny Qwen2, Qwen3 or Llama, with what transformers 4 wrote into every config."""
    extra = {"head_dim": 8} if model_type == "qwen3" else {}
    return {
        "architectures": [f"{model_type.title()}ForCausalLM"],
        "model_type": model_type,
        "vocab_size": 140,
        "hidden_size": 32,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-5,
        "rope_theta": 50000.0,
        "rope_scaling": None,
        "tie_word_embeddings": False,
        "use_cache": False,
        "top_p": 1.0,
        "torchscript": False,
        **extra,
        **changes,
    }


def save_source(directory, model, config, shards=2):
    """Write a model as it is published: shards with an index, and code that must not be run."""
    directory.mkdir(parents=True)
    state = {key: tensor.contiguous() for key, tensor in model.state_dict().items()}
    if config.get("llm_config", config).get("tie_word_embeddings"):
        del state["language_model.lm_head.weight"]
    weight_map = {}
    keys = list(state)
    for index in range(shards):
        name = f"model-{index + 1:05d}-of-{shards:05d}.safetensors"
        part = {key: state[key] for key in keys[index::shards]}
        save_file(part, directory / name, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(part, name))
    write(directory, "model.safetensors.index.json", {"metadata": {}, "weight_map": weight_map})
    write(directory, "config.json", config)
    write(directory, "preprocessor_config.json", {"feature_extractor_type": "CLIPFeatureExtractor", "crop_size": 8})
    (directory / "modeling_internvl_chat.py").write_text("raise SystemExit('code of a model was run')\n")
    (directory / "README.md").write_text("# A model\n")
    save_tokenizer(directory, config.get("llm_config", config)["model_type"])
    return directory


def write(directory, name, content):
    (directory / name).write_text(json.dumps(content), encoding="utf-8")


def edit(directory, name, **changes):
    """Change fields of a JSON file; ``vision_config__patch_size`` is one within a part."""
    content = json.loads((directory / name).read_text())
    for field, value in changes.items():
        *parts, last = field.split("__")
        target = content
        for part in parts:
            target = target[part]
        target[last] = value
    write(directory, name, content)


def save_tokenizer(directory, model_type):
    if model_type != "internlm2":
        tokenizer = tiny_tokenizer()
        tokenizer.add_special_tokens({"additional_special_tokens": IMAGE_TOKENS})
        tokenizer.save_pretrained(directory)
        return
    pieces = sentencepiece_pieces()
    (directory / "tokenizer.model").write_bytes(sentencepiece_model(pieces))
    ids = {piece[0]: index for index, piece in enumerate(pieces)}
    renamed = {ids["[UNUSED_1]"]: "<|im_start|>", ids["[UNUSED_2]"]: "<|im_end|>"}
    added = {token: len(pieces) + index for index, token in enumerate(["<img>", "</img>", "<IMG_CONTEXT>"])}
    special = {0: "<unk>", 1: "<s>", 2: "</s>", **renamed, **{index: token for token, index in added.items()}}
    write(directory, "added_tokens.json", added)
    write(
        directory,
        "tokenizer_config.json",
        {
            "auto_map": {"AutoTokenizer": ["tokenization_internlm2.InternLM2Tokenizer", None]},
            "tokenizer_class": "InternLM2Tokenizer",
            "added_tokens_decoder": {
                str(index): {"content": token, "special": True} for index, token in special.items()
            },
            "additional_special_tokens": ["<|im_start|>", "<|im_end|>", *added],
            "bos_token": "<s>",
            "eos_token": "</s>",
            "pad_token": "</s>",
            "unk_token": "<unk>",
        },
    )


def sentencepiece_pieces():
    """(text, score, type) of a tiny vocabulary: control tokens, bytes, letters, words, unused ones."""
    pieces = [("<unk>", 0.0, 2), ("<s>", 0.0, 3), ("</s>", 0.0, 3)]
    pieces += [(f"<0x{byte:02X}>", 0.0, 6) for byte in range(256)]
    merged = ["at", "▁c", "▁cat", "he", "▁t", "▁the", "ow", "rs", "cow", "co", "ab", "bc", "abc", "▁a"]
    # Out of the order of their scores, so that ids and scores cannot be confused.
    pieces += [(text, -1.0 - rank, 1) for rank, text in sorted(enumerate(merged), key=lambda item: item[1])]
    pieces += [(letter, -100.0 - index, 1) for index, letter in enumerate("▁abcdefghijklmnopqrstuvwxyz.:,<>|_")]
    return [*pieces, ("[UNUSED_1]", 0.0, 4), ("[UNUSED_2]", 0.0, 4), ("[UNUSED_3]", 0.0, 4)]


def sentencepiece_model(pieces, *, kind=TrainerSpec.BPE, dummy_prefix=False):
    """The bytes of a SentencePiece model of these pieces."""
    model = ModelProto(
        pieces=[ModelProto.SentencePiece(piece=text, score=score, type=type_) for text, score, type_ in pieces],
        trainer_spec=TrainerSpec(model_type=kind, byte_fallback=True),
        normalizer_spec=NormalizerSpec(name="identity", add_dummy_prefix=dummy_prefix, remove_extra_whitespaces=False),
    )
    return model.SerializeToString()

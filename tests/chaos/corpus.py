"""The hostile inputs: what is wrong with a good thing, and which command gets it. To add one, add a line to a list."""

import json
import sqlite3
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from chaos.spoil import (
    both,
    deep,
    directory,
    drop,
    edit_bytes,
    edit_header,
    edit_json,
    edit_tensors,
    file,
    first,
    gone,
    link,
    put,
    shard,
    write,
)

#: The commands, on the good inputs of :func:`make_good`. ``{}``-less names are paths beside the case.
COMMANDS = {
    "plan": "plan model --length 8 --ratio 0.5",
    "compress": "compress model --data rows.jsonl --samples 4 --selection 2 -o out",
    "train": "train emulator --data rows.jsonl --steps 1 --rank 2 -o out",
    "correct": "correct adapter --base model --emulator emulator --clamp 1 -o out",
    "choose": "correct adapter --base model --emulator emulator --clamp auto -o out",
    "merge": "merge corrected --base model -o out",
    "merge uncorrected": "merge adapter --base model --allow-uncorrected -o out",
    "import": "import model -o out",
    "run": "run recipe.toml",
    "run dry": "run recipe.toml --dry-run",
    "entry": "plan entry.toml --length 8 --ratio 0.5",
    "registry": "zoo list --registry entry.toml",
    "convert": "zoo convert jobs.toml -o out",
    "eval": "eval task.yaml --base model -o out",
    "status": "zoo status zoo",
}


@dataclass(frozen=True)
class Case:
    """One hostile input.

    Attributes:
        kind: of what.
        name: what is wrong with it.
        spoil: makes it from the good inputs in a directory.
        command: a key of ``COMMANDS``, or a command line.
        harmless: the command may succeed, and its output is then looked at.
        file_size: the most bytes that a file may have.
    """

    kind: str
    name: str
    spoil: Callable[[Path], object]
    command: str
    harmless: bool = False
    file_size: int | None = None


Cases = Iterator[Case]
_ODD = [None, True, 0, -1, 3.5, 1 << 40, 1 << 70, 1e308, "", "text", "\ud800", [], [1], {}, {"a": 1}]
_ODD_JSON: dict[str, str | bytes] = {
    "empty": "",
    "blank": "  ",
    "not JSON": "{",
    "no UTF-8": b"\xff\xfe",
    "NUL bytes": b"\0" * 64,
    "a list": "[]",
    "a number": "3",
    "null": "null",
    "deep lists": deep("[", "]"),
    "deep objects": deep('{"a":', "}"),
    "a number of 5000 digits": '{"model_type": ' + "9" * 5000 + "}",
    "NaN": '{"a": NaN}',
}
_HEADERS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "a list": lambda _: "[]",
    "a number": lambda _: "3",
    "not JSON": lambda _: "{",
    "no UTF-8": lambda _: b'{"\xff": 1}',
    "deep": lambda _: deep('{"a":', "}"),
    "a key twice": lambda header: (
        json.dumps(header)[:-1] + f', "{first(header)}": {json.dumps(header[first(header)])}}}'
    ),
    "metadata twice": lambda _: '{"__metadata__": {}, "__metadata__": {}}',
    "metadata of numbers": put("__metadata__", value={"a": 3}),
    "metadata that is a list": put("__metadata__", value=[]),
    "a blank before": lambda header: " " + json.dumps(header),
    "text after": lambda header: json.dumps(header) + "x",
    "an unknown dtype": lambda header: header[first(header)].update(dtype="F31"),
    "a dtype that is null": lambda header: header[first(header)].update(dtype=None),
    "a dtype that is a list": lambda header: header[first(header)].update(dtype=["F32"]),
    "another dtype": lambda header: header[first(header)].update(dtype="F64"),
    "an integer dtype": lambda header: (
        [entry.update(dtype="I32") for key, entry in header.items() if key != "__metadata__"] and None
    ),
    "a negative shape": lambda header: header[first(header)].update(
        shape=[-size for size in header[first(header)]["shape"]]
    ),
    "a shape of floats": lambda header: header[first(header)].update(
        shape=[float(size) for size in header[first(header)]["shape"]]
    ),
    "a shape that is a number": lambda header: header[first(header)].update(shape=4),
    "a shape that overflows": lambda header: header[first(header)].update(shape=[1 << 62, 1 << 62]),
    "a shape of a thousand dimensions": lambda header: header[first(header)].update(shape=[1 << 62] * 1000),
    "a transposed shape": lambda header: (
        [entry.update(shape=[*entry["shape"][::-1], 1]) for key, entry in header.items() if key != "__metadata__"]
        and None
    ),
    "no offsets": lambda header: header[first(header)].pop("data_offsets") and None,
    "one offset": lambda header: header[first(header)].update(data_offsets=[0]),
    "offsets backwards": lambda header: header[first(header)].update(
        data_offsets=header[first(header)]["data_offsets"][::-1]
    ),
    "negative offsets": lambda header: header[first(header)].update(data_offsets=[-8, 0]),
    "offsets of text": lambda header: header[first(header)].update(data_offsets=["0", "4"]),
    "offsets past every bound": lambda header: header[first(header)].update(data_offsets=[1 << 70, 1 << 71]),
    "overlapping tensors": lambda header: header.update(
        {key: header[first(header)] for key in header if key != "__metadata__"}
    ),
    "an entry that is null": lambda header: header.update({first(header): None}),
    "an entry that is text": lambda header: header.update({first(header): "F32"}),
    "another name": lambda header: header.update({"evil": header.pop(first(header))}),
    "a name of escapes": lambda header: header.update({"\x1b[2J\n\r": header.pop(first(header))}),
    "a name of half a character": lambda header: header.update({"\ud800": header.pop(first(header))}),
    "no tensors": lambda _: {},
}
_FILES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda _: b"",
    "three bytes": lambda content: content[:3],
    "cut within its header": lambda content: content[:40],
    "cut by a byte": lambda content: content[:-1],
    "longer by a byte": lambda content: content + b"\0",
    "a header of no length": lambda content: b"\0" * 8 + content[8:],
    "a header of every length": lambda content: b"\xff" * 8 + content[8:],
    "a header of 99 MB": lambda content: (99_000_000).to_bytes(8, "little") + content[8:],
    "a pickle": lambda _: b"\x80\x04cposix\nsystem\n(S'touch evil'\ntR.",
    "zeros": lambda content: b"\0" * len(content),
}
_SHARD_NAMES = [
    "..",
    ".",
    "/",
    "",
    "../model.safetensors",
    "/etc/passwd",
    "request.json",
    ".lock",
    "emloc.json",
    "config.json",
    "a/b.safetensors",
    ".x.safetensors",
    "x" * 300 + ".safetensors",
    "\0.safetensors",
    "\n.safetensors",
    "nul\0l",
    None,
    3,
    True,
    [],
    {},
    ["a.safetensors"],
    "\ud800.safetensors",
    "nothing.safetensors",
]


def shards() -> Cases:
    """Return files of weights: the base's, the emulator's and adapters."""
    readers = {
        "model": ("merge", "compress", "correct"),
        "emulator": ("train", "correct"),
        "corrected": ("merge",),
        "adapter": ("correct",),
    }
    for folder, commands in readers.items():
        for name, change in _HEADERS.items():
            for command in commands if folder == "model" else commands[:1]:
                lax = name == "a blank before"  # which some versions of the library accept
                yield Case("header", f"{folder}: {name}", edit_header(folder, change), command, harmless=lax)
        for name, spoil in _FILES.items():
            yield Case("file of weights", f"{folder}: {name}", edit_bytes(folder, spoil), commands[0])
        find = shard(folder)
        yield Case(
            "file of weights",
            f"{folder}: a directory",
            lambda root, find=find: directory(str(find(root)))(root),
            commands[0],
        )
        yield Case(
            "file of weights",
            f"{folder}: a link to itself",
            lambda root, find=find: link(str(find(root)), find(root).name)(root),
            commands[0],
        )
        yield Case("file of weights", f"{folder}: gone", lambda root, find=find: find(root).unlink(), commands[0])


def changed_weights() -> Cases:
    """Return weights that are not what their manifest or the base says."""

    def flip(content: bytes) -> bytes:
        return content[:-9] + bytes([content[-9] ^ 1]) + content[-8:]

    def times(factor: float) -> Callable[[dict[str, Any]], None]:
        return lambda tensors: tensors.update({key: tensor * factor for key, tensor in tensors.items()})

    def to(dtype: str) -> Callable[[dict[str, Any]], None]:
        return lambda tensors: tensors.update(
            {key: tensor.to(getattr(torch, dtype)) for key, tensor in tensors.items()}
        )

    for folder, command in {"corrected": "merge", "adapter": "correct", "emulator": "train"}.items():
        yield Case("changed weights", f"{folder}: a flipped bit", edit_bytes(folder, flip), command)
        yield Case("changed weights", f"{folder}: doubled", edit_tensors(folder, times(2)), command)
    for folder, command in {"model": "merge", "emulator": "correct"}.items():
        yield Case("changed weights", f"{folder}: a flipped bit", edit_bytes(folder, flip), command)
    strip = gone("corrected/emloc.json")
    for factor in (float("nan"), float("inf"), 1e38):
        for folder, command in {
            "model": "compress",
            "corrected": "merge",
            "adapter": "correct",
        }.items():
            fine = folder == "model" and factor == 1e38  # its norms give zeros, for which all factors are right
            yield Case(
                "numbers", f"{folder}: times {factor}", edit_tensors(folder, times(factor)), command, harmless=fine
            )
    for dtype in ("int32", "int8", "uint8", "bool", "uint16", "complex64", "float8_e4m3fn"):
        fine = dtype == "float8_e4m3fn"
        yield Case("numbers", f"model: {dtype}", edit_tensors("model", to(dtype)), "compress", harmless=fine)
        yield Case(
            "numbers", f"corrected: {dtype}", both(edit_tensors("corrected", to(dtype)), strip), "merge", harmless=fine
        )


def indexes() -> Cases:
    """Return indexes of shards."""
    index = "model/model.safetensors.index.json"
    for name in _SHARD_NAMES:
        for command in ("merge", "compress"):

            def change(content: Any, name: Any = name) -> None:
                content["weight_map"].update(dict.fromkeys(list(content["weight_map"])[:1], name))

            yield Case("index", f"a shard's name {name!r:.40}", edit_json(index, change), command)
    for value in _ODD:
        yield Case("index", f"weight_map {value!r}", edit_json(index, put("weight_map", value=value)), "merge")
    for name, text in _ODD_JSON.items():
        yield Case("index", name, file(index, text), "merge")
    yield Case("index", "a directory", directory(index), "merge")
    yield Case("index", "a link to itself", link(index, "model.safetensors.index.json"), "merge")
    yield Case(
        "index",
        "swapped",
        edit_json(
            index,
            lambda content: {
                "weight_map": dict(zip(content["weight_map"], reversed(content["weight_map"].values()), strict=True))
            },
        ),
        "merge",
    )


_CONFIG_FIELDS = (
    "model_type",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "vocab_size",
    "dtype",
    "quantization_config",
    "tie_word_embeddings",
    "rms_norm_eps",
    "max_position_embeddings",
    "rope_parameters",
    "head_dim",
    "architectures",
    "hidden_act",
    "pad_token_id",
)
#: Changed, they make another valid model, or nothing that anyone notices.
_HARMLESS_FIELDS = {
    "rms_norm_eps",
    "max_position_embeddings",
    "rope_parameters",
    "architectures",
    "pad_token_id",
    "dtype",
    "tie_word_embeddings",
    "quantization_config",
    "vocab_size",
    "intermediate_size",
    "head_dim",
    "num_hidden_layers",
}


def configs() -> Cases:
    """Return the base's config."""
    for name, text in _ODD_JSON.items():
        for command in ("plan", "compress", "import"):
            yield Case("config", name, file("model/config.json", text), command)
    for field in _CONFIG_FIELDS:
        for value in _ODD:
            spoil = edit_json("model/config.json", put(field, value=value))
            yield Case("config", f"{field} = {value!r}", spoil, "plan", harmless=field in _HARMLESS_FIELDS)
    for field in (
        "model_type",
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "dtype",
        "quantization_config",
        "pad_token_id",
    ):
        for value in _ODD:
            spoil = edit_json("model/config.json", put(field, value=value))
            yield Case("config", f"{field} = {value!r}", spoil, "compress", harmless=field in _HARMLESS_FIELDS)
    yield Case("config", "gone", gone("model/config.json"), "compress")
    yield Case("config", "a directory", directory("model/config.json"), "compress")
    yield Case("config", "a link to itself", link("model/config.json", "config.json"), "compress")
    yield Case(
        "config", "a model of another type", edit_json("model/config.json", put("model_type", value="bert")), "plan"
    )


def tokenizers() -> Cases:
    """Return tokenizers and their settings."""
    for name, text in _ODD_JSON.items():
        yield Case("tokenizer", f"tokenizer.json: {name}", file("model/tokenizer.json", text), "compress")
        yield Case(
            "tokenizer",
            f"tokenizer_config.json: {name}",
            file("model/tokenizer_config.json", text),
            "compress",
            harmless=True,
        )
    yield Case("tokenizer", "gone", gone("model/tokenizer.json"), "compress")
    fields = (
        "tokenizer_class",
        "eos_token",
        "pad_token",
        "bos_token",
        "added_tokens_decoder",
        "model_max_length",
        "chat_template",
    )
    for field in fields:
        for value in (None, 3, [], {"a": 1}, "text", "\ud800"):
            spoil = edit_json("model/tokenizer_config.json", put(field, value=value))
            yield Case("tokenizer", f"{field} = {value!r}", spoil, "compress", harmless=True)

    def ids(offset: int) -> Callable[[Any], None]:
        def change(content: Any) -> None:
            vocab = content["model"]["vocab"]
            content["model"]["vocab"] = {token: number + offset for token, number in vocab.items()}

        return change

    for offset in (1 << 20, 1 << 31, -1, -(1 << 20)):
        spoil = edit_json("model/tokenizer.json", ids(offset))
        yield Case("tokenizer", f"ids moved by {offset}", spoil, "compress")
    for name, template in {
        "no end": "{% for x in y %}",
        "an error": "{{ raise_exception('no') }}",
        "unknown": "{{ messages.x.y }}",
        "attributes": "{{ ''.__class__.__mro__ }}",
    }.items():
        chat = file(
            "rows.jsonl",
            "".join(
                json.dumps({"messages": [{"role": "user", "content": f"{n}"}, {"role": "assistant", "content": "a"}]})
                + "\n"
                for n in range(9)
            ),
        )
        spoil = both(chat, lambda root, template=template: write(root / "model/chat_template.jinja", template))
        yield Case("tokenizer", f"chat template: {name}", spoil, "compress")


_ADAPTER = "corrected/adapter_config.json"


def adapters() -> Cases:
    """Return adapters' settings."""
    for name, text in _ODD_JSON.items():
        yield Case("adapter", name, file(_ADAPTER, text), "merge")
    for field in (
        "lora_alpha",
        "r",
        "alpha_pattern",
        "rank_pattern",
        "use_rslora",
        "peft_type",
        "use_dora",
        "bias",
    ):
        for value in _ODD:
            empty = (
                not value
                and field not in ("lora_alpha", "r", "peft_type")
                and not (field == "use_rslora" and value != 0)
            )
            # Without its manifest, which knows what was written.
            spoil = both(edit_json(_ADAPTER, put(field, value=value)), gone("corrected/emloc.json"))
            fine = empty or (value, field) in (
                (3.5, "lora_alpha"),
                (1 << 40, "lora_alpha"),
                (1 << 70, "lora_alpha"),
                (True, "use_rslora"),
                ({"a": 1}, "alpha_pattern"),  # of no module
                ({"a": 1}, "rank_pattern"),
            )
            yield Case(
                "adapter",
                f"{field} = {value!r}",
                spoil,
                "merge",
                harmless=fine or field in {"use_rslora", "bias"},
            )
    for value in ("NaN", "Infinity", "-Infinity", "1e999", "-8", "5e-324"):

        def text(root: Path, value: str = value) -> None:
            content = json.loads((root / _ADAPTER).read_text()) | {"lora_alpha": 12345}
            write(root / _ADAPTER, json.dumps(content).replace("12345", value))
            gone("corrected/emloc.json")(root)

        yield Case("adapter", f"lora_alpha = {value}", text, "merge")
        yield Case(
            "adapter",
            f"alpha_pattern of {value}",
            both(
                edit_json(_ADAPTER, put("alpha_pattern", value={"q_proj": 12345})),
                lambda root, value=value: write(root / _ADAPTER, (root / _ADAPTER).read_text().replace("12345", value)),
            ),
            "merge",
        )
    for value in _ODD:
        spoil = edit_json("adapter/adapter_config.json", put("base_model_name_or_path", value=value))
        line = "correct adapter --base model --clamp 1 -o out"
        yield Case("adapter", f"base_model_name_or_path = {value!r}", spoil, line)
    yield Case("adapter", "gone", gone(_ADAPTER), "merge")
    yield Case("adapter", "a directory", directory(_ADAPTER), "merge")
    yield Case(
        "adapter",
        "another one's module",
        edit_tensors(
            "corrected",
            lambda tensors: {key.replace("layers.0", "layers.77"): tensor for key, tensor in tensors.items()},
        ),
        "merge",
    )
    yield Case("adapter", "corrected twice", lambda _: None, "correct corrected --base model --clamp 1 -o out")
    yield Case("adapter", "uncorrected", lambda _: None, "merge adapter --base model -o out")


def manifests() -> Cases:
    """Return manifests of what stages made."""
    readers = {"emulator": "correct", "corrected": "merge", "adapter": "correct"}
    for folder, command in readers.items():
        manifest = f"{folder}/emloc.json"
        for name, text in _ODD_JSON.items():
            yield Case("manifest", f"{folder}: {name}", file(manifest, text), command)
        for field in ("kind", "request", "result"):
            yield Case("manifest", f"{folder}: no {field}", edit_json(manifest, drop(field)), command)
            for value in (None, 3, [], {}, "text"):
                yield Case(
                    "manifest", f"{folder}: {field} = {value!r}", edit_json(manifest, put(field, value=value)), command
                )
    fields = {
        "emulator": {"request": ("base", "settings")},
        "corrected": {"request": ("base",)},
        "adapter": {"request": ("model",)},
    }
    for folder, parts in fields.items():
        for part, names in parts.items():
            for name in names:
                manifest = f"{folder}/emloc.json"
                unread = {
                    ("corrected", "base"),
                    ("adapter", "model"),
                }
                for value in (None, 3, "text", ["a"], {"a": 1}):
                    spoil = edit_json(manifest, put(part, name, value=value))
                    yield Case(
                        "manifest",
                        f"{folder}: {part}.{name} = {value!r}",
                        spoil,
                        readers[folder],
                        harmless=(folder, name) in unread,
                    )
                spoil = edit_json(manifest, drop(part, name))
                yield Case(
                    "manifest", f"{folder}: no {part}.{name}", spoil, readers[folder], harmless=(folder, name) in unread
                )
    for command, kept in {"compress": "out", "train": "out", "merge": "out"}.items():
        for name, text in {**_ODD_JSON, "another kind": '{"kind": "x"}', "no request": '{"kind": "emulator"}'}.items():

            def spoil(root: Path, text: str | bytes = text, kept: str = kept) -> None:
                (root / kept).mkdir()
                write(root / kept / "emloc.json", text)

            yield Case("manifest", f"of what is there already: {name}", spoil, command)
    for name, text in _ODD_JSON.items():

        def spoil(root: Path, text: str | bytes = text) -> None:
            (root / ".out.partial" / "content").mkdir(parents=True)
            write(root / ".out.partial" / "content" / "model.safetensors", "half")
            write(root / ".out.partial" / "request.json", text)

        yield Case("manifest", f"of an interrupted run: {name}", spoil, "merge")
        yield Case("manifest", f"of hashes: {name}", file(".emloc-hashes.json", text), "merge", harmless=True)
    for value in (None, 3, [], [1, 2, 3], "x" * 64, {"a": 1}):

        def hashes(root: Path, value: Any = value) -> None:
            keys = [str(path.resolve()) for path in (root / "model").iterdir()]
            write(root / ".emloc-hashes.json", json.dumps(dict.fromkeys(keys, value)))

        yield Case("manifest", f"of hashes, each {value!r}", hashes, "merge", harmless=True)


def rows() -> Cases:
    """Return the user's rows."""

    def lines(*contents: Any) -> str:
        return "".join(json.dumps(content) + "\n" for content in contents)

    texts: dict[str, str | bytes] = {
        "empty": "",
        "blank lines": "\n\n",
        "not JSON": "{\n",
        "no UTF-8": b'{"text": "\xff"}\n',
        "NUL bytes": b"\0" * 64,
        "lists": lines([], []),
        "numbers": lines(1, 2),
        "nulls": lines(None),
        "deep": deep('{"text":', "}"),
        "no column": lines({"a": 1}),
        "a text that is null": lines({"text": None}),
        "a text that is a number": lines({"text": 3}),
        "an empty text": lines({"text": ""}),
        "half a character": '{"text": "\\ud800"}\n' * 9,
        "two forms": lines({"text": "a"}, {"prompt": "a", "completion": "b"}),
        "messages of text": lines({"messages": "a"}),
        "messages of numbers": lines({"messages": [1]}),
        "no messages": lines({"messages": []}),
        "no answer": lines({"messages": [{"role": "user", "content": "a"}]}),
        "a role that is a number": lines(
            {"messages": [{"role": 3, "content": "a"}, {"role": "assistant", "content": "b"}]}
        ),
        "deep messages": '{"messages": ' + deep("[", "]", 900) + "}\n",
        "too few": lines({"text": "a"}),
        "the same row": lines(*[{"text": "a"}] * 50),
        "an image in a text": lines({"text": "a", "image": "x.png"}),
        "images for a text model": lines(
            *(
                {
                    "prompt": [{"role": "user", "content": f"{n}"}],
                    "completion": [{"role": "assistant", "content": "b"}],
                    "images": ["/etc/passwd"],
                }
                for n in range(9)
            )
        ),
        "a huge number": '{"text": ' + "9" * 5000 + "}\n",
    }
    for name, text in texts.items():
        yield Case("rows", name, file("rows.jsonl", text), "compress")
        yield Case("rows", name, file("rows.jsonl", text), "train", harmless=name in ("too few", "the same row"))
        if name not in ("too few", "the same row"):
            yield Case("rows", f"selection: {name}", file("emulator/selection.jsonl", text), "choose", harmless=True)
    long = lines(*({"text": "a b " * 4000 + str(number)} for number in range(9)))
    yield Case("rows", "longer than the model takes", file("rows.jsonl", long), "compress")
    yield Case("rows", "a directory", directory("rows.jsonl"), "compress")
    yield Case("rows", "gone", gone("rows.jsonl"), "compress")
    yield Case("rows", "a link to itself", link("rows.jsonl", "rows.jsonl"), "compress")
    for name, content in {"Parquet that is none": b"PAR1" + b"\0" * 40 + b"PAR1", "an empty Parquet": b""}.items():
        yield Case("rows", name, file("rows.parquet", content), "compress model --data rows.parquet -o out")
    yield Case("rows", "another suffix", file("rows.csv", "a,b"), "compress model --data rows.csv -o out")
    for name, text in _ODD_JSON.items():
        yield Case("rows", f"JSON: {name}", file("rows.json", text), "compress model --data rows.json -o out")


def settings() -> Cases:
    """Return recipes, entries of the registry, jobs and options."""
    texts: dict[str, str | bytes] = {
        "empty": "",
        "not TOML": "[",
        "no UTF-8": b"\xff",
        "NUL bytes": b"\0",
        "a key twice": "a = 1\na = 2",
        "unknown": "evil = 1",
        "deep": "a = " + deep("[", "]", 5000),
        "huge": "a = " + "9" * 5000,
        "sections of numbers": "model = 3\ndata = 3\nid = 3\nconfig = 3\npresets = 3",
        "sections of lists": "model = []\ndata = []\nid = []\nconfig = []\npresets = []",
    }
    for name, text in texts.items():
        yield Case("recipe", name, file("recipe.toml", text), "run")
        yield Case("entry", name, file("entry.toml", text), "entry")
        yield Case("entry", name, file("entry.toml", text), "registry")
    for change in (
        "model.base=3",
        "model.base=nothing",
        "model.base=''",
        'model.base="\\u0000"',
        "model.memory=x",
        "data.train=3",
        "data.train=nothing.jsonl",
        "compress.ratio=nan",
        "compress.ratio=2",
        "compress.ratio=-1",
        "compress.samples=0",
        "compress.samples=1e9",
        "compress.allocator=x",
        "train.steps=0",
        "train.steps=-1",
        "train.learning_rate=nan",
        "train.lora_rank=0",
        "correct.clamp=nan",
        "correct.clamp=-1",
        "correct.correction=x",
        "eval.tasks=[]",
        "eval.tasks=3",
        "evil.key=1",
        "=1",
        "a",
        "model.base.x=1",
        "output=3",
    ):
        yield Case("recipe", change, lambda _: None, f"run recipe.toml --dry-run --set {change}")
    for path in ("recipe.toml", "entry.toml"):
        command = "run" if path == "recipe.toml" else "entry"
        yield Case(command, "gone", gone(path), command)
        yield Case(command, "a directory", directory(path), command)
        yield Case(command, "a link to itself", link(path, path), command)
    for old, new in {
        'checkpoint = "model"': 'checkpoint = "../secret"',
        'family = "llama"': 'family = "evil"',
        "samples = 8": "samples = nan",
        'model_type = "llama"': "model_type = [1]",
        'id = "tiny"': 'id = ""',
        "hidden_size": "_name_or_path",
        "hidden_size ": "auto_map ",
    }.items():

        def spoil(root: Path, old: str = old, new: str = new) -> None:
            text = (root / "entry.toml").read_text()
            assert old in text, old
            write(root / "entry.toml", text.replace(old, new, 1))

        for command in ("entry", "registry"):
            yield Case("entry", f"{new}", spoil, command, harmless=new == 'family = "evil"')
    for line in (
        "compress model --data rows.jsonl --ratio nan -o out",
        "compress model --data rows.jsonl --ratio 1e400 -o out",
        "compress model --data rows.jsonl --memory -1GB -o out",
        "compress model --data rows.jsonl --memory 99999999999999999999999GB --ratio 0.5 -o out",
        "compress model --data rows.jsonl --samples 4 --selection 2 -o model",
        "compress model --data rows.jsonl --samples 4 --selection 2 -o model/config.json",
        "compress model --data rows.jsonl --samples 4 --selection 2 -o /proc/x",
        "compress model --data rows.jsonl --samples 4 --selection 2 -o ..",
        "compress model --data rows.jsonl --samples 4 --selection 2 --device cuda:99 -o out",
        "compress model --data rows.jsonl --samples 4 --selection 2 --device evil -o out",
        "compress nothing --data rows.jsonl -o out",
        "compress rows.jsonl --data rows.jsonl -o out",
        "plan rows.jsonl",
        "plan model --memory 1B --length 8",
        "plan model --length 99999999999999999999",
        "plan model --length 8 --batch-size 99999999999999999999",
        "plan model --length 8 --image-size 0x0",
        "merge corrected --base emulator -o out",
        "merge model --base model -o out",
        "merge corrected --base corrected -o out",
        "merge emulator --base model -o out",
        "correct adapter --base emulator --clamp 1 -o out",
        "correct adapter --base model --clamp nan -o out",
        "correct adapter --base model --emulator model --clamp 1 -o out",
        "correct adapter --base model --selection-data rows.jsonl --clamp auto -o adapter",
        "train adapter --data rows.jsonl -o out",
        "train emulator --data rows.jsonl --steps 1 --lr nan -o out",
        "train emulator --data rows.jsonl --steps 1 --set evil=1 -o out",
        "train emulator --data rows.jsonl --steps 1 --set output_dir=/tmp -o out",
        "train emulator --data rows.jsonl --steps 1 --target-modules nothing -o out",
        "import model -o model/in",
        "import nothing -o out",
        "eval nothing.yaml --base model -o out",
        "eval task.yaml --base nothing -o out",
        "eval task.yaml -o out",
        "zoo status nothing",
        "zoo report nothing",
        "zoo show nothing",
        "zoo plan nothing",
        "families check nothing",
        "families scaffold nothing",
        "families scaffold rows.jsonl",
    ):
        yield Case("options", line, lambda _: None, line)
    for name, text in {
        "empty": "",
        "a number": "3",
        "a list": "[]",
        "not YAML": "{",
        "code": "!!python/object/apply:os.system ['touch evil']",
        "a function": "task: t\ndataset_path: json\nprocess_docs: !function evil.f",
        "no data": "task: t",
        "odd fields": "task: 3\ndataset_path: []",
        "deep": deep("[", "]", 2000),
    }.items():
        yield Case("task", name, file("task.yaml", text), "eval")
    for name, text in texts.items():
        yield Case("jobs", name, file("jobs.toml", text), "convert")
    for name, content in {"text": "evil", "empty": "", "a database of another kind": _database()}.items():

        def store(root: Path, content: str | bytes = content) -> None:
            (root / "zoo").mkdir()
            write(root / "zoo" / "zoo.sqlite", content)
            write(root / "zoo" / "zoo.db", content)

        yield Case("jobs", f"a store: {name}", store, "status")


def _database() -> bytes:
    connection = sqlite3.connect(":memory:")
    connection.execute("create table jobs (x)")
    connection.commit()
    return connection.serialize()


def file_sizes() -> Cases:
    """Return limits on the size of files, as a disk's quota sets them."""
    for command in ("compress", "merge", "correct", "train"):
        for limit in (0, 200, 5_000, 50_000):
            small = limit == 50_000
            yield Case("file size", f"at most {limit} bytes", lambda _: None, command, harmless=small, file_size=limit)


CORPUS: tuple[Callable[[], Cases], ...] = (
    shards,
    changed_weights,
    indexes,
    configs,
    tokenizers,
    adapters,
    manifests,
    rows,
    settings,
    file_sizes,
)


def cases(limit: int | None = None) -> list[Case]:
    """Return all cases, or so many of them, evenly spread."""
    available = [case for part in CORPUS for case in part()]
    step = 1 if limit is None else max(1, len(available) // limit)
    return available[::step][:limit]

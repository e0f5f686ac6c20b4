"""Builders of tiny real checkpoints: random weights from a fixed seed, own tokenizers, milliseconds to run.

They are whole Hugging Face folders, so that what is tested is the way of a real checkpoint. `BROKEN` spoils a good one
in every way that `runtime.checkpoints` must refuse.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

CORPUS = [
    "the quick brown fox jumps over the lazy dog",
    "a list holds any number of values of one type, in their order",
    "returns the length of the list, or NULL when there is none",
    "good morning, how are you today? I am fine, thank you very much.",
    "select name, price from goods where price > 100 order by name;",
    "positive negative neutral 0123456789 !?.,:;()[]{}<>|_-+*/='\"",
]
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message.role not in ['system', 'user', 'assistant'] %}{{ raise_exception('unknown role') }}{% endif %}"
    "<|{{ message.role }}|>{{ message.content }}<|end|>"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
LABELS = ("negative", "neutral", "positive")


def language_model(
    folder: Path,
    *,
    seed: int = 0,
    chat_template: str | None = CHAT_TEMPLATE,
    max_model_len: int = 512,
    eos_bias: float = 0.0,
    **config: Any,
) -> Path:
    """A Llama of some 60,000 parameters with a byte-level tokenizer.

    Args:
        chat_template: None for a checkpoint without one.
        eos_bias: how much likelier than other tokens the end is; answers then end at different lengths.
        config: more fields of LlamaConfig.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = text_tokenizer(chat_template)
    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=max_model_len,
            initializer_range=0.3,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            tie_word_embeddings=False,
            **config,
        )
    )
    if eos_bias:
        with torch.no_grad():
            model.lm_head.weight[tokenizer.eos_token_id] *= eos_bias
    return _save(folder, model, tokenizer)


def sliding_language_model(folder: Path, *, seed: int = 0) -> Path:
    """A Mistral whose attention sees eight tokens back, so that its cache is not a plain one; without a template."""
    import torch
    from transformers import MistralConfig, MistralForCausalLM

    tokenizer = text_tokenizer(None)
    torch.manual_seed(seed)
    model = MistralForCausalLM(
        MistralConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=256,
            sliding_window=8,
            initializer_range=0.3,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    return _save(folder, model, tokenizer)


def state_space_model(folder: Path, *, seed: int = 0) -> Path:
    """A Mamba, whose layers have no attention."""
    import torch
    from transformers import MambaConfig, MambaForCausalLM

    tokenizer = text_tokenizer()
    torch.manual_seed(seed)
    shape = {"hidden_size": 16, "state_size": 4, "num_hidden_layers": 1, "max_position_embeddings": 256}
    model = MambaForCausalLM(
        MambaConfig(
            vocab_size=len(tokenizer),
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            **shape,
        )
    )
    return _save(folder, model, tokenizer)


def encoder(folder: Path, *, seed: int = 0, max_model_len: int = 64) -> Path:
    """A BERT without a head: an embedding checkpoint with vectors of 32 numbers."""
    import torch
    from transformers import BertModel

    tokenizer = word_tokenizer(max_model_len)
    torch.manual_seed(seed)
    return _save(folder, BertModel(_bert_config(len(tokenizer), max_model_len)), tokenizer)


def classifier(folder: Path, *, seed: int = 0, labels: tuple[str, ...] = LABELS, **config: Any) -> Path:
    """A BERT that tells `labels` apart; `config`: more fields of BertConfig, such as problem_type."""
    import torch
    from transformers import BertForSequenceClassification

    tokenizer = word_tokenizer(64)
    torch.manual_seed(seed)
    settings = _bert_config(len(tokenizer), 64, id2label=dict(enumerate(labels)), num_labels=len(labels), **config)
    settings.label2id = {label: number for number, label in enumerate(labels)}
    return _save(folder, BertForSequenceClassification(settings), tokenizer)


def sentence_encoder(folder: Path, *, seed: int = 0) -> Path:
    """A sentence-transformers checkpoint: encoder, mean pooling, normalisation."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer

    body = Transformer(str(encoder(folder / "body", seed=seed)))
    SentenceTransformer(modules=[body, Pooling(32, "mean"), Normalize()], device="cpu").save(str(folder / "whole"))
    return folder / "whole"


def text_tokenizer(chat_template: str | None = CHAT_TEMPLATE) -> Any:
    """A byte-level BPE tokenizer that can spell anything; a text starts with <s>, an answer ends with <|end|>."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<s>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="<|end|>",
        pad_token="<pad>",
        additional_special_tokens=special[3:],
        chat_template=chat_template,
    )


def word_tokenizer(max_model_len: int) -> Any:
    """A tokenizer in the manner of BERT: words, [CLS] and [SEP]."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.train_from_iterator(
        CORPUS, trainers.WordPieceTrainer(vocab_size=300, special_tokens=special, show_progress=False)
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        model_max_length=max_model_len,
    )


def _bert_config(vocab_size: int, max_model_len: int, **more: Any) -> Any:
    from transformers import BertConfig

    return BertConfig(
        vocab_size=vocab_size,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=max_model_len,
        initializer_range=0.3,
        **more,
    )


def _save(folder: Path, model: Any, tokenizer: Any) -> Path:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def placeholder(folder: Path, **config: Any) -> Path:
    """A folder that `inspect` accepts, written without torch or transformers: one tensor and a token tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    _write_json(
        folder / "config.json",
        {
            "model_type": "llama",
            "architectures": ["LlamaForCausalLM"],
            "max_position_embeddings": 128,
            "vocab_size": 10,
            "hidden_size": 2,
            "dtype": "float32",
            **config,
        },
    )
    _write_json(folder / "tokenizer.json", {"version": "1.0"})
    write_safetensors(
        folder / "model.safetensors", {"a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}}, 24
    )
    return folder


def gguf(file: Path, **more: Any) -> Path:
    """A GGUF file of a tiny Llama, as the `gguf` package writes it: three tensors, a vocabulary, a template."""
    import numpy as np
    from gguf import GGUFWriter

    file.parent.mkdir(parents=True, exist_ok=True)
    writer = GGUFWriter(file, "llama")
    writer.add_context_length(128)
    writer.add_embedding_length(8)
    writer.add_block_count(1)
    writer.add_head_count(2)
    writer.add_token_list(["<unk>", "<s>", "</s>", "a"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template("{{ messages }}")
    for name, value in more.items():
        writer.add_uint32(f"llama.{name}", value)
    for name in ("token_embd.weight", "output.weight", "blk.0.attn_q.weight"):
        writer.add_tensor(name, np.zeros((4, 8), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def write_safetensors(file: Path, header: dict[str, Any], data_bytes: int) -> None:
    """A safetensors file with this header, right or wrong, and so many zero bytes of data."""
    raw = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(raw)) + raw + bytes(data_bytes))


def _write_json(file: Path, content: object) -> None:
    file.write_text(json.dumps(content), encoding="utf-8")


def _change_config(**changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        config.update(changes)
        _write_json(folder / "config.json", {key: value for key, value in config.items() if value is not None})

    return change


def _tensors(data_bytes: int, **offsets: tuple[int, int]) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        header = {
            name: {"dtype": "F32", "shape": [(last - first) // 4], "data_offsets": [first, last]}
            for name, (first, last) in offsets.items()
        }
        write_safetensors(folder / "model.safetensors", header, data_bytes)

    return change


def _weights(content: bytes, name: str = "model.safetensors") -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        (folder / name).write_bytes(content)

    return change


def _without(*names: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        for name in names:
            (folder / name).unlink()

    return change


def _with(name: str, content: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(content, encoding="utf-8")

    return change


def _truncate(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-7])


def _missing_shard(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    shards = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    _write_json(folder / "model.safetensors.index.json", {"weight_map": shards})


def _binary_config(folder: Path) -> None:
    (folder / "config.json").write_bytes(b"\xff\xfe\x00")


def _only_adapter(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
    _write_json(folder / "adapter_config.json", {})


_INDEX = "model.safetensors.index.json"
_MODULES = "modules.json"

BROKEN: dict[str, tuple[str, Callable[[Path], None]]] = {
    "config.json is not there": ("checkpoint_config", _without("config.json")),
    "config.json is cut": ("checkpoint_config", _with("config.json", '{"model_type": "llama", ')),
    "config.json is a list": ("checkpoint_config", _with("config.json", "[]")),
    "config.json is nested without end": ("checkpoint_config", _with("config.json", "[" * 100_000)),
    "config.json is binary": ("checkpoint_config", _binary_config),
    "config.json names no model type": ("checkpoint_config", _change_config(model_type=None)),
    "there are no weights": ("checkpoint_no_weights", _without("model.safetensors")),
    "the weights are pickled": ("checkpoint_pickled", _weights(b"\x80\x04", "pytorch_model.bin")),
    "a pickle is called safetensors": ("checkpoint_pickled", _weights(b"\x80\x04\x95\x00\x00\x00\x00\x00" * 4)),
    "a zipped pickle is called safetensors": ("checkpoint_pickled", _weights(b"PK\x03\x04\x00\x00\x08\x08" * 4)),
    "the weights are an adapter": (
        "checkpoint_adapter",
        _only_adapter,
    ),
    "the weights are a Git LFS pointer": (
        "checkpoint_corrupt",
        _weights(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"),
    ),
    "the weights are empty": ("checkpoint_corrupt", _weights(b"")),
    "the weights are cut": ("checkpoint_corrupt", _truncate),
    "the header is longer than the file": ("checkpoint_corrupt", _weights(struct.pack("<Q", 1000) + b"{}")),
    "the header claims a gigabyte": ("checkpoint_corrupt", _weights(struct.pack("<Q", 1 << 30) + b"{}")),
    "the header is no JSON": ("checkpoint_corrupt", _weights(struct.pack("<Q", 2) + b"{{")),
    "the header is a list": ("checkpoint_corrupt", _weights(struct.pack("<Q", 2) + b"[]")),
    "a tensor has no offsets": (
        "checkpoint_corrupt",
        lambda folder: write_safetensors(folder / "model.safetensors", {"a": {"dtype": "F32", "shape": [1]}}, 4),
    ),
    "an offset is outside the file": ("checkpoint_corrupt", _tensors(8, a=(0, 16))),
    "tensors overlap": ("checkpoint_corrupt", _tensors(12, a=(0, 8), b=(4, 12))),
    "tensors leave a gap": ("checkpoint_corrupt", _tensors(12, a=(0, 4), b=(8, 12))),
    "bytes are left over": ("checkpoint_corrupt", _tensors(12, a=(0, 8))),
    "a shard is not there": ("checkpoint_corrupt", _missing_shard),
    "a shard lies outside": ("checkpoint_corrupt", _with(_INDEX, '{"weight_map": {"a": "../a.safetensors"}}')),
    "the index is empty": ("checkpoint_corrupt", _with(_INDEX, "{}")),
    "there is no tokenizer": ("checkpoint_no_tokenizer", _without("tokenizer.json")),
    "the model type is unknown": (
        "checkpoint_unsupported",
        _change_config(model_type="lama", architectures=["LamaForCausalLM"]),
    ),
    "the architecture cannot be deployed": (
        "checkpoint_unsupported",
        _change_config(model_type="detr", architectures=["DetrForObjectDetection"]),
    ),
    "there is no architecture": ("checkpoint_unsupported", _change_config(architectures=None)),
    "the configuration maps to its own code": (
        "checkpoint_remote_code",
        _change_config(auto_map={"AutoModelForCausalLM": "modeling_x.X"}),
    ),
    "the tokenizer maps to its own code": (
        "checkpoint_remote_code",
        _with("tokenizer_config.json", '{"auto_map": {"AutoTokenizer": ["x.X", null]}}'),
    ),
    "there is Python code": ("checkpoint_remote_code", _with("modeling_x.py", "")),
    "there is Python code deeper inside": ("checkpoint_remote_code", _with("custom_generate/generate.py", "")),
    "a module is no part of sentence-transformers": (
        "checkpoint_remote_code",
        _with(_MODULES, '[{"idx": 0, "name": "0", "path": "", "type": "os.path"}]'),
    ),
    "a module lies outside": (
        "checkpoint_remote_code",
        _with(
            _MODULES, '[{"idx": 0, "name": "0", "path": "..", "type": "sentence_transformers.models.Transformer"}]'
        ),
    ),
    "the list of modules is damaged": ("checkpoint_config", _with(_MODULES, "{}")),
}
"""What is wrong -> the error's code, and the change that makes `placeholder` so."""

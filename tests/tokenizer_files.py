"""Tokenizers of every kind that our models have: real ones where a copy is at hand, small ones trained on the spot."""

import json
import os
from functools import cache
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import GPT2TokenizerFast, LlamaTokenizer, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import import_protobuf
from transformers.tokenization_utils_base import generate_merges

from icl_lib.files.paths import root
from icl_lib.models import load_tokenizer
from icl_lib.tasks import load_tasks

DATA = Path(os.environ.get("ICL_LIB_TASK_DATA", root().parent / "shared" / "data")) / "tokenizers"
CORPUS = ["Follow the pattern:\nX -> Y\nQ: A: example:\n"] + [
    f"{x} -> {y}\n" for t in load_tasks("embedded").values() for x, y in t.pairs
]
CHAT = ["<start_of_turn>", "<end_of_turn>", "<|user|>"]  # special tokens of Gemma and of Phi-3
# The first cut of Qwen2 and Llama 3: a mark takes the line end after it along.
MODERN = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def gpt2():
    """Byte-level BPE whose offsets include the blank before a word, whose BOS is its end of text."""
    return GPT2TokenizerFast(vocab=str(DATA / "gpt2" / "encoder.json"), merges=str(DATA / "gpt2" / "vocab.bpe"))


def pythia_20B():
    """Byte-level BPE with NFC, whose offsets leave the blank out; as on the hub, BOS is the end of text."""
    end = "<|endoftext|>"
    return PreTrainedTokenizerFast(
        tokenizer_file=str(DATA / "pythia_20B" / "tokenizer.json"), bos_token=end, eos_token=end
    )


def sentencepiece(file: str):
    """The parsed `tokenizer.model` of SentencePiece."""
    proto = import_protobuf().ModelProto()
    proto.ParseFromString((DATA / file).read_bytes())
    return proto


def mistral_v1_sentencepiece():
    """SentencePiece BPE with byte fallback and a blank put before the text, in transformers' Llama tokenizer."""
    pieces = sentencepiece("mistral_v1_sentencepiece/tokenizer.model").pieces
    vocab = {piece.piece: i for i, piece in enumerate(pieces)}
    return LlamaTokenizer(
        vocab=vocab, merges=generate_merges(vocab, skip_tokens=[p.piece for p in pieces if p.type != 1])
    )


def sentencepiece_test():
    """SentencePiece unigram of 1,000 pieces without bytes: neighbours that it does not know become one token."""
    proto = sentencepiece("sentencepiece_test/test_model.model")
    tokenizer = Tokenizer(models.Unigram([(p.piece, p.score) for p in proto.pieces], unk_id=0))
    tokenizer.normalizer = normalizers.Precompiled(proto.normalizer_spec.precompiled_charsmap)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(split=False)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def icl_tiny():
    """The embedded model's: whole words, blanks dropped."""
    return load_tokenizer(root() / "assets" / "icl-tiny")


def _bytes(trim_offsets: bool, cut: str | None) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    levels = pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=trim_offsets, use_regex=cut is None)
    tokenizer.pre_tokenizer = (
        levels if cut is None else pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(cut), "isolated"), levels])
    )
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=trim_offsets)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    lines = [*CORPUS, *["a.\nb -> c.\n"] * 50]  # so that ".\n" becomes a token where the cut allows it
    tokenizer.train_from_iterator(
        lines, trainers.BpeTrainer(vocab_size=500, initial_alphabet=alphabet, show_progress=False)
    )
    return tokenizer


def small_gpt2():
    """As GPT-2 and Pythia; no BOS, no pad token."""
    return PreTrainedTokenizerFast(tokenizer_object=_bytes(trim_offsets=True, cut=None))


def small_qwen():
    """As Qwen2: ".\\n" is one token; no BOS, a pad token, and special tokens for chats."""
    fast = PreTrainedTokenizerFast(
        tokenizer_object=_bytes(False, MODERN), pad_token="<|endoftext|>", eos_token="<|im_end|>"
    )
    fast.add_special_tokens(
        {"additional_special_tokens": [AddedToken("<|user|>", rstrip=True, special=True), *CHAT[:2]]}
    )
    return fast


def small_gemma():
    """As Gemma: BPE over the whole text with ▁ for blanks, bytes for what is unknown, BOS by its post-processor."""
    special = ["<pad>", "<eos>", "<bos>", "<unk>", *CHAT]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    # In training no piece goes across words or lines, as in SentencePiece; with such pieces the text need not be cut.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split("\n", "isolated"), pre_tokenizers.Metaspace(prepend_scheme="never")]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=900, special_tokens=special + [f"<0x{i:02X}>" for i in range(256)], show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 2)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", bos_token="<bos>", unk_token="<unk>"
    )


def small_unigram():
    """As Llama and XLM: unigram pieces with ▁ before words, and bytes for what is unknown."""
    special = ["<unk>", "<s>", "</s>", *[f"<0x{i:02X}>" for i in range(256)]]
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="first")])
    lines = [part for line in CORPUS for part in line.splitlines()]  # the line end is not a piece
    tokenizer.train_from_iterator(
        lines, trainers.UnigramTrainer(vocab_size=900, special_tokens=special, unk_token="<unk>", show_progress=False)
    )
    pieces = [tuple(piece) for piece in json.loads(tokenizer.to_str())["model"]["vocab"]]
    tokenizer.model = models.Unigram(pieces, unk_id=0, byte_fallback=True)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def small_wordpiece():
    """As BERT: words cut at blanks and marks, which drops line ends; a word with an unknown letter is unknown."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    tokenizer.train_from_iterator(
        CORPUS, trainers.WordPieceTrainer(vocab_size=900, special_tokens=special, show_progress=False)
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="[PAD]", bos_token="[CLS]", eos_token="[SEP]"
    )


REAL = [
    kind for kind in (gpt2, pythia_20B, mistral_v1_sentencepiece, sentencepiece_test) if (DATA / kind.__name__).is_dir()
]
OWN = [icl_tiny, small_gpt2, small_qwen, small_gemma, small_unigram, small_wordpiece]
NAMES = [kind.__name__ for kind in REAL + OWN]


@cache
def tokenizer(name: str):
    """The tokenizer of that name, made once."""
    return globals()[name]()

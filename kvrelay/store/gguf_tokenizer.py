"""A `tokenizer.json` rebuilt from GGUF metadata.

GGUF keeps a tokenizer's tables (tokens, types, merges or scores) and only the *name* of its
text splitting rule; the rules known here are written out, any other is refused by name.
"""

from dataclasses import dataclass
from enum import IntEnum
from typing import Any

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)

from kvrelay.errors import ModelInvalid
from kvrelay.store.gguf_file import GgufFile

SPACE = "\u2581"
"""How SentencePiece writes a space."""

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_TAIL = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_SPLIT_RULES = {
    "llama-bpe": _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + _TAIL,
    "qwen2": _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + _TAIL,
}
BYTE_LEVEL_RULES = ("default", "gpt-2", "smollm", *_SPLIT_RULES)
"""Values of `tokenizer.ggml.pre` that can be rebuilt."""


class TokenType(IntEnum):
    """`tokenizer.ggml.token_type`."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """The tables both kinds of tokenizer share."""

    tokens: list[str]
    types: list[int]

    def of_type(self, *types: TokenType) -> list[str]:
        """The tokens of these types, in order of id."""
        return [t for t, kind in zip(self.tokens, self.types, strict=True) if kind in types]


def build_tokenizer(file: GgufFile) -> Tokenizer:
    """The tokenizer `file` describes.

    Raises:
        ModelInvalid: a kind or a splitting rule that is not known, or tables that disagree.
    """
    vocabulary = _vocabulary(file)
    kind = file.get("tokenizer.ggml.model", str)
    if kind == "gpt2":
        tokenizer = _byte_level_bpe(file, vocabulary)
    elif kind == "llama":
        tokenizer = _sentencepiece_bpe(file, vocabulary)
    else:
        raise ModelInvalid(file.path, f"tokenizer model {kind} is not one of gpt2, llama")
    special = vocabulary.of_type(TokenType.CONTROL)
    if kind == "llama":
        special += vocabulary.of_type(TokenType.UNKNOWN)
    tokenizer.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in special])
    own = vocabulary.of_type(TokenType.USER_DEFINED)
    tokenizer.add_tokens([AddedToken(t, normalized=False, special=False) for t in own])
    if tokenizer.get_vocab_size() != len(vocabulary.tokens):
        raise ModelInvalid(
            file.path,
            f"{len(vocabulary.tokens)} tokens make a vocabulary of {tokenizer.get_vocab_size()}",
        )
    return tokenizer


def tokenizer_config(file: GgufFile) -> dict[str, Any]:
    """The `tokenizer_config.json` beside it. The chat template has a file of its own."""
    vocabulary = _vocabulary(file)
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": file.get(f"{file.arch}.context_length", int),
    }
    for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"), ("unk", "unknown")):
        token = _token_of(file, vocabulary, key)
        if token is not None:
            config[f"{name}_token"] = token
    return config


def chat_template(file: GgufFile) -> str | None:
    """The model's chat template, if it has one."""
    return file.find("tokenizer.chat_template", str)


def _vocabulary(file: GgufFile) -> Vocabulary:
    tokens = file.get("tokenizer.ggml.tokens", list)
    types = file.get("tokenizer.ggml.token_type", list)
    if len(types) != len(tokens):
        raise ModelInvalid(
            file.path, f"tokenizer has {len(tokens)} tokens and {len(types)} token types"
        )
    return Vocabulary(tokens, types)


def _byte_level_bpe(file: GgufFile, vocabulary: Vocabulary) -> Tokenizer:
    rule = file.get("tokenizer.ggml.pre", str, "default")
    if rule not in BYTE_LEVEL_RULES:
        raise ModelInvalid(
            file.path,
            f"tokenizer splitting rule {rule} is not one of {', '.join(BYTE_LEVEL_RULES)}",
        )
    vocab = {token: token_id for token_id, token in enumerate(vocabulary.tokens)}
    merges = [_pair(file, merge) for merge in file.get("tokenizer.ggml.merges", list)]
    for merge in merges:
        if not (merge[0] in vocab and merge[1] in vocab and "".join(merge) in vocab):
            raise ModelInvalid(file.path, f"tokenizer merge {merge} is not of its own tokens")
    model = models.BPE(vocab=vocab, merges=merges, ignore_merges=rule == "llama-bpe")
    tokenizer = Tokenizer(model)
    if rule == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = _byte_level_splitter(rule)
    tokenizer.decoder = decoders.ByteLevel()
    # llama.cpp's default for this family of rules, when the file does not say.
    if file.get("tokenizer.ggml.add_bos_token", bool, rule == "llama-bpe"):
        tokenizer.post_processor = _begin_with_bos(file, vocabulary)
    return tokenizer


def _byte_level_splitter(rule: str) -> pre_tokenizers.PreTokenizer:
    if rule in _SPLIT_RULES:
        return pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(_SPLIT_RULES[rule]), behavior="isolated", invert=False),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    gpt2 = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    if rule == "smollm":
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), gpt2])
    return gpt2


def _sentencepiece_bpe(file: GgufFile, vocabulary: Vocabulary) -> Tokenizer:
    scores = file.get("tokenizer.ggml.scores", list)
    if len(scores) != len(vocabulary.tokens):
        raise ModelInvalid(
            file.path, f"tokenizer has {len(vocabulary.tokens)} tokens and {len(scores)} scores"
        )
    unknown = vocabulary.of_type(TokenType.UNKNOWN)
    vocab = {token: token_id for token_id, token in enumerate(vocabulary.tokens)}
    tokenizer = Tokenizer(
        models.BPE(
            vocab=vocab,
            merges=merges_of_scores(vocabulary, scores),
            unk_token=unknown[0] if unknown else None,
            fuse_unk=True,
            byte_fallback=bool(vocabulary.of_type(TokenType.BYTE)),
        )
    )
    spaces = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if file.get("tokenizer.ggml.add_space_prefix", bool, True):
        prefixed = [normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)]
        tokenizer.normalizer = normalizers.Sequence(prefixed)
        tokenizer.decoder = decoders.Sequence([*spaces, decoders.Strip(" ", 1, 0)])
    else:
        tokenizer.normalizer = normalizers.Replace(" ", SPACE)
        tokenizer.decoder = decoders.Sequence(spaces)
    if file.get("tokenizer.ggml.add_bos_token", bool, True):
        tokenizer.post_processor = _begin_with_bos(file, vocabulary)
    return tokenizer


def merges_of_scores(vocabulary: Vocabulary, scores: list[float]) -> list[tuple[str, str]]:
    """The merge list that makes BPE do what SentencePiece does with `scores`.

    SentencePiece joins the neighbours whose union scores best; so every way to halve a
    piece is a merge, and merges are ranked by the score of what they make.
    """
    mergeable = (TokenType.NORMAL, TokenType.USER_DEFINED, TokenType.UNUSED)
    ids = {
        token: token_id
        for token_id, token in enumerate(vocabulary.tokens)
        if vocabulary.types[token_id] in mergeable
    }
    ranked: list[tuple[float, int, int, str, str]] = []
    for token, token_id in ids.items():
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in ids and right in ids:
                ranked.append((-scores[token_id], token_id, ids[left], left, right))
    ranked.sort()
    return [(left, right) for *_, left, right in ranked]


def _pair(file: GgufFile, merge: str) -> tuple[str, str]:
    left, _, right = merge.partition(" ")
    if not left or not right or " " in right:
        raise ModelInvalid(file.path, f"tokenizer merge {merge!r} is not a pair of tokens")
    return left, right


def _begin_with_bos(file: GgufFile, vocabulary: Vocabulary) -> processors.PostProcessor:
    bos = _token_of(file, vocabulary, "bos")
    if bos is None:
        raise ModelInvalid(file.path, "tokenizer wants a bos token and names none")
    bos_id = file.get("tokenizer.ggml.bos_token_id", int)
    return processors.TemplateProcessing(
        single=[bos, "$A"], pair=[bos, "$A", bos, "$B:1"], special_tokens=[(bos, bos_id)]
    )


def _token_of(file: GgufFile, vocabulary: Vocabulary, key: str) -> str | None:
    token_id = file.find(f"tokenizer.ggml.{key}_token_id", int)
    if token_id is None:
        return None
    if not 0 <= token_id < len(vocabulary.tokens):
        raise ModelInvalid(
            file.path, f"{key} token {token_id} is outside [0, {len(vocabulary.tokens)})"
        )
    return vocabulary.tokens[token_id]

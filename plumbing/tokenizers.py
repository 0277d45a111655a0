"""
Text to tokens and back. A tokenizer is a class and its entry in TOKENIZERS, at the end.

It has kind, its name in the table; size, how many tokens there are; dtype, what a token
takes on disk; unit, of a loss; end, the token between documents, or None; state, what JSON
and checkpoints keep of it; and learn, encode, encode_inside, encode_all and pieces.
"""

import functools
import itertools
import json
import os
import unicodedata
from pathlib import Path

import numpy as np

from plumbing.cli import UserError, need


def clean(text):
    """Texts and prompts alike: each line end is \\n, and half characters (lone surrogates), as
    a terminal or a JSON string may hand them over, are ?."""
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    return text.encode("utf-8", "replace").decode()


def place(text, i):
    """Line and character of text[i], both from 1."""
    return text.count("\n", 0, i) + 1, i - text.rfind("\n", 0, i)


class Tokenizer:
    """What all have in common. A subclass has kind, encode_each(texts) and decode(ids)."""

    unit = "nats/token"
    end = None
    between = "\n"  # documents, if there is no token for it

    def __init__(self, size, vocab):
        self.size = size
        self.dtype = np.dtype("<u2" if size <= 2**16 else "<u4")
        self.state = dict(kind=self.kind, vocab=vocab)

    def encode(self, text):
        """(L,)"""
        return self.encode_all([clean(text)])

    def encode_inside(self, text):
        """The same for a text that stands behind another one."""
        return self.encode(text)

    def separator(self):
        """The tokens between two documents."""
        if self.end is not None:
            return np.array([self.end], self.dtype)
        return self.encode_inside(self.between)

    def encode_all(self, texts):
        """The tokens (L,) of several documents."""
        separator = self.separator() if len(texts) > 1 else None
        parts = []
        for ids in self.encode_each(texts):
            parts += [separator, np.array(ids, self.dtype)]
        return np.concatenate(parts[1:])

    def pieces(self, ids):
        """The text of each token: what it adds to that of the few before it. A character
        may need several tokens, and stands with the last; a word may begin with a space
        that shows only after another word."""
        pieces = []
        before = 0  # where to decode from: the beginning of a whole character
        shown = 0  # how many tokens have their text
        for i in range(1, len(ids) + 1):
            text = self.decode(ids[before:i])
            if text.endswith("\ufffd") and i < len(ids):  # half a character
                pieces.append("")
                continue

            pieces.append(text[len(self.decode(ids[before:shown])) :])
            before, shown = shown, i
        return pieces


class Characters(Tokenizer):
    """One token for each character of the text; a line end between documents."""

    kind = "char"
    unit = "nats/char"

    def __init__(self, vocab):
        """vocab: all characters there are, by code point."""
        super().__init__(len(vocab), vocab)
        self.vocab = vocab
        self.known = set(vocab)
        self.codes = np.array([ord(c) for c in vocab], np.uint32)

    def encode_each(self, texts):
        for text in texts:
            if not set(text) <= self.known:
                text = self.in_known_form(text)
            codes = np.frombuffer(text.encode("utf-32-le"), np.uint32)
            yield np.searchsorted(self.codes, codes)

    def in_known_form(self, text):
        """é is one character or two (NFC, NFD), and a prompt may have the other form. UserError
        if that is not all that is unknown."""
        forms = [unicodedata.normalize(form, text) for form in ("NFC", "NFD")]
        text = min((text, *forms), key=lambda form: len(set(form) - self.known))
        unknown = [c for c in dict.fromkeys(text) if c not in self.known]
        if unknown:
            line, character = place(text, text.index(unknown[0]))
            hint = "; in bash, $'one\\ntwo' has a line end" if "\\" in unknown else ""
            raise UserError(
                f"{', '.join(map(repr, unknown[:9]))} (first in line {line}, character "
                f"{character}) does not occur in the text that this model was trained on{hint}"
            )
        return text

    def pieces(self, ids):
        return [self.vocab[i] for i in ids]


class GPT2(Tokenizer):
    """GPT-2's byte pairs, by tiktoken, which downloads them once, or has them in the folder
    that the environment variable TIKTOKEN_CACHE_DIR names. <|endoftext|> between
    documents."""

    kind = "gpt2"

    def __init__(self, vocab=None):
        import tiktoken

        try:
            self.bpe = tiktoken.get_encoding("gpt2")
        except Exception as e:  # no network, a proxy, a full disk
            raise UserError(
                f"no GPT-2 vocabulary ({type(e).__name__}): tiktoken needs network once, or "
                "TIKTOKEN_CACHE_DIR set to a folder that has its files"
            ) from None
        super().__init__(self.bpe.n_vocab, vocab)
        self.end = self.bpe.eot_token

    def encode_each(self, texts):
        """On all cores. What looks like <|endoftext|> is plain text."""
        return self.bpe.encode_ordinary_batch(texts, num_threads=os.cpu_count())

    def decode(self, ids):
        return self.bpe.decode(ids)


class HuggingFace(Tokenizer):
    """A tokenizer.json, as it lies beside a pretrained model, by the package tokenizers."""

    kind = "huggingface"
    between = "\n\n"

    def __init__(self, vocab):
        """vocab: the text of tokenizer.json, and the end-of-text token or None."""
        try:
            from tokenizers import Tokenizer as FromJson
        except ImportError:
            raise UserError("a tokenizer.json needs a package: pip install tokenizers") from None
        try:
            text, end = vocab
            self.bpe = FromJson.from_str(text)
            self.end = None if end is None else self.bpe.token_to_id(end)
        except Exception as e:  # tokenizers raises nothing more special
            raise UserError(f"the tokenizer.json is damaged ({str(e)[:60]})") from None

        self.bpe.encode_special_tokens = True  # what looks like one is plain text
        self.bpe.no_truncation()
        self.bpe.no_padding()
        super().__init__(self.bpe.get_vocab_size(), [text, end])
        named = {self.bpe.token_to_id(f"<0x{byte:02X}>"): byte for byte in range(256)}
        self.bytes = {} if None in named else named

    @classmethod
    def at(cls, folder):
        """That of a folder, which may name the end-of-text token in tokenizer_config.json."""
        end = None
        config = Path(folder, "tokenizer_config.json")
        if config.is_file():
            try:
                end = json.loads(config.read_text("utf-8")).get("eos_token")
                end = end["content"] if isinstance(end, dict) else end
            except (ValueError, AttributeError, KeyError):
                raise UserError(f"{config} is damaged") from None
        return cls([Path(folder, "tokenizer.json").read_text("utf-8"), end])

    def encode_each(self, texts):
        return [found.ids for found in self.bpe.encode_batch(texts, add_special_tokens=False)]

    @functools.cached_property
    def inside(self):
        """The same without the mark, "▁" or a space, that stands before what is encoded."""
        off = {"prepend": "", "add_prefix_space": False, "prepend_scheme": "never"}
        unmark = lambda part: part | {k: off[k] for k in off.keys() & part.keys()}  # noqa: E731
        text, end = self.state["vocab"]
        whole = json.loads(text)
        for step in ("normalizer", "pre_tokenizer"):
            whole[step] = json.loads(json.dumps(whole[step]), object_hook=unmark)
        return HuggingFace([json.dumps(whole), end])

    def encode(self, text):
        """A space at the beginning that is taken for the mark is given twice."""
        ids = super().encode(text)
        lost = text[:1] == " " and self.decode(ids) == text[1:]
        return self.encode_inside(f" {text}") if lost else ids

    def encode_inside(self, text):
        """UserError unless it comes out as it went in."""
        text = clean(text)
        [ids] = self.inside.encode_each([text])
        same = self.decode([*self.encode("a"), *ids]) == f"a{text}"
        why = ", and tokenizer_config.json names no eos_token" if text == self.between else ""
        need(same, f"this tokenizer cannot put {text[:20]!r} behind another text as it is{why}")
        return np.array(ids, self.dtype)

    def decode(self, ids):
        """A byte that makes no character spoils none beside it, as it would in the package."""
        whole = []
        for is_byte, run in itertools.groupby(ids, self.bytes.__contains__):
            if is_byte:
                text = bytes(self.bytes[i] for i in run).decode("utf-8", "replace")
                run = [self.bpe.token_to_id(f"<0x{byte:02X}>") for byte in text.encode()]
            whole += map(int, run)
        return self.bpe.decode(whole, skip_special_tokens=False)


TOKENIZERS = {"char": Characters, "gpt2": GPT2}  # by name; others by their folder


def learn(name, batches):
    """The tokenizer of that name, or in that folder, or itself if it is one. The batches of
    texts decide which characters there are."""
    if isinstance(name, Tokenizer):
        return name
    if name not in TOKENIZERS:
        return HuggingFace.at(name)
    if name != "char":
        return TOKENIZERS[name]()
    characters = {Characters.between}
    for text in itertools.chain.from_iterable(batches):
        characters.update(text)
    return Characters(sorted(characters))


def tokenizer_of(kind, vocab):
    """The tokenizer that a checkpoint or meta.json describes."""
    return {**TOKENIZERS, HuggingFace.kind: HuggingFace}[kind](vocab)

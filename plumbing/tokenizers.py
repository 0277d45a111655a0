"""
Text to tokens and back. A tokenizer is a class and its entry in TOKENIZERS, at the end.

It has kind, its name in the table; state, what JSON and checkpoints keep of it; size; dtype, what a
token takes on disk; unit, of a loss; end, the token between documents, or None; and learn, encode,
encode_all and pieces. A batch is a list of (goes a separator before it?, text).
"""

import codecs
import json
from pathlib import Path

import numpy as np

from plumbing.cli import UserError


def dtype_of(size):
    """The smallest that holds the tokens 0 .. size - 1."""
    return np.dtype("<u2" if size <= 2**16 else "<u4")


def clean(text):
    """A terminal or a JSON string may hand over half characters (lone surrogates): now ?."""
    return text.encode("utf-8", "replace").decode()


def joined(batch, separator):
    return clean("".join(separator * separate + text for separate, text in batch))


class Characters:
    """One token for each character of the text; a line end between documents."""

    kind, unit, end = "char", "nats/char", None

    def __init__(self, vocab):
        """vocab: all characters there are, by code point."""
        try:
            self.codes = np.array([ord(c) for c in vocab], np.uint32)
            good = isinstance(vocab, list) and (self.codes[1:] > self.codes[:-1]).all()
        except TypeError:
            good = False
        if not good:
            raise UserError("the vocabulary is no sorted list of characters: it was changed")
        self.vocab, self.size = vocab, len(vocab)
        self.state = dict(kind=self.kind, vocab=vocab)
        self.dtype = dtype_of(self.size)

    @classmethod
    def learn(cls, batches):
        characters = set()
        for batch in batches:
            characters.update(joined(batch, "\n"))
        return cls(sorted(characters))

    def encode(self, text):
        """(L,)"""
        codes = np.frombuffer(clean(text).encode("utf-32-le"), np.uint32)
        unknown = codes[~np.isin(codes, self.codes)]
        if len(unknown):
            raise UserError(
                f"{chr(unknown[0])!r} does not occur in the text that this model was trained on"
            )
        return np.searchsorted(self.codes, codes).astype(self.dtype)

    def encode_all(self, batch):
        return self.encode(joined(batch, "\n"))

    def pieces(self, ids):
        """The text of each token."""
        return [self.vocab[i] for i in ids]


class GPT2:
    """GPT-2's byte pairs, by tiktoken, which downloads them once, or has them in the folder that
    the environment variable TIKTOKEN_CACHE_DIR names. <|endoftext|> between documents."""

    kind, unit, vocab = "gpt2", "nats/token", None

    def __init__(self, vocab=None):
        import tiktoken

        try:
            self.bpe = tiktoken.get_encoding("gpt2")
        except Exception as e:  # no network, a proxy, a full disk, a damaged file
            raise UserError(
                f"no GPT-2 vocabulary ({type(e).__name__}): tiktoken needs network once, or "
                "TIKTOKEN_CACHE_DIR set to a folder that has its files"
            ) from None
        self.size, self.end = self.bpe.n_vocab, self.bpe.eot_token
        self.state = dict(kind=self.kind, vocab=None)
        self.dtype = dtype_of(self.size)

    @classmethod
    def learn(cls, batches):
        return cls()  # it has been learnt long ago

    def encode(self, text):
        """(L,); what looks like <|endoftext|> is plain text."""
        return self.bpe.encode_to_numpy(clean(text), disallowed_special=()).astype(self.dtype)

    def encode_all(self, batch):
        """One call for all is fastest, but for texts that happen to contain the separator."""
        end = "<|endoftext|>"
        if not any(end in text for _, text in batch):
            ids = self.bpe.encode_to_numpy(joined(batch, end), allowed_special={end})
            return ids.astype(self.dtype)
        parts = [np.empty(0, self.dtype)]
        for separate, text in batch:
            parts += [np.array([self.end] * separate, self.dtype), self.encode(text)]
        return np.concatenate(parts)

    def pieces(self, ids):
        """The text of each token. A character may need several: it stands with the last."""
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        pieces = [decoder.decode(self.bpe.decode_single_token_bytes(i)) for i in ids]
        if pieces:
            pieces[-1] += decoder.decode(b"", final=True)
        return pieces


class HuggingFace:
    """A tokenizer.json, as it lies beside a pretrained model, by the package tokenizers."""

    kind, unit = "huggingface", "nats/token"

    def __init__(self, vocab):
        """vocab: the text of tokenizer.json, and the end-of-text token or None."""
        try:
            from tokenizers import Tokenizer
        except ImportError:
            raise UserError("a tokenizer.json needs a package: pip install tokenizers") from None
        try:
            text, end = vocab
            self.bpe = Tokenizer.from_str(text)
            self.end = None if end is None else self.bpe.token_to_id(end)
        except Exception as e:  # tokenizers raises nothing more special
            raise UserError(f"the tokenizer.json is damaged ({str(e)[:60]})") from None
        self.bpe.encode_special_tokens = True  # what looks like one is plain text
        self.bpe.no_truncation()
        self.bpe.no_padding()
        self.size = self.bpe.get_vocab_size()
        self.state = dict(kind=self.kind, vocab=[text, end])
        self.dtype = dtype_of(self.size)

    @classmethod
    def at(cls, folder):
        """That of a folder, which may name the end-of-text token in tokenizer_config.json."""
        try:
            text, end = Path(folder, "tokenizer.json").read_text("utf-8"), None
            if Path(folder, "tokenizer_config.json").is_file():
                about = json.loads(Path(folder, "tokenizer_config.json").read_text("utf-8"))
                end = about.get("eos_token")
                end = end["content"] if isinstance(end, dict) else end
        except (OSError, ValueError, AttributeError, KeyError) as e:
            raise UserError(f"--tokenizer {folder}: cannot read it ({e})") from None
        return cls([text, end])

    def encode(self, text):
        """(L,)"""
        ids = self.bpe.encode(clean(text), add_special_tokens=False).ids
        return np.array(ids, self.dtype)

    def encode_all(self, batch):
        between = self.encode("\n\n") if self.end is None else np.array([self.end], self.dtype)
        parts = [np.empty(0, self.dtype)]
        for separate, text in batch:
            parts += [between, self.encode(text)] if separate else [self.encode(text)]
        return np.concatenate(parts)

    def pieces(self, ids):
        """The text of each token: by what it adds to that of the few before it, as a character may
        need several tokens, and a word may begin with a space that is not in its token."""
        say = lambda a, b: self.bpe.decode(ids[a:b], skip_special_tokens=False)  # noqa: E731
        # shown: how many tokens have their text; before: a place to decode from, at a whole one
        pieces, before, shown = [], 0, 0
        for i in range(1, len(ids) + 1):
            text = say(before, i)
            whole = not text.endswith("\ufffd") or i == len(ids)
            pieces.append(text[len(say(before, shown)) :] if whole else "")
            before, shown = (shown, i) if whole else (before, shown)
        return pieces


TOKENIZERS = {"char": Characters, "gpt2": GPT2}  # by name; others by their folder


def learn(name, batches):
    """The tokenizer of that name, for these texts, or the one in a folder with tokenizer.json."""
    return TOKENIZERS[name].learn(batches) if name in TOKENIZERS else HuggingFace.at(name)


def tokenizer_of(kind, vocab):
    """The tokenizer that a checkpoint or meta.json describes."""
    kinds = {**TOKENIZERS, HuggingFace.kind: HuggingFace}
    if kind not in kinds:
        raise UserError(f"there is no tokenizer {kind!r}; there are {', '.join(kinds)}")
    return kinds[kind](vocab)

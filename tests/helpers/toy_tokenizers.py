"""Tokenizers of one token per character, some with a fault, and byte-level BPE trained here."""

BOS = 1


class CharacterTokenizer:
    """One token per character, except that BOS is 1: stable prefixes, exact lengths."""

    path, sha256, vocab_size, bos_id, eos_id = "characters", "", 2**16, BOS, None
    end_ids = ()

    def encode(self, text):
        return [ord(character) for character in text]

    def decode(self, ids):
        return "".join(map(chr, ids))


class MergingTokenizer(CharacterTokenizer):
    """Merges the last two characters, so that a longer text changes earlier tokens."""

    def encode(self, text):
        return [*super().encode(text[:-2]), 2**17 + ord(text[-1])]


class SpaceTokenizer(CharacterTokenizer):
    """Joins the space before a digit to it, as byte-level BPE may do."""

    def encode(self, text):
        ids = []
        for character in text:
            if ids and ids[-1] == ord(" ") and character.isdigit():
                ids[-1] = 2**17 + ord(character)
            else:
                ids.append(ord(character))
        return ids

    def decode(self, ids):
        return "".join(chr(k) if k < 2**17 else " " + chr(k - 2**17) for k in ids)


class ForgetfulTokenizer(CharacterTokenizer):
    """Has one token for all digits."""

    def encode(self, text):
        return [ord("0") if character.isdigit() else ord(character) for character in text]


def train_byte_level(texts, vocab_size, special_tokens=("<s>", "</s>"), words=None, **options):
    """A byte-level BPE of the tokenizers library.

    Args:
        words (str, optional): Pattern that text is cut by; GPT-2's by default.
        **options: Of `pre_tokenizers.ByteLevel`.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    inner = Tokenizer(models.BPE())
    options = {"add_prefix_space": False, "use_regex": words is None, **options}
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(**options)
    if words is not None:
        cut = pre_tokenizers.Split(Regex(words), "isolated")
        inner.pre_tokenizer = pre_tokenizers.Sequence([cut, inner.pre_tokenizer])
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(special_tokens),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator(texts, trainer)
    return inner


def save_fast(inner, folder, **options):
    """Write a tokenizer as a Hugging Face folder; give the folder."""
    from transformers import PreTrainedTokenizerFast

    options = {"bos_token": "<s>", "eos_token": "</s>", **options}
    PreTrainedTokenizerFast(tokenizer_object=inner, **options).save_pretrained(str(folder))
    return folder

"""Train a lossless sentencepiece BPE model: byte fallback, single digits, white space kept.

    python examples/quickstart/train_tokenizer.py text.jsonl --vocab-size 2048 --output x.model

Ids: 0 `<unk>` (never used, bytes take its place), 1 `<s>`, 2 `</s>`, then newline, 256 bytes and
the learned pieces. The same texts and size give the same file.
"""

import argparse
import json
from pathlib import Path

import sentencepiece

# sentencepiece drops lines over max_sentence_length bytes; a character has at most 4 bytes.
LONGEST = 2048


def train_sentencepiece(texts, output, vocab_size):
    """Write the model of some documents."""
    lines = (
        line[start : start + LONGEST]
        for text in texts
        for line in text.split("\n")
        for start in range(0, len(line), LONGEST)
    )
    with Path(output).open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=lines,
            model_writer=file,
            model_type="bpe",
            vocab_size=vocab_size,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            user_defined_symbols=["\n"],
            byte_fallback=True,
            split_digits=True,
            allow_whitespace_only_pieces=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            max_sentence_length=4 * LONGEST,
            num_threads=2,
            minloglevel=2,
        )


def main():
    """Read JSON lines and write the model."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("input", nargs="+", type=Path, help="JSON lines")
    parser.add_argument("--vocab-size", type=int, required=True)
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    texts = (json.loads(line)["text"] for path in args.input for line in path.open("rb"))
    train_sentencepiece(texts, args.output, args.vocab_size)
    print(f"wrote {args.output}: {args.vocab_size} tokens")


if __name__ == "__main__":
    main()

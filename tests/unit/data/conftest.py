import json

import pytest
from tiny_corpus import make_text
from train_tokenizer import train_sentencepiece


@pytest.fixture(scope="session")
def model_path(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tiny.model"
    train_sentencepiece((make_text(seed, 100) for seed in range(20)), path, 340)
    return path


@pytest.fixture
def corpus(tmp_path):
    """Twelve documents of very different lengths, in one JSON-lines file."""
    path = tmp_path / "corpus.jsonl"
    texts = [make_text(seed, words) for seed, words in enumerate((5, 400, 50, 120, 10, 900) * 2)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path

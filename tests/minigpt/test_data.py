"""What load_data finds or makes for a corpus: against the tokens of each document by itself."""

import numpy as np
import pytest

from minigpt.corpus import load_corpus
from minigpt.data import load_data
from minigpt.shards import write_shard
from minigpt.tokenizer import Tokenizer


@pytest.fixture
def words(tmp_path):
    """A folder of sixty small texts."""
    folder = tmp_path / "words"
    folder.mkdir()
    for number in range(60):
        (folder / f"{number}.txt").write_bytes(f"text number {number}, é, some words and more words\n".encode() * 3)
    return folder


@pytest.mark.parametrize("spec", ["bytes", "bpe:300"])
def test_text_becomes_tokens_of_both_sides(words, spec):
    data, corpus = load_data(str(words), spec), load_corpus(str(words))
    for tokens, side in ((data.train.shards[0], corpus.train), (data.held_out, corpus.held_out)):
        assert tokens.dtype == np.uint16
        documents = np.split(tokens, np.flatnonzero(tokens == data.tokenizer.separator))
        assert documents[0].size == 0, "the first token is a separator"
        assert [data.tokenizer.decode_bytes(document[1:]) for document in documents[1:]] == [text for _, text in side]
    assert data.held_out_text == corpus.held_out_text and data.held_out_bytes == len(corpus.held_out_text)
    assert data.byte_lengths[data.held_out].sum() == data.held_out_bytes
    assert data.documents == 60 and data.digest == f"{corpus.digest}+{data.tokenizer.digest}"
    assert corpus.describe() in data.describe() and "vocabulary" in data.describe()


def test_a_tokenizer_is_trained_on_the_training_side_only(words):
    corpus = load_corpus(str(words))
    expected = Tokenizer.train([text for _, text in corpus.train], 300)
    assert load_data(str(words), "bpe:300").tokenizer.digest == expected.digest
    for name, _ in corpus.held_out:
        (words / name).write_bytes(b"something else, else, else, else\n" * 9)
    assert load_data(str(words), "bpe:300").tokenizer.digest == expected.digest
    expected.save(words.parent / "tokenizer.json")
    assert load_data(str(words), str(words.parent / "tokenizer.json")).tokenizer.digest == expected.digest


def shard_folder(folder, tokenizer=None, tokens=(1, 2, 3, 4, 5, 6)):
    folder.mkdir(exist_ok=True)
    for name in ("a_train_1.bin", "a_val_0.bin"):
        write_shard(folder / name, np.array(tokens, np.uint16))
    if tokenizer is not None:
        tokenizer.save(folder / "tokenizer.json")
    return str(folder)


def test_shards_ask_for_their_own_tokenizer(tmp_path, words):
    own = Tokenizer.train([b"some words of words"], 260)
    folder, bare = shard_folder(tmp_path / "own", own), shard_folder(tmp_path / "bare")
    assert load_data(folder).tokenizer.digest == own.digest
    assert load_data(folder, folder + "/tokenizer.json").tokenizer.digest == own.digest
    assert load_data(bare, "bytes").tokenizer.vocab_size == 257
    assert load_data(bare, folder + "/tokenizer.json").tokenizer.digest == own.digest
    for where, spec, message in [
        (folder, "bytes", "'bytes' has digest .*, but the shards in .* were made with"),
        (folder, "bpe:300", "came with another one; expected auto or a path"),
        (bare, "auto", "came without one; expected bytes or a path"),
        (bare, "bpe:300", "came without one"),
    ]:
        with pytest.raises(ValueError, match=message):
            load_data(where, spec)
    with pytest.raises(ValueError, match="token 300 at position 2: expected ids below the vocabulary size 257"):
        load_data(shard_folder(tmp_path / "large", tokens=(1, 2, 300)), "bytes")


def test_bad_requests_are_refused(tmp_path, words):
    for corpus, tokenizer, message in [
        (tmp_path / "nowhere", "auto", "nowhere' does not exist: expected 'stdlib'"),
        ("fineweb10B:x", "auto", "expected fineweb10B:N"),
        ("fineweb10B", "auto", "expected fineweb10B:N"),
        ("fineweb10B:104", "auto", "expected 1 to 103 training shards"),
        ("hf:name", "auto", "expected hf:owner/name"),
        (words, "bpe:many", "expected bpe:N"),
        (words, "bpe:256", "above 256"),
        (words, "nowhere.json", "'nowhere.json' does not exist: expected auto, bytes, bpe:N or the path"),
    ]:
        with pytest.raises(ValueError, match=message):
            load_data(str(corpus), tokenizer, root=tmp_path)

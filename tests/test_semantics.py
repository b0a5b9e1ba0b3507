"""The sources of A(y): tables, .npz files, word vectors and text encoders, and their errors."""

import gzip
import json
import logging
import socket
import sys

import numpy as np
import pytest
import torch

import semantics

DIGITS = [str(digit) for digit in range(10)]
LIT = """1111110 0110000 1101101 1111001 0110011
         1011011 1011111 1110000 1111111 1111011"""  # segments abcdefg of 0 to 9
ANIMALS = ["cat", "dog", "frog"]
NUMBERS = np.random.default_rng(1).normal(size=(3, 4)).astype(np.float32)


def load(source: str, classes, **options) -> torch.Tensor:
    return semantics.load_semantics(classes, semantics=source, **options)


def complaint(call, *args, **options) -> str:
    """The message of the ValueError that the call must end in, which must be a single line."""
    with pytest.raises(ValueError) as caught:
        call(*args, **options)
    message = str(caught.value)
    assert message.strip() and len(message.splitlines()) == 1
    return message


def vectors_from(tmp_path, text: str, classes) -> list:
    path = tmp_path / "vectors.txt"
    path.write_text(text, encoding="utf-8")
    return semantics.read_word_vectors(str(path), classes).tolist()


# ------------------------------------------------------------------------------- choice of a source

def test_standardised_embeddings_keep_their_geometry():
    embeddings = np.random.default_rng(0).normal(0.3, [0.01, 0.04, 0.02, 0.1], (6, 4))
    table = semantics.standardise_embeddings(embeddings)
    assert table.dtype == torch.float32 and table.shape == (6, 4)
    torch.testing.assert_close(table.mean(dim=0), torch.zeros(4), rtol=0, atol=1e-6)
    assert table.pow(2).mean().item() == pytest.approx(1)
    ratio = torch.pdist(table.double()) / torch.pdist(torch.from_numpy(embeddings))
    torch.testing.assert_close(ratio, ratio[:1].expand(15), rtol=1e-5, atol=0)
    fresh, kept = NUMBERS, NUMBERS.astype(np.float64)  # from an encoder, and from its cache
    assert torch.equal(*map(semantics.standardise_embeddings, (fresh, kept)))
    equal = np.full((10, 3), 0.1)  # with a rounded mean, so that differences are not quite zero
    assert "same embedding" in complaint(semantics.standardise_embeddings, equal)


def test_every_source_becomes_standardised_embeddings_of_the_classes(tmp_path):
    numbers, vectors = NUMBERS.astype(np.float64), str(tmp_path / "vectors.txt")
    np.savetxt(vectors, np.c_[ANIMALS, numbers], fmt="%s")
    np.savez(tmp_path / "own.npz", classes=ANIMALS, embeddings=numbers)
    for table, embeddings in [
            (load("onehot", ANIMALS, data_dir=None), np.eye(3)),
            (load("segments", DIGITS, data_dir=None), semantics.segment_table(DIGITS)),
            (load("word2vec", ANIMALS, word_vectors=vectors, data_dir=None), numbers),
            (load(str(tmp_path / "own.npz"), ANIMALS, data_dir=None), numbers)]:
        assert torch.equal(table, semantics.standardise_embeddings(embeddings))


# ---------------------------------------------------------------------------------- table and files

def test_segments_are_those_of_a_seven_segment_display():
    expected = np.array([[int(bit) for bit in digit] for digit in LIT.split()])
    np.testing.assert_array_equal(semantics.segment_table(DIGITS), expected)
    message = complaint(load, "segments", ["0", "ship"])
    assert "'ship'" in message and "--semantics" in message


@pytest.mark.parametrize("kind", ["u1", "i8", "f2", "f8"])
def test_embeddings_are_matched_by_name_and_read_in_double_precision(kind, tmp_path):
    path, rows = tmp_path / "embeddings.npz", np.random.default_rng(0).integers(100, 120, (4, 4))
    names, order = np.array([*ANIMALS, "ship"], dtype="S"), [3, 1, 0, 2]
    np.savez(path, classes=names[order], embeddings=rows[order].astype(kind))
    read = semantics.read_embeddings(path, ["frog", "cat"])
    np.testing.assert_array_equal(read, rows[[2, 0]])
    assert read.dtype == np.float64


@pytest.mark.parametrize("arrays, words", [
    ({"classes": ["cat", "dog", "ship"], "embeddings": NUMBERS}, "'frog'"),
    ({"classes": ANIMALS, "embeddings": NUMBERS[0]}, "shape (4,)"),
    ({"classes": ANIMALS, "embeddings": NUMBERS.astype(str)}, "must be numbers"),
    ({"classes": ANIMALS, "embeddings": NUMBERS[:, :0]}, "shape (3, 0)"),
    ({"classes": ANIMALS, "embeddings": [[1, 2], [1, 2], [3, np.nan]]}, "NaN"),
    ({"classes": ANIMALS, "embeddings": [[1, 2], [1, -1e200], [3, 4]]}, "huge"),
    ({"classes": ANIMALS, "embeddings": NUMBERS[:2]}, "3 names (3 different ones) for 2"),
    ({"classes": [*ANIMALS, "cat"], "embeddings": NUMBERS[[0, 1, 2, 2]]},
     "4 names (3 different ones) for 4"),
    ({"classes": np.array([b"cat", b"dog", b"\xff"]), "embeddings": NUMBERS}, "cannot be read"),
    ({"names": ANIMALS, "embeddings": NUMBERS}, "classes is not a file"),
    ({"classes": np.array(ANIMALS, object), "embeddings": NUMBERS}, "allow_pickle=False")])
def test_wrong_embeddings_are_an_error_that_names_the_file(arrays, words, tmp_path):
    path = tmp_path / "wrong.npz"
    np.savez(path, **arrays)
    message = complaint(load, str(path), ANIMALS)
    assert words in message and str(path) in message


def test_unknown_sources_and_broken_files_are_errors_that_name_the_choices_or_the_file(tmp_path):
    for source in ("CLIP", "embeddings.npy", ""):
        message = complaint(load, source, ANIMALS)
        assert all(word in message for word in (f"'{source}'", *semantics.SEMANTICS, ".npz"))
    path = tmp_path / "broken.npz"
    assert f"no file {path}: check --semantics" in complaint(load, str(path), ANIMALS)
    np.savez(path, classes=ANIMALS, embeddings=NUMBERS)
    whole = path.read_bytes()
    for content in (whole[:len(whole) // 2], b"", b"cat 0.1 0.2\n"):
        path.write_bytes(content)
        message = complaint(load, str(path), ANIMALS)
        assert str(path) in message and "numpy.savez" in message


def test_word_vectors_are_found_among_lines_of_other_kinds(tmp_path):
    text = ("cat 1 2\ndog name@domain.com 8 8\n"  # one of GloVe's files has words with spaces
            "dog\t3\t-4e-1\r\n\nfrog  5 6 \nfro 9 9\n. . 1 1\nÇat 9 9\ncat name@a.com 8 8\n\n")
    for header in ("", "\ufeff", "12 2\n"):  # a byte order mark, word2vec's line of counts
        assert vectors_from(tmp_path, header + text, ANIMALS) == [[1, 2], [3, -0.4], [5, 6]]


def test_words_of_a_name_are_looked_up_as_they_are_then_in_lower_case_and_averaged(tmp_path):
    lower, upper = "bag 1 2\nship 4 4\nfish 7 0\n", "Bag 3 5\nShip 9 9\nFish 9 2\n"
    for text in (lower + upper, upper + lower):
        ours = vectors_from(tmp_path, text, ["Bag", "ship", "Bag/ship-fish", "ship_fish"])
        assert ours == [[3, 5], [4, 4], [14 / 3, 3], [5.5, 2]]
    assert vectors_from(tmp_path, lower, ["Bag", "SHIP"]) == [[1, 2], [4, 4]]
    for text, name in ((upper, "ship"), (lower, "?"), ("", "cat"), (lower, "tree ship")):
        assert f"lacks a word of class '{name}'" in complaint(vectors_from, tmp_path, text, [name])


@pytest.mark.parametrize("content, words", [
    (b"cat 1 2\ndog 3 4\nfrog 5 6 7\n", "one length"),
    (b"cat 1 2\ndog 3 nan\nfrog 5 6\n", "'dog'"), (b"cat\ndog\nfrog\n", "'cat'"),
    (bytes(range(1, 256)) * 40, "'cat'")])
def test_wrong_word_vectors_are_an_error_that_names_the_file(content, words, tmp_path):
    path = tmp_path / "vectors.txt"
    path.write_bytes(content)
    message = complaint(load, "word2vec", ANIMALS, word_vectors=str(path))
    assert words in message and str(path) in message


@pytest.mark.parametrize("content, words", [
    (gzip.compress(b"a 1 2\nb 3 4\n"), "gunzip"), ("a 1 2\nb 3 4\n".encode("utf-16"), "iconv"),
    (b"2 2\na " + np.float32([1, 2]).tobytes() + b"\nb ", "binary=True")])
def test_word_vectors_that_are_no_text_are_an_error_that_tells_how_to_convert_them(content, words,
                                                                                   tmp_path):
    path = tmp_path / "vectors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=words):
        semantics.read_word_vectors(str(path), ["a", "b"])


def test_word_vectors_that_are_not_there_are_an_error(tmp_path):
    for path in (str(tmp_path / "none.txt"), str(tmp_path)):
        message = complaint(load, "word2vec", ANIMALS, word_vectors=path)
        assert f"{path} cannot be read" in message and "check --word-vectors" in message
    assert "--word-vectors FILE" in complaint(load, "word2vec", ANIMALS)


# ------------------------------------------------------------------------------------ text encoders

def test_embeddings_of_an_encoder_are_kept_until_the_texts_change(tmp_path):
    cache, new_prompt = tmp_path / "new" / "folder" / "clip.npz", "a drawing of a {}."
    fresh = iter((NUMBERS, 2 * NUMBERS, 4 * NUMBERS))

    def factor(prompt: str = semantics.PROMPT) -> float:
        kept = semantics.encode_with_cache(lambda texts: next(fresh), ANIMALS, cache, prompt)
        return (kept / NUMBERS).mean()

    assert [factor(), factor()] == [1, 1] and list(cache.parent.iterdir()) == [cache]
    assert [factor(new_prompt), factor(new_prompt)] == [2, 2]
    cache.write_bytes(cache.read_bytes()[:100])
    assert [factor(new_prompt), factor(new_prompt)] == [4, 4]


@pytest.mark.parametrize("encoder, dataset, name, prompt", [
    ("clip", "emnist", "c", "a photo of the handwritten letter c."),
    ("bert", "digits", "3", "a photo of the handwritten digit 3."),
    ("clip", "svhn", "3", "a photo of the house number 3."),
    ("bert", "cifar100", "aquarium_fish", "a photo of a aquarium fish."),
    ("clip", "folder/emnist.npz", "c", "a photo of a c.")])  # a user's file may hold anything
def test_prompts_fit_the_data_set(encoder, dataset, name, prompt, tmp_path, monkeypatch):
    texts = []
    monkeypatch.setattr(semantics, f"{encoder}_embeddings",
                        lambda given: texts.extend(given) or NUMBERS[:2])
    table = load(encoder, [name, "other"], dataset=dataset, data_dir=tmp_path)
    assert texts[0] == prompt
    assert torch.equal(table, semantics.standardise_embeddings(NUMBERS[:2]))
    name = dataset.removeprefix("folder/").removesuffix(".npz")
    assert [path.name for path in tmp_path.iterdir()] == [f"{encoder}-{name}.npz"]


def test_encoders_are_kept_from_logging_and_from_the_global_generator(caplog, tmp_path):
    def fail(texts):
        logging.getLogger("hub").error("again in 8 s")
        torch.randn(3)
        raise ValueError("no connection")

    before = torch.get_rng_state()
    assert complaint(semantics.encode_with_cache, fail, ANIMALS, tmp_path / "x") == "no connection"
    assert torch.equal(torch.get_rng_state(), before) and not caplog.records
    logging.getLogger("own").error("heard again")
    assert [record.message for record in caplog.records] == ["heard again"]


def test_clip_embeddings_are_the_models_text_embeddings_of_unit_length(tmp_path):
    open_clip = pytest.importorskip("open_clip")
    default, name = semantics.clip_embeddings.__kwdefaults__["name"], "tiny-quickgelu"
    config = open_clip.get_model_config(default)
    assert config["embed_dim"] == 512 and config["quick_gelu"]
    config["vision_cfg"] |= {"layers": 1, "width": 64}
    config["text_cfg"] |= {"layers": 2, "width": 16, "heads": 2}
    (tmp_path / f"{name}.json").write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path / f"{name}.json")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = open_clip.create_model(name).eval()
    torch.save(model.half().state_dict(), tmp_path / "clip.pt")  # OpenAI's are in half precision
    texts = ["a photo of a cat.", "a photo of a dog.", "T-shirt/top"]
    with torch.no_grad():
        expected = model.float().encode_text(open_clip.tokenize(texts)).numpy()
    ours = semantics.clip_embeddings(texts, weights=str(tmp_path / "clip.pt"), name=name)
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    np.testing.assert_allclose(ours, expected, atol=1e-5)


def test_clip_weights_that_cannot_be_had_are_an_error(tmp_path, monkeypatch):
    pytest.importorskip("open_clip")
    constants = pytest.importorskip("huggingface_hub").constants
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)  # else it tries again for 46 seconds
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.delattr(socket, "getaddrinfo")
    for weights in ("openai", str(tmp_path / "none.pt")):
        message = complaint(semantics.clip_embeddings, ["a photo of a cat."], weights=weights)
        assert f"'{weights}'" in message and "--semantics" in message


def test_bert_embeddings_are_means_over_the_tokens_of_each_text(tmp_path):
    transformers = pytest.importorskip("transformers")
    vocabulary = "[PAD] [UNK] [CLS] [SEP] [MASK] a photo of cat aqua ##rium fish .".split()
    (tmp_path / "vocab.txt").write_text("\n".join(vocabulary))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(
        {"tokenizer_class": "BertTokenizer", "do_lower_case": True}))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.BertModel(transformers.BertConfig(
            vocab_size=len(vocabulary), hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
            intermediate_size=32)).eval()
    model.save_pretrained(tmp_path)
    texts = ["a photo of a cat.", "a photo of a aquarium fish.", "Cat"]
    tokens = [[2, 5, 6, 7, 5, 8, 12, 3], [2, 5, 6, 7, 5, 9, 10, 11, 12, 3], [2, 8, 3]]
    with torch.no_grad():
        expected = [model(torch.tensor([row])).last_hidden_state[0].mean(dim=0) for row in tokens]
    ours = semantics.bert_embeddings(texts, weights=str(tmp_path))
    np.testing.assert_allclose(ours, torch.stack(expected).numpy(), atol=1e-5)
    missing = str(tmp_path / "missing")
    assert f"'{missing}'" in complaint(semantics.bert_embeddings, texts, weights=missing)


def test_bert_without_its_package_is_an_error_that_tells_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    message = complaint(semantics.bert_embeddings, ["dog"])
    assert "pip install transformers" in message and "--semantics" in message

"""The semantics A(y) of AP-FL's generator (Eq. 11): an embedding per class name."""

import logging
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from data import class_names, first_line, write_atomically, write_cache

ENCODERS = ("clip", "bert")  # encoders of text, with weights to download
SEMANTICS = (*ENCODERS, "word2vec", "onehot", "segments")
PROMPT = "a photo of a {}."  # text for CLIP and BERT (not given in the paper)
PROMPTS = {  # texts for data sets with class names that name no things
    "digits": "a photo of the handwritten digit {}.", "svhn": "a photo of the house number {}.",
    "emnist": "a photo of the handwritten letter {}."}
SEGMENTS = {  # lit segments a..g of a seven-segment display, per digit
    "0": "abcdef", "1": "bc", "2": "abdeg", "3": "abcdg", "4": "bcfg", "5": "acdfg",
    "6": "acdefg", "7": "abc", "8": "abcdefg", "9": "abcdfg"}
HUGE = 1e100  # bound on the numbers of an embedding, since squares of larger ones may overflow


# ------------------------------------------------------------------------------- choice of a source

def load_semantics(classes: Sequence[str], *, semantics: str, dataset: str = "",
                   data_dir: str | Path | None = "data", word_vectors: str | None = None) -> Tensor:
    """A(y): the standardised embeddings (classes, d_A) of class names, from a named source.

    semantics: one of SEMANTICS, or the path of an .npz file with classes and embeddings
    dataset, data_dir: name of the data set and folder, for the prompt and cache of a text encoder
    word_vectors: text file for word2vec.  Raises ValueError, whose message says what to do.
    """
    if semantics == "onehot":
        embeddings = np.eye(len(classes))
    elif semantics == "segments":
        embeddings = segment_table(classes)
    elif semantics == "word2vec":
        embeddings = read_word_vectors(word_vectors, classes)
    elif semantics in ENCODERS:
        encode = {"clip": clip_embeddings, "bert": bert_embeddings}[semantics]
        cache = Path(data_dir) / f"{semantics}-{Path(dataset).stem}.npz"
        embeddings = encode_with_cache(encode, classes, cache, PROMPTS.get(dataset, PROMPT))
    else:
        embeddings = read_embeddings(semantics, classes)
    return standardise_embeddings(embeddings)


def standardise_embeddings(embeddings: np.ndarray) -> Tensor:
    """Centre embeddings (classes, d_A) over the classes and scale them to standard deviation 1.

    Text embeddings are small (about .04) and nearly equal for all classes, while the noise beside
    them is standard normal.  One factor for all entries leaves their geometry as it is.
    Raises ValueError if all classes have the same embedding.
    """
    if (embeddings == embeddings[0]).all():
        raise ValueError("all classes have the same embedding: choose another --semantics")
    # Double precision, so that fresh embeddings and those from a cache give the same bits
    embeddings = embeddings.astype(np.float64)
    centred = embeddings - embeddings.mean(axis=0)
    return torch.from_numpy(centred / np.sqrt((centred**2).mean())).float()


# ---------------------------------------------------------------------------------- table and files

def segment_table(classes: Sequence[str]) -> np.ndarray:
    """Attributes (classes, 7) of digits: the lit segments of a seven-segment display."""
    for name in classes:
        if name not in SEGMENTS:
            raise ValueError("--semantics segments describes the digits 0 to 9, not class "
                             f"{name!r}: choose another --semantics")
    return np.array([[segment in SEGMENTS[name] for segment in "abcdefg"] for name in classes],
                    dtype=np.float64)


def read_embeddings(path: str | Path, classes: Sequence[str]) -> np.ndarray:
    """Embeddings (classes, d_A) of an .npz file, by class name; a bad file raises ValueError."""
    # Reading
    if not str(path).lower().endswith(".npz"):
        raise ValueError(f"unknown semantics '{path}': choose one of {', '.join(SEMANTICS)}, or "
                         "give the path of an .npz file")
    if not Path(path).exists():
        raise ValueError(f"there is no file {path}: check --semantics")
    try:
        with np.load(path, allow_pickle=False) as archive:
            names = class_names(np.asarray(archive["classes"]))
            embeddings = np.asarray(archive["embeddings"])
    except Exception as error:  # numpy and zipfile raise a dozen kinds on a broken file
        raise ValueError(f"{path} cannot be read ({first_line(error)}): expected an .npz written "
                         "by numpy.savez with classes (names) and embeddings") from error

    # Shapes and names
    if embeddings.dtype.kind not in "uif" or embeddings.ndim != 2 or embeddings.shape[1] == 0:
        raise ValueError(f"{path}: embeddings must be numbers of shape (classes, d), not "
                         f"{embeddings.dtype} of shape {embeddings.shape}")
    if len(names) != len(embeddings) or len(set(names)) != len(names):
        raise ValueError(f"{path}: {len(names)} names ({len(set(names))} different ones) for "
                         f"{len(embeddings)} embeddings; each class needs one")

    # Rows of the classes asked for
    for name in classes:
        if name not in names:
            raise ValueError(f"{path} has no embedding of class {name!r}: rename its classes")
    chosen = embeddings[[names.index(name) for name in classes]].astype(np.float64)
    if not (np.abs(chosen) < HUGE).all():
        raise ValueError(f"{path}: embeddings hold NaN, infinite or huge numbers")
    return chosen


# First bytes of files that hold word vectors, but not as text, and what makes text of them
NO_TEXT = {b"\x1f\x8b": "compressed: unpack it by gunzip",
           b"PK\x03\x04": "a zip archive: unpack it",
           b"\xff\xfe": "UTF-16: convert it by iconv -f UTF-16 -t UTF-8",
           b"\xfe\xff": "UTF-16: convert it by iconv -f UTF-16 -t UTF-8"}


def read_word_vectors(path: str | None, classes: Sequence[str]) -> np.ndarray:
    """Mean word vectors (classes, d_A) over the words of each class name, from a text file.

    path: lines of a word and its numbers (GloVe, word2vec).  Raises ValueError on a missing word.
    """
    if path is None:
        raise ValueError("--semantics word2vec reads a text file: name it by --word-vectors FILE")
    # Words are looked up as they are, then in lower case.
    vectors = find_vectors(path, {word.lower() for name in classes for word in words_of(name)})
    by_class = [[vectors.get(word, vectors.get(word.lower())) for word in words_of(name)]
                for name in classes]
    for name, parts in zip(classes, by_class):
        if not parts or any(vector is None for vector in parts):
            raise ValueError(f"{path} lacks a word of class {name!r}: use another --word-vectors")
    if len({len(vector) for parts in by_class for vector in parts}) != 1:
        raise ValueError(f"{path} has words with more numbers than others: all need one length")
    return np.stack([np.mean(parts, axis=0) for parts in by_class])


def find_vectors(path: str, words: set[str]) -> dict[str, np.ndarray]:
    """Read the vectors of a text file for each word whose lower-case form is in words."""
    vectors = {}
    try:
        with open(path, "rb") as file:
            start = file.read(4096)
        for magic, reason in NO_TEXT.items():
            if start.startswith(magic):
                raise ValueError(f"it is {reason}")
        if b"\0" in start:
            raise ValueError("it is binary: gensim's KeyedVectors.load_word2vec_format(FILE, "
                             "binary=True).save_word2vec_format(TEXT) makes text of word2vec's")
        with open(path, encoding="utf-8-sig", errors="replace") as file:
            for line in file:
                word, _, numbers = line.strip().replace("\t", " ").partition(" ")
                if word.lower() in words:
                    # Some files have lines with more than numbers, which are passed over.
                    with suppress(ValueError):
                        vectors[word] = np.array(numbers.split(), dtype=np.float64)
    except (OSError, ValueError) as error:
        reason = first_line(error)
        raise ValueError(f"{path} cannot be read ({reason}): check --word-vectors") from error
    return {word: vector for word, vector in vectors.items()
            if len(vector) and (np.abs(vector) < HUGE).all()}


def words_of(name: str) -> list[str]:
    """The words of a class name: "T-shirt/top" has three."""
    return "".join(letter if letter.isalnum() else " " for letter in name).split()


# ------------------------------------------------------------------------------------ text encoders

def encode_with_cache(encode: Callable[[list[str]], np.ndarray], classes: Sequence[str],
                      cache: Path, prompt: str = PROMPT) -> np.ndarray:
    """Encode class names as embeddings (classes, d_A), kept in an .npz file for later runs."""
    # Another prompt makes other texts, so that a cache of the former ones is not used.
    texts = [" ".join(prompt.format(name.replace("_", " ")).split()) for name in classes]
    if cache.exists():
        with suppress(ValueError):  # a cache of other texts, or a damaged one, is replaced
            return read_embeddings(cache, texts)
    print(f"encoding the class names for {cache}; weights are downloaded at first use", flush=True)

    # Libraries log retries on standard error, and initialise weights before they load them.
    logging.disable(logging.CRITICAL)
    try:
        with torch.random.fork_rng(devices=[]):
            embeddings = encode(texts)
    finally:
        logging.disable(logging.NOTSET)
    write_cache(cache, lambda path: write_atomically(path, lambda file: np.savez(
        file, classes=np.array(texts), embeddings=embeddings)))
    return embeddings


def clip_embeddings(texts: list[str], *, weights: str = "openai",
                    name: str = "ViT-B-32-quickgelu") -> np.ndarray:
    """CLIP text embeddings of unit length, (texts, 512) for ViT-B/32.

    weights: "openai" (downloaded) or a checkpoint.  Raises ValueError if they cannot be loaded.
    name: name of a model in open_clip (quickgelu is the activation of OpenAI's weights)
    """
    try:
        import open_clip

        model = open_clip.create_model(name, pretrained=weights).eval()
        tokens = open_clip.get_tokenizer(name)(texts)
    except Exception as error:  # kinds of the hub and of the network, which differ by version
        raise ValueError(f"CLIP's weights '{weights}' cannot be loaded ({first_line(error)}): "
                         "check the connection, or choose another --semantics") from error
    with torch.no_grad():
        return model.encode_text(tokens, normalize=True).float().numpy()


def bert_embeddings(texts: list[str], *, weights: str = "bert-base-uncased") -> np.ndarray:
    """BERT embeddings (texts, 768): the mean of the last layer over the tokens of each text.

    weights: name on the Hugging Face hub (downloaded) or a folder.  Raises ValueError without them.
    """
    try:
        from transformers import AutoModel, AutoTokenizer

        tokenizer, model = (kind.from_pretrained(weights) for kind in (AutoTokenizer, AutoModel))
    except Exception as error:  # kinds of the hub and of the network, which differ by version
        raise ValueError(f"--semantics bert cannot load '{weights}' ({first_line(error)}): check "
                         "the connection, or run 'pip install transformers'") from error
    tokens = tokenizer(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        states = model.eval()(**tokens).last_hidden_state
    mask = tokens["attention_mask"][:, :, None]
    return ((states * mask).sum(dim=1) / mask.sum(dim=1)).numpy()

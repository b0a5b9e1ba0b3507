"""AP-FL's semantic generator: the network, its losses, its training, and the semantics A(y).

Wan et al., Asynchronous Personalized Federated Learning through Global Memorization (AP-FL).
Equation numbers below are this paper's.

In reading order: the network (Eq. 11), the losses (Eq. 6-9), training without data, sampling,
where the semantic embeddings of the classes come from, and FedGen's generator of latents.

symbol      name          shape
z, y        z, y          (N, d_z) standard normal noise, (N,) labels
A(y)        semantics[y]  (N, d_A) embeddings of the labels' class names
x_hat       x             (N, C, 32, 32) synthetic samples, standardised like the training images
alpha_k^y   weights       (teachers, classes)
n_s         per_class     samples of each class in a training step
lambda      balance       of Eq. 9
"""

import copy
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data import class_names, drawn, first_line, write_atomically, write_cache
from models import drawing_from

NOISE_DIM = 20  # d_z, the best of those in the paper's Fig. 5
WIDTHS = (128, 64)  # channels of the generator's convolutions, as in the work it is from
BALANCE = 0.5  # lambda, AP-FL Sec. 4.1
DISTANCE = "rms"  # of Eq. 8; not as printed, see PAPERS.md
LATENT_NOISE_DIM, LATENT_HIDDEN = 64, 512  # of FedGen's generator, whose paper has no such CNN
LATENT_LR, LATENT_WEIGHT_DECAY = 3e-4, 1e-2  # of Adam, in FedGen's released code (MNIST)
GENERATOR_LR = 1e-3  # of Adam, as in the work that the network is from (the paper gives none)
SLICE = 450  # samples that a training step holds in memory at a time, some 3 MB each
SAMPLE_BATCH = 250  # synthetic images made at a time
HUGE = 1e100  # no embedding has such a number, and its square would overflow

ENCODERS = ("clip", "bert")  # of text, with weights to download
SEMANTICS = (*ENCODERS, "word2vec", "onehot", "segments")
PROMPT = "a photo of a {}."  # what CLIP and BERT read; the paper does not state its own
PROMPTS = {  # of data sets whose class names are no things
    "digits": "a photo of the handwritten digit {}.", "svhn": "a photo of the house number {}.",
    "emnist": "a photo of the handwritten letter {}."}
SEGMENTS = {  # which of the segments a..g of a seven-segment display a digit lights
    "0": "abcdef", "1": "bc", "2": "abdeg", "3": "abcdg", "4": "bcfg", "5": "acdfg",
    "6": "acdefg", "7": "abc", "8": "abcdefg", "9": "abcdfg"}


# ------------------------------------------------------------------------------------ network

class SemanticGenerator(nn.Module):
    """x_hat = G(z, A(y); omega), Eq. 11: noise and the label's embedding to a 32x32 image.

    The generator of Fang et al., Data-Free Adversarial Distillation, arxiv.org/abs/1912.11006,
    which takes noise alone, with [z ; A(y)] for its input.  Its last batch normalisation gives each
    channel zero mean and unit deviation, which is what standardised training images have.
    semantics: (classes, d_A), kept as a buffer, so that the weights and A(y) travel together
    4,590,083 parameters for d_z = 20, d_A = 512 and three channels.
    """

    def __init__(self, semantics: Tensor, channels: int, noise_dim: int = NOISE_DIM):
        super().__init__()
        self.noise_dim, (wide, narrow) = noise_dim, WIDTHS
        self.register_buffer("semantics", semantics)
        self.network = nn.Sequential(
            nn.Linear(noise_dim + semantics.shape[1], wide * 8 * 8),
            nn.Unflatten(1, (wide, 8, 8)),
            nn.BatchNorm2d(wide),
            nn.Upsample(scale_factor=2),  # 8 -> 16
            nn.Conv2d(wide, wide, 3, padding=1),
            nn.BatchNorm2d(wide),
            nn.LeakyReLU(0.2, inplace=True),
            nn.Upsample(scale_factor=2),  # 16 -> 32
            nn.Conv2d(wide, narrow, 3, padding=1),
            nn.BatchNorm2d(narrow),
            nn.LeakyReLU(0.2, inplace=True),
            nn.Conv2d(narrow, channels, 3, padding=1),
            nn.Tanh(),
            nn.BatchNorm2d(channels, affine=False),
        )

    def forward(self, z: Tensor, y: Tensor) -> Tensor:
        return self.network(torch.cat([z, self.semantics[y]], dim=1))


def initial_generator(semantics: Tensor, channels: int, noise_dim: int,
                      rng: torch.Generator) -> SemanticGenerator:
    """A new generator whose weights are drawn from rng; the global generator is left as it was."""
    with drawing_from(rng):
        return in_layout(SemanticGenerator(semantics, channels, noise_dim))


def in_layout(generator: SemanticGenerator) -> SemanticGenerator:
    """The same generator channels_last: on a CPU it trains 1.2 and samples 2.6 times as fast."""
    return generator.to(memory_format=torch.channels_last)


def load_generator(state: dict[str, Tensor], channels: int,
                   noise_dim: int) -> SemanticGenerator:
    """The generator, in evaluation mode, that a state dict was taken from; nothing is drawn."""
    semantics = state["semantics"]
    with torch.device("meta"):
        generator = SemanticGenerator(semantics, channels, noise_dim)
    generator = in_layout(generator.to_empty(device=semantics.device))
    generator.load_state_dict(state)
    return generator.eval()


# ------------------------------------------------------------------------------------- losses

def class_weights(counts: Tensor, *, of_all: bool = False) -> Tensor:
    """alpha_k^y of Eq. 7: the share of the images of class y that client k holds.

    counts: (K, C) training images by client and class
    of_all: the share of all images instead, whatever their class, which is how the paper's sentence
        can be read too; classes then count by their size
    Returns (K, C); each column sums to 1, or to 0 if nobody holds the class.
    """
    counts = counts.double()
    total = counts.sum() if of_all else counts.sum(dim=0)
    return (counts / total.clamp(min=1)).float()


def counting_rows(y: Tensor, weights: Tensor) -> list[Tensor]:
    """By teacher, which samples of labels y count for it, alpha > 0; see classification_loss."""
    return [weight.nonzero().flatten() for weight in weights[:, y]]


def classification_loss(x: Tensor, y: Tensor, teachers: Sequence[Callable[[Tensor], Tensor]],
                        weights: Tensor, rows_of: Sequence[Tensor] | None = None) -> Tensor:
    """L_cls, Eq. 6 and 7: sum over teachers of alpha_k^y times cross entropy, mean over samples.

    x, y: (N, C, H, W) samples and (N,) labels;  weights: (teachers, classes), alpha
    rows_of: the samples that each teacher sees; None: those that count for it, which changes no
        sum.  (To find them, a GPU is waited for; who has the same labels again finds them once.)
    """
    total = x.new_zeros(())
    for teacher, weight, rows in zip(teachers, weights[:, y], rows_of or counting_rows(y, weights)):
        if len(rows):
            losses = F.cross_entropy(teacher(x[rows]), y[rows], reduction="none")
            total = total + (weight[rows] * losses).sum()
    return total / len(y)


def diversity_loss(x: Tensor, *, distance: str = "l2") -> Tensor:
    """L_diversity, Eq. 8: minus the mean distance between two samples of the same class.

    x: (classes, n_s, ...) samples by class, n_s at least 2; the mean of Eq. 8 over classes
    distance: "l2", as printed, or "rms", the root mean square over pixels and channels, which is
        sqrt(C H W) smaller
    Two equal samples have the subgradient 0, not NaN.
    """
    flat = x.flatten(2)
    unit = {"l2": 1.0, "rms": flat.shape[2] ** 0.5}[distance]
    distances = torch.cdist(flat, flat, compute_mode="donot_use_mm_for_euclid_dist") / unit
    classes, n_s = flat.shape[:2]
    return -distances.sum() / (classes * n_s * (n_s - 1))


# ------------------------------------------------------------------------ training and sampling

def train_generator(generator: SemanticGenerator, teachers: Sequence[nn.Module], weights: Tensor,
                    rng: torch.Generator, *, generator_steps: int, generator_batch: int,
                    balance: float = BALANCE, distance: str = DISTANCE,
                    lr: float = GENERATOR_LR) -> Iterator[Tensor]:
    """Train the generator without data (Eq. 9), in place; yields (L_cls, L_diversity) by step.

    teachers: the clients' models (Eq. 6), or the global model alone; frozen, in evaluation mode
    weights: (teachers, classes), alpha; a class that has none is skipped, since nobody can judge it
    generator_batch: n_s, samples of each class in a step (the paper feeds 600)
    A step of more than SLICE samples is made in slices, each with some of the n_s of every class,
    whose gradients add up.  The pairs of Eq. 8 are then those within a slice, of the same mean, and
    so are the statistics of batch normalisation, whose running ones move with every slice.
    """
    seen = weights.sum(dim=0).nonzero().flatten()
    for teacher in teachers:
        teacher.eval().requires_grad_(False)
    generator.train()
    optimizer = torch.optim.Adam(generator.parameters(), lr=lr, fused=True)
    slices = slice_sizes(generator_batch, len(seen))
    labels = {size: seen.repeat_interleave(size) for size in slices}
    rows_of = {size: counting_rows(y, weights) for size, y in labels.items()}
    for _ in range(generator_steps):
        optimizer.zero_grad()
        losses = torch.zeros(2, device=seen.device)
        for size in slices:
            y = labels[size]
            z = drawn(torch.randn, len(y), generator.noise_dim, rng=rng, device=y.device)
            x = generator(z, y)
            l_cls = classification_loss(x, y, teachers, weights, rows_of[size])
            l_diversity = diversity_loss(x.unflatten(0, (len(seen), size)), distance=distance)
            share = size / generator_batch
            (share * (balance * l_cls + (1 - balance) * l_diversity)).backward()  # Eq. 9
            losses += share * torch.stack([l_cls, l_diversity]).detach()
        optimizer.step()
        yield losses
    generator.eval()


def slice_sizes(n_s: int, classes: int) -> list[int]:
    """n_s divided evenly, so that so many samples of each class are at most SLICE, at least 2."""
    count = max(1, min(math.ceil(n_s / max(2, SLICE // classes)), n_s // 2))
    return [n_s // count + (number < n_s % count) for number in range(count)]


@torch.no_grad()
def sample(generator: SemanticGenerator, y: Tensor, rng: torch.Generator) -> Tensor:
    """Synthetic images (N, C, 32, 32) of any labels (N,), by the generator in evaluation mode.

    In training mode the other labels of a batch would show in an image.
    """
    generator.eval()
    images = []
    for labels in y.split(SAMPLE_BATCH):
        z = drawn(torch.randn, len(labels), generator.noise_dim, rng=rng, device=y.device)
        images.append(generator(z, labels))
    return torch.cat(images)


# ---------------------------------------------------------------------------------- semantics

def load_semantics(classes: Sequence[str], *, semantics: str, dataset: str = "",
                   data_dir: str | Path = "data", word_vectors: str | None = None) -> Tensor:
    """A(y): the standardised embeddings (classes, d_A) of class names, from a named source.

    semantics: one of SEMANTICS, or the path of an .npz with classes and embeddings
    dataset, data_dir: what a text encoder gives is kept in that folder, by the data set's name
    word_vectors: the text file that word2vec reads
    Raises ValueError with one line that says what is wrong and what to do.
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
    """Embeddings (classes, d_A) of zero mean over the classes and unit deviation over all entries.

    The coordinates of a text embedding are some .04 and nearly the same for all classes, where the
    noise beside them has deviation 1.  One common factor leaves the geometry as it is.
    Raises ValueError if all classes have the same embedding.
    """
    if (embeddings == embeddings[0]).all():
        raise ValueError("all classes have the same embedding: nothing tells them apart")
    embeddings = embeddings.astype(np.float64)  # whether fresh from an encoder or read from a file
    centred = embeddings - embeddings.mean(axis=0)
    return torch.from_numpy(centred / np.sqrt((centred**2).mean())).float()


def segment_table(classes: Sequence[str]) -> np.ndarray:
    """Attributes (classes, 7) of digits: the lit segments of a seven-segment display."""
    unknown = [name for name in classes if name not in SEGMENTS]
    if unknown:
        raise ValueError("--semantics segments describes the digits 0 to 9, and class "
                         f"{unknown[0]!r} is none: choose another --semantics")
    return np.array([[segment in SEGMENTS[name] for segment in "abcdefg"] for name in classes],
                    dtype=np.float64)


def read_embeddings(path: str | Path, classes: Sequence[str]) -> np.ndarray:
    """Embeddings (classes, d_A) from an .npz with `classes` (names, in any order) and `embeddings`.

    Classes are matched by name.  Raises ValueError with one line that names the file.
    """
    if not str(path).lower().endswith(".npz"):
        raise ValueError(f"unknown semantics '{path}': choose one of {', '.join(SEMANTICS)}, or "
                         "give the path of an .npz file")
    if not Path(path).exists():
        raise ValueError(f"there is no file {path}: check --semantics")
    try:
        with np.load(path, allow_pickle=False) as archive:
            names = class_names(np.asarray(archive["classes"]))
            embeddings = np.asarray(archive["embeddings"])
    except KeyError as error:
        raise ValueError(f"{path} must hold classes (names) and embeddings") from error
    except Exception as error:  # numpy and zipfile raise a dozen kinds on a broken file
        raise ValueError(f"{path} cannot be read ({first_line(error)}): expected an .npz written "
                         "by numpy.savez with classes and embeddings") from error
    if embeddings.ndim != 2 or embeddings.dtype.kind not in "uif" or embeddings.shape[1] == 0:
        raise ValueError(f"{path}: embeddings must be numbers of shape (classes, d), not "
                         f"{embeddings.dtype} of shape {embeddings.shape}")
    if len(names) != len(embeddings) or len(set(names)) != len(names):
        raise ValueError(f"{path}: {len(names)} names ({len(set(names))} different ones) for "
                         f"{len(embeddings)} embeddings; each class needs one")
    missing = [name for name in classes if name not in names]
    if missing:
        raise ValueError(f"{path} has no embedding of class {missing[0]!r}: its classes must be "
                         "named as those of the data set")
    chosen = embeddings[[names.index(name) for name in classes]].astype(np.float64)
    if not (np.abs(chosen) < HUGE).all():
        raise ValueError(f"{path}: embeddings hold NaN, infinite or huge numbers")
    return chosen


def read_word_vectors(path: str | None, classes: Sequence[str]) -> np.ndarray:
    """Word vectors (classes, d_A) of class names, from a text file: a word and its numbers a line.

    The formats of GloVe and of word2vec's text output (whose first line holds two counts).  A name
    of several words gets the mean of theirs; words are looked up as they are, then in lower case.
    Raises ValueError if the file cannot be read or lacks a word.
    """
    if path is None:
        raise ValueError("--semantics word2vec reads word vectors from a text file: name it by "
                         "--word-vectors FILE")
    words = {name: words_of(name) for name in classes}
    wanted = {form for of_name in words.values() for word in of_name
              for form in (word, word.lower())}
    found = {}
    try:
        with open(path, encoding="utf-8-sig", errors="replace") as file:
            for line in file:
                word, _, numbers = line.strip().replace("\t", " ").partition(" ")
                vector = parse_numbers(numbers) if word in wanted else None
                if vector is not None:
                    found[word] = vector
    except FileNotFoundError as error:
        raise ValueError(f"{path} cannot be read, for there is no such file: check --word-vectors"
                         ) from error
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as word vectors ({first_line(error)}): expected "
                         "text lines of a word and its numbers") from error
    vectors = {}
    for name, of_name in words.items():
        vectors[name] = [found.get(word, found.get(word.lower())) for word in of_name]
        if not of_name or any(vector is None for vector in vectors[name]):
            raise ValueError(f"{path} lacks a word of class {name!r}: use other word vectors, or "
                             "an .npz of embeddings")
    lengths = {len(vector) for of_name in vectors.values() for vector in of_name}
    if len(lengths) != 1:
        raise ValueError(f"{path}: word vectors of {min(lengths)} and of {max(lengths)} numbers; "
                         "all must be of one length")
    return np.stack([np.mean(vectors[name], axis=0) for name in classes])


def parse_numbers(text: str) -> np.ndarray | None:
    """The numbers of a line, or None if it holds anything else (some files have such lines)."""
    try:
        numbers = np.array(text.split(), dtype=np.float64)
    except ValueError:
        return None
    return numbers if len(numbers) and (np.abs(numbers) < HUGE).all() else None


def words_of(name: str) -> list[str]:
    """The words of a class name: "T-shirt/top" holds three."""
    return "".join(letter if letter.isalnum() else " " for letter in name).split()


def encode_with_cache(encode: Callable[[list[str]], np.ndarray], classes: Sequence[str],
                      cache: Path, prompt: str = PROMPT) -> np.ndarray:
    """What a text encoder gives for the class names, kept in an .npz from one run to the next.

    prompt: a text with {} for the name.  What is kept goes by the text, so that with another
        prompt it is encoded anew
    """
    texts = [" ".join(prompt.format(name.replace("_", " ")).split()) for name in classes]
    if cache.exists():
        try:
            return read_embeddings(cache, texts)
        except ValueError:  # of other classes, or damaged: made anew
            pass
    print(f"encoding the class names for {cache}; weights are downloaded at first use", flush=True)
    # Libraries log retries on standard error, and initialise weights before they load them.
    logging.disable(logging.CRITICAL)
    try:
        with torch.random.fork_rng(devices=[]):
            embeddings = encode(texts)
    finally:
        logging.disable(logging.NOTSET)
    write_cache(cache, partial(write_atomically, write=lambda file: np.savez(
        file, classes=np.array(texts), embeddings=embeddings)))
    return embeddings


def clip_embeddings(texts: list[str], *, weights: str = "openai",
                    name: str = "ViT-B-32-quickgelu") -> np.ndarray:
    """CLIP text embeddings of unit length, by default of ViT-B/32, (texts, 512).

    weights: "openai", downloaded at first use, or the path of a checkpoint;  name: of open_clip's
        models (quickgelu: the activation of OpenAI's weights)
    Raises ValueError if the weights cannot be had.
    """
    try:
        import open_clip

        model = open_clip.create_model(name, pretrained=weights).eval()
        tokens = open_clip.get_tokenizer(name)(texts)
    except Exception as error:  # the hub's and the network's own kinds, by version
        raise ValueError(f"CLIP's weights '{weights}' cannot be loaded ({first_line(error)}): "
                         "check the connection, or choose another --semantics") from error
    with torch.no_grad():
        return model.encode_text(tokens, normalize=True).float().numpy()


def bert_embeddings(texts: list[str], *, weights: str = "bert-base-uncased") -> np.ndarray:
    """BERT embeddings (texts, 768): the last layer's mean over the tokens of a text.

    weights: a name on the Hugging Face hub, downloaded at first use, or a folder
    Raises ValueError if transformers is not installed or the weights cannot be had.
    """
    try:
        from transformers import AutoModel, AutoTokenizer
    except ImportError as error:
        raise ValueError("--semantics bert needs the package transformers: install it by "
                         "'pip install transformers', or choose another --semantics") from error
    try:
        tokenizer, model = (kind.from_pretrained(weights) for kind in (AutoTokenizer, AutoModel))
    except Exception as error:  # the hub's and the network's own kinds, by version
        raise ValueError(f"BERT's weights '{weights}' cannot be loaded ({first_line(error)}): "
                         "check the connection, or choose another --semantics") from error
    tokens = tokenizer(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        states = model.eval()(**tokens).last_hidden_state
    mask = tokens["attention_mask"][:, :, None]
    return ((states * mask).sum(dim=1) / mask.sum(dim=1)).numpy()


# ---------------------------------------------------------------------- FedGen's latent generator

class LatentGenerator(nn.Module):
    """Noise (N, d_z) in [0, 1) and labels (N,) to inputs of a classifier's last layer (N, width).

    Source: Zhu et al., Data-Free Knowledge Distillation for Heterogeneous Federated Learning,
    arxiv.org/abs/2105.10056, as its released code has it.
    """

    def __init__(self, num_classes: int, width: int, *, noise_dim: int = LATENT_NOISE_DIM,
                 hidden: int = LATENT_HIDDEN):
        super().__init__()
        self.num_classes, self.noise_dim = num_classes, noise_dim
        self.network = nn.Sequential(nn.Linear(noise_dim + num_classes, hidden),
                                     nn.BatchNorm1d(hidden), nn.ReLU(), nn.Linear(hidden, width))

    def forward(self, z: Tensor, y: Tensor) -> Tensor:
        return self.network(torch.cat([z, F.one_hot(y, self.num_classes)], dim=1))


def initial_latent_generator(num_classes: int, width: int,
                             rng: torch.Generator) -> LatentGenerator:
    """A new generator whose weights are drawn from rng; the global generator is left as it was."""
    with drawing_from(rng):
        return LatentGenerator(num_classes, width)


def load_latent_generator(state: dict[str, Tensor]) -> LatentGenerator:
    """The generator, in evaluation mode, that a state dict was taken from; nothing is drawn."""
    inner, outer = state["network.0.weight"], state["network.3.weight"]
    with torch.device("meta"):
        generator = LatentGenerator(inner.shape[1] - LATENT_NOISE_DIM, outer.shape[0])
    generator = generator.to_empty(device=inner.device)
    generator.load_state_dict(state)
    return generator.eval()


@torch.no_grad()
def sample_latents(generator: LatentGenerator, y: Tensor, rng: torch.Generator) -> Tensor:
    """Latents (N, width) of labels (N,), by the generator in the mode that it is in."""
    return generator(drawn(torch.rand, len(y), generator.noise_dim, rng=rng, device=y.device), y)


def latent_diversity_loss(z: Tensor, latents: Tensor) -> Tensor:
    """exp(-mean over pairs of |z_i - z_j|^2 |latent_i - latent_j|), both means over coordinates.

    Squared distances of the noise (N, d_z), absolute ones of the latents (N, width): far noise has
    to make far latents.
    """
    noise_distance = (z[:, None] - z[None]).square().mean(dim=2)
    latent_distance = (latents[:, None] - latents[None]).abs().mean(dim=2)
    return (-noise_distance * latent_distance).mean().exp()


def train_latent_generator(generator: LatentGenerator, optimizer_state: dict | None,
                           heads: Sequence[Callable[[Tensor], Tensor]], weights: Tensor,
                           rng: torch.Generator, *, steps: int, batch: int, lr_factor: float = 1.0,
                           diversity_weight: float = 1.0) -> dict:
    """Train the generator in place, so that the clients' last layers recognise its latents.

    L = sum_k w_k^y CE_k + diversity_weight L_diversity, on labels drawn among the classes that a
    client holds.  (The paper's third term, against the global model, has the weight 0 in the
    released code, and is left out.)
    optimizer_state: that returned after the round before, or None;  heads: the last layers
    weights: (heads, classes), w_k^y, from class_weights
    """
    held = weights.sum(dim=0).nonzero().flatten()
    optimizer = torch.optim.Adam(generator.parameters(), lr=LATENT_LR,
                                 weight_decay=LATENT_WEIGHT_DECAY)
    if optimizer_state is not None:
        # A copy, since the optimiser would go on with the very tensors it is given.
        optimizer.load_state_dict(copy.deepcopy(optimizer_state))
    for group in optimizer.param_groups:
        group["lr"] = LATENT_LR * lr_factor
    generator.train()
    all_rows = [torch.arange(batch, device=held.device)] * len(heads)
    for _ in range(steps):
        y = held[drawn(partial(torch.randint, len(held)), (batch,), rng=rng, device=held.device)]
        z = drawn(torch.rand, batch, generator.noise_dim, rng=rng, device=held.device)
        latents = generator(z, y)
        loss = (classification_loss(latents, y, heads, weights, all_rows)
                + diversity_weight * latent_diversity_loss(z, latents))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    generator.eval()
    return optimizer.state_dict()

"""The text: Python's own help pages (`pydoc_data.topics`, present in every Python), as bytes, split in two."""

import pydoc_data.topics

import numpy as np


def corpus():
    """(training bytes, held-out bytes), uint8 arrays; every tenth help page is held out."""
    pages = [pydoc_data.topics.topics[name] for name in sorted(pydoc_data.topics.topics)]
    training = "\n".join(page for number, page in enumerate(pages) if number % 10 != 5)
    held_out = "\n".join(page for number, page in enumerate(pages) if number % 10 == 5)
    return encode(training), encode(held_out)


def encode(string):
    """The UTF-8 bytes of a string: the vocabulary is 0..255."""
    return np.frombuffer(string.encode("utf-8"), np.uint8)


def decode(tokens):
    """The string of a sequence of bytes; what is no UTF-8 shows as a replacement character."""
    return bytes(bytearray(int(token) for token in tokens)).decode("utf-8", "replace")


def batches(data, batch, length, steps, seed):
    """Yield `steps` times (tokens, next tokens), int32 (batch, length), from places that the seed fixes."""
    generator = np.random.default_rng(seed)
    for _ in range(steps):
        starts = generator.integers(0, len(data) - length, batch)
        windows = np.stack([data[start : start + length + 1] for start in starts]).astype(np.int32)
        yield windows[:, :-1], windows[:, 1:]


def spread_windows(data, length, count):
    """`count` pairs (tokens, next tokens), int32 (1, length), evenly spread over the data."""
    for start in np.linspace(0, len(data) - length - 1, count).astype(int):
        window = data[start : start + length + 1].astype(np.int32)[None]
        yield window[:, :-1], window[:, 1:]


def unigram_entropy(data):
    """Entropy of the byte frequencies in nats a byte: the loss of the best model that ignores the context."""
    share = np.bincount(data, minlength=256) / len(data)
    share = share[share > 0]
    return float(-(share * np.log(share)).sum())


def unigram_loss(training, held_out):
    """Loss in nats a byte, on held-out bytes, of the byte frequencies counted (plus one) in the training bytes."""
    counts = np.bincount(training, minlength=256) + 1.0
    return float(-np.log(counts / counts.sum())[held_out].mean())

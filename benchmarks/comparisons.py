"""Writes docs/comparisons.md from the results of likelihoods.py and text_bits.py.

usage: python benchmarks/comparisons.py
"""

from __future__ import annotations

import json
from pathlib import Path

try:
    import likelihoods
    import text_bits
except ImportError:  # imported as a module of the package
    from benchmarks import likelihoods, text_bits

PAGE = Path(__file__).resolve().parent.parent / "docs" / "comparisons.md"

HEAD = """# Comparisons

Models of the zoo beside other software, on the same data. `python benchmarks/comparisons.py` writes this page from
`benchmarks/results`. One seed, CPU time of the training on a shared machine.
"""

DIGITS = """
## Likelihoods of binarized MNIST

8,000 of the 10,000 digits of 28x28 in `data/mnist` ([how to get them](data.md#mnist-and-emoji)) are trained on,
{epochs} epochs of batches of 64, and the other 2,000 are held out: fewer than in published tables, so only the rows can
be compared with each other. A pixel is black or white, with its value as probability. Binarization is drawn once
(static) or in each step (dynamic); the held-out digits are the same. fastgen's models have the defaults of the data.
pythae's VAE is trained with Adam at 1e-3 and the same cosine schedule, with its own networks (one hidden layer of 512
units) and with those of `vae`.

Nats per digit with 95 % intervals over digits. The importance-weighted bound with 5,000 samples was computed for
{digits} of the held-out digits; for the others, the mean difference from 50 samples was added.

```sh
pip install pythae  # for its rows
python benchmarks/likelihoods.py
```

"""

TEXT = """
## Bits per byte of a text

{size:,} bytes of source code of Python's standard library ({python}), files in a random but fixed order. The last
tenth is held out; the table has bits per byte of that part. `transformer-lm` has a learned vocabulary and a context of
128 tokens, or trains on 256 tokens in half as many steps: in two segments (Transformer-XL) or with a window of 128
tokens in each block (Longformer). Each piece of the held-out text, as long as the texts of the training, starts without
context. The n-gram has modified Kneser-Ney smoothing. The compressors run at their highest levels and have read the
training text before, of which gzip remembers 32 kB, bzip2 at most 900 kB, and xz all: it finds every passage that
occurs again.

```sh
python benchmarks/text_bits.py
```

"""


def page() -> str:
    """docs/comparisons.md. Rows that have no record yet are named."""
    records = json.loads(likelihoods.RECORDS.read_text()) if likelihoods.RECORDS.exists() else []
    about = records[0] if records else {"epochs": likelihoods.EPOCHS, "digits": (0, likelihoods.DIGITS)}
    text = HEAD + DIGITS.format(epochs=about["epochs"], digits=about["digits"][1])
    if records:
        text += "\n".join(likelihoods.table(records)) + "\n\n" + machine(records[0]) + "\n"
    measured = {(record["model"], record["binarization"]) for record in records}
    missing = [row for row in likelihoods.rows() if row not in measured]
    if missing:
        text += f"Not measured yet: {'; '.join(f'{model} ({way})' for model, way in missing)}.\n"
    if not text_bits.RECORD.exists():
        return text + TEXT.format(size=text_bits.BYTES, python="3.10 or newer") + "Not measured yet.\n"
    record = json.loads(text_bits.RECORD.read_text())
    text += TEXT.format(size=record["bytes"], python=record["python"])
    text += "\n".join(text_bits.table(record)) + "\n\n```sh\n" + "\n".join(record["commands"]) + "\n```\n\n"
    return text + machine(record)


def machine(record: dict) -> str:
    return f"{record['machine']}; commit {record['commit']}.\n"


if __name__ == "__main__":
    PAGE.write_text(page())

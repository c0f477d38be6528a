"""Baseline for language models: character n-grams with interpolated modified Kneser-Ney smoothing.

usage: python benchmarks/ngram.py [--data prose] [--orders 3 4 5 6 7]

Prints nats per character of the held-out text, each given the order - 1 characters before it, without the context
boundaries of a Transformer. Chen and Goodman, "An empirical study of smoothing techniques for language modeling"
(1998), section 3: the highest order counts occurrences, lower orders count distinct preceding characters; the three
discounts of an order are estimated from the numbers of n-grams with counts 1 to 4.
"""

from __future__ import annotations

import argparse
import math
from collections import Counter, defaultdict

from fastgen.data import DataConfig, load_data

Counts = dict[str, Counter]


class KneserNey:
    """p(character | the order - 1 characters before it), estimated from a text."""

    def __init__(self, text: str, order: int) -> None:
        self.order, self.vocabulary = order, len(set(text))
        self.counts: list[Counts] = []
        for length in range(1, order + 1):
            grams = Counter(text[i : i + length] for i in range(len(text) - length + 1))
            if length < order:  # distinct characters before it
                longer = {text[i : i + length + 1] for i in range(len(text) - length)}
                grams = Counter(gram[1:] for gram in longer)
            by_context: Counts = defaultdict(Counter)
            for gram, count in grams.items():
                by_context[gram[:-1]][gram[-1]] = count
            self.counts.append(by_context)
        self.discounts = [discounts(counts) for counts in self.counts]

    def probability(self, context: str, character: str) -> float:
        """Interpolated from the shortest context to the longest."""
        p = 1 / self.vocabulary
        context = context[max(0, len(context) - self.order + 1) :]
        for length in range(len(context) + 1):
            seen = self.counts[length].get(context[len(context) - length :])
            if seen is None:
                break
            discount, total = self.discounts[length], seen.total()
            taken = sum(discount[min(count, 3)] for count in seen.values())
            own = seen.get(character, 0)
            p = (own - discount[min(own, 3)] + taken * p) / total
        return p

    def nats(self, history: str, text: str) -> float:
        """Mean nats per character of a text that follows ``history``."""
        whole = history[-self.order :] + text
        start = len(whole) - len(text)
        places = range(start, len(whole))
        return -sum(math.log(self.probability(whole[max(0, i - self.order) : i], whole[i])) for i in places) / len(text)


def discounts(counts: Counts) -> tuple[float, float, float, float]:
    """Discounts of counts 0, 1, 2, and 3 or more."""
    n = Counter(count for seen in counts.values() for count in seen.values() if count <= 4)
    y = n[1] / (n[1] + 2 * n[2]) if n[1] else 0.0
    found = (k - (k + 1) * y * n[k + 1] / n[k] if n[k] else 0.0 for k in (1, 2, 3))
    return (0.0, *(min(max(d, 0.0), k) for k, d in enumerate(found, 1)))


def texts(data: str) -> tuple[str, str]:
    """(training, held-out) text of a data set."""
    dataset = load_data(DataConfig(data), "text")
    vocabulary = dataset.facts["vocabulary"]
    train, held = dataset.splits(length=1)
    return tuple("".join(vocabulary[i] for i in part.tokens.tolist()) for part in (train, held))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="prose")
    parser.add_argument("--orders", type=int, nargs="+", default=[3, 4, 5, 6, 7])
    given = parser.parse_args()
    train, held = texts(given.data)
    for order in given.orders:
        print(f"{order}-gram  {KneserNey(train, order).nats(train, held):.4f} nats per character held out")


if __name__ == "__main__":
    main()

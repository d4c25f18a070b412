"""Measure the search of retrieval_based/: exact and approximate, one query and many, opening and changing an index.

    python benchmarks/bench_search.py

The vectors are seeded and random, for HNSW around 2,000 centres, since without any structure no text has neighbours. Prints
medians; needs usearch and two minutes.
"""

import os
import tempfile
import time

import numpy as np

from textcls.retrieval.changes import add_texts, remove_label
from textcls.retrieval.index import of_single_texts, open_index
from textcls.retrieval.nearest import WantedType, nearest
from textcls.retrieval.rows import NewRows, rows_of_texts
from textcls.retrieval.writing import memory_index, new_header, write_index

REPEATS = 50


def unit(vectors):
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def random_vectors(generator, rows, dimension):
    return unit(generator.standard_normal((rows, dimension)).astype(np.float32))


def make_texts(generator, count):
    """Texts of 20 characters each: list of str."""
    return ["".join(map(chr, codes)) for codes in generator.integers(0x4E00, 0x4E00 + 3000, (count, 20))]


def milliseconds(function, arguments):
    """Median of the time that a function takes for each of some arguments."""
    times = []
    for argument in arguments:
        start = time.perf_counter()
        function(argument)
        times.append(time.perf_counter() - start)
    return 1000 * np.median(times)


def bench_many(folder, generator):
    vectors, queries = random_vectors(generator, 5981, 768), random_vectors(generator, 6835, 768)
    labels = [(f"标签{number}", []) for number in range(len(vectors))]
    rows = rows_of_texts(vectors, np.arange(len(vectors)), [name for name, _ in labels])
    write_index(folder, memory_index(new_header("bench", 768, "labels", labels), rows))
    index = open_index(folder)
    times = milliseconds(lambda _: nearest(index, queries, 50), range(3))
    print(f"exact, 6,835 queries x 5,981 rows x 768, top 50: {times / 1000:.2f} s", flush=True)


def bench_one(folder, generator):
    """One query at a time, and changes, on an index of many labels."""
    count, dimension, num_labels = 61510, 256, 5981
    vectors, queries = random_vectors(generator, count, dimension), random_vectors(generator, REPEATS, dimension)
    labels = [(f"标签{number}", []) for number in range(num_labels)]
    rows = rows_of_texts(vectors, generator.integers(0, num_labels, count), make_texts(generator, count))
    write_index(folder, memory_index(new_header("bench", dimension, "texts", labels), rows))
    print(f"opening {count:,} rows x {dimension}: {milliseconds(lambda _: open_index(folder), range(5)):.0f} ms")
    index = open_index(folder)
    times = milliseconds(lambda query: nearest(index, query[None], 10), queries)
    product = milliseconds(lambda query: vectors @ query, queries)
    print(f"exact, one query against them: {times:.1f} ms (the bare product {product:.1f} ms)")
    texts = make_texts(generator, 5)
    times = milliseconds(lambda number: add_texts(folder, f"新{number}", texts, queries[:5]), range(5))
    print(f"adding a label of 5 texts: {times:.0f} ms; removing it: "
          f"{milliseconds(lambda number: remove_label(folder, f'新{number}'), range(5)):.0f} ms", flush=True)


def bench_hnsw(folder, generator):
    count, dimension = 100_000, 256
    centres = generator.standard_normal((2000, dimension)).astype(np.float32)

    def draw(rows):
        noise = 0.7 * generator.standard_normal((rows, dimension))
        return unit((centres[generator.integers(0, len(centres), rows)] + noise).astype(np.float32))

    vectors, queries = draw(count), draw(1000)
    labels = [(str(number), []) for number in range(50)]
    rows = NewRows(vectors, generator.integers(0, 50, count), ["文"] * count, [(np.array([1]), np.array([1]))] * count,
                   *of_single_texts(count))
    start = time.perf_counter()
    index = memory_index(new_header("bench", dimension, "texts", labels), rows)
    write_index(folder, index, WantedType("hnsw", {"connectivity": 16, "expansion": 64}))
    seconds, index = time.perf_counter() - start, open_index(folder)
    exact = nearest(index, queries, 10, exact=True)[1]
    found = []
    times = milliseconds(lambda query: found.append(nearest(index, query[None], 10)[1][0]), queries)
    recall = np.mean([np.isin(own, other).mean() for own, other in zip(exact, found)])
    size = os.path.getsize(os.path.join(folder, index.header["hnsw"]["file"])) / vectors.nbytes
    print(f"HNSW, {count:,} rows x {dimension}: built in {seconds:.0f} s, recall@10 {recall:.4f}, one query {times:.2f} ms, "
          f"its file {size:.2f} of the vectors", flush=True)


def main():
    for bench in (bench_many, bench_one, bench_hnsw):
        with tempfile.TemporaryDirectory() as folder:
            bench(os.path.join(folder, "index"), np.random.default_rng(0))


if __name__ == "__main__":
    main()

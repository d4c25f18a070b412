"""A search index in Milvus: a server, a cluster, or Milvus Lite, which keeps it in a folder NAME.db. Needs pymilvus, no Paddle.

What is searched has a fixed name, the alias. It leads to one of the collections alias_v<time>, each of which is written once,
checked, and only then put in the place of the one before: who searches by the alias meets a complete collection at any time.
"""

import argparse
import contextlib
import datetime
import functools
import logging
import os
import re
import secrets
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Callable, NamedTuple, Optional, Union
from urllib.parse import urlsplit

import numpy as np

from textcls.common.errors import UserError, needs_packages
from textcls.common.log import Progress
from textcls.common.options import positive_int, read_token_file
from textcls.retrieval.nearest import MOST_EXACT

if TYPE_CHECKING:
    from pymilvus import MilvusClient

MESSAGE_BYTES = 4 * 2**20  # of rows in one request: seconds of work; a server takes 64 MiB unless it is told otherwise
MOST_BYTES = 65535  # of a text or label, as UTF-8; what Milvus allows
MOST_QUERIES = 100  # in one request, so that a busy server answers in time
MOST_HITS = 1600  # in one answer, so that even the longest texts stay below the 100 MiB that a server sends
MOST_NEIGHBOURS = 16384  # of one query, as servers have it
INDEX_TYPES: dict[str, dict[str, int]] = {"FLAT": {}, "HNSW": {"M": 16, "efConstruction": 200}, "AUTOINDEX": {}}
LONG_WAIT = 3600  # seconds that building and loading an index may take
CHECKED_ROWS, CHECKED_HITS = 100, 10  # the sample and the depth of the comparison with exact search
VERSION = re.compile(r"_v\d{17}_[0-9a-f]{4}$")  # what follows the alias in the name of a collection: time and chance
FIELDS = {"id", "label_id", "label", "text", "vector"}


class Version(NamedTuple):
    """A collection that the alias leads to, or may."""

    name: str
    encoder_id: str  # "": not known
    dimension: int
    num_rows: int  # as they must be in a complete one
    index_type: str
    query_prefix: str = ""  # what is put before the texts that are asked about


class Source(NamedTuple):
    """What is to be inserted."""

    encoder_id: str  # "": not known
    dimension: int
    num_rows: int
    # yields the rows, some at a time: float32 [n, dimension], and of each (label id, label, text)
    blocks: Callable[[], Iterator[tuple[np.ndarray, list[tuple[int, str, str]]]]]
    query_prefix: str = ""  # what is put before the texts that are asked about


class TimedClient:
    """A pymilvus.MilvusClient whose requests take `timeout` seconds at most, unless the caller says otherwise.

    Of itself it would try for minutes to reach a server that has gone, and wait for ever for one that does not answer.
    """

    def __init__(self, client: "MilvusClient", timeout: int) -> None:
        self._client, self._timeout = client, timeout

    def __getattr__(self, name: str) -> Callable:
        return functools.partial(getattr(self._client, name), timeout=self._timeout)


class Hit(NamedTuple):
    """A neighbour of a query."""

    label: str
    similarity: float  # cosine
    text: str

    def line(self, query: Union[str, int]) -> str:
        """`query label similarity`, with the text of the neighbour where that says more than its label."""
        return f"{query} {self.label} {self.similarity:.4f}" + (f" {self.text}" if self.text != self.label else "")


def add_milvus_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--milvus_uri", default="./milvus.db",
                        help="http(s)://host:19530[/database] of a server or cluster, or NAME.db for Milvus Lite")
    parser.add_argument("--milvus_token", default="", help="USER:PASSWORD or key of a server. Better in the environment variable "
                        "MILVUS_TOKEN or in --milvus_token_file, since other users of the machine can see options")
    parser.add_argument("--milvus_token_file", help="file with the token")
    parser.add_argument("--collection", default="text_classes", help="fixed name under which the index is searched, an alias")
    parser.add_argument("--timeout", type=positive_int, default=10, help="seconds that a request may take")


def read_token(args: argparse.Namespace) -> str:
    """The token that the options of `add_milvus_options` name, or that of the environment, or "". UserError."""
    if args.milvus_token_file:
        return read_token_file(args.milvus_token_file)
    return args.milvus_token or os.environ.get("MILVUS_TOKEN", "")


@contextlib.contextmanager
def open_milvus(uri: str, token: str = "", *, timeout: int = 10, is_new: bool = False) -> Iterator[TimedClient]:
    """Connect to a Milvus; yields a TimedClient. What Milvus refuses within the block is a UserError, too.

    uri: http(s)://host:port[/database] of a server, or NAME.db for Milvus Lite. timeout: seconds that each request may take.
    is_new: a database of Milvus Lite that is not there is made.
    """
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # else gRPC writes of a failed connection to standard error by itself
    with needs_packages("retrieval_based/requirements-milvus.txt"):
        import grpc
        from pymilvus import MilvusClient, MilvusException
    for name in ("pymilvus", "milvus_lite"):
        logging.getLogger(name).setLevel(logging.CRITICAL + 1)  # they log each error with its traceback
    shown = hide_password(uri)
    try:
        is_address = urlsplit(uri).scheme in ("http", "https", "tcp") and urlsplit(uri).port != 0
    except ValueError:  # a port that is none
        is_address = False
    if not is_address and not uri.endswith(".db"):
        raise UserError(f"--milvus_uri {shown}: expected http://host:19530 of a server, or a name that ends with .db")
    options = {}
    with contextlib.ExitStack() as stack:
        if not is_address:
            options = {"grpc_options": {"grpc.enable_http_proxy": 0}}  # it is in this process
            uri = stack.enter_context(lite_server(uri, is_new))
        try:
            client = MilvusClient(uri, token=token, timeout=timeout, **options)
            stack.callback(client.close)
            yield TimedClient(client, timeout)
        except (MilvusException, grpc.RpcError) as error:
            raise UserError(f"{shown}: {explain(error, timeout)}") from None


def hide_password(uri: str) -> str:
    """A uri as it may be shown."""
    return re.sub(r"//[^/]*@", "//...@", uri)


def explain(error: Exception, timeout: int) -> str:
    """What a MilvusException or grpc.RpcError says, in one line, with what was expected. timeout: of the request, in seconds."""
    rpc: Any = error if hasattr(error, "details") else error.__cause__
    details = " ".join((rpc.details() or "").split()) if hasattr(rpc, "details") else ""
    code = rpc.code().name if hasattr(rpc, "code") and hasattr(rpc, "details") else ""
    message = " ".join(f"{code} {details} {getattr(error, 'message', '')}".split())
    if "UNAUTHENTICATED" in message or "auth check failure" in message:
        return ("the server refuses the token, or has no such database, expected USER:PASSWORD in MILVUS_TOKEN or "
                "--milvus_token_file")
    if "DEADLINE_EXCEEDED" in message:
        return f"no answer within {timeout} s, expected a running Milvus, or a longer --timeout for a busy one"
    if "UNAVAILABLE" in message:
        reason = f" ({details})" if details else ""
        return f"no Milvus answers there{reason}, expected a running server, whose port is 19530 unless it is told otherwise"
    return f"Milvus answers: {message}"


@contextlib.contextmanager
def lite_server(path: str, is_new: bool) -> Iterator[str]:
    """Open a database of Milvus Lite in this process; yields the address of its server. UserError."""
    if os.path.isfile(path):
        raise UserError(f"{path}: is a file, as Milvus Lite 2 wrote, expected the folder of a Milvus Lite 3, or another name for "
                        "a new one")
    if os.path.isdir(path) and os.listdir(path) and not os.path.isdir(os.path.join(path, "collections")):
        raise UserError(f"{path}: is a folder of something else, expected a database of Milvus Lite, or a new name")
    if not is_new and not os.path.isdir(path):
        raise UserError(f"{path}: no such database of Milvus Lite, expected one that `milvus_index.py insert` made")
    with needs_packages("retrieval_based/requirements-milvus.txt"):
        from milvus_lite.adapter.grpc.server import start_server_in_thread
        from milvus_lite.exceptions import DataDirLockedError, MilvusLiteError
    try:
        # MilvusClient("NAME.db") would do the same, but log what goes wrong instead of raising it
        server, database, port = start_server_in_thread(path)
    except DataDirLockedError:
        raise UserError(f"{path}: another process has this database open, and Milvus Lite allows but one, expected that it ends, "
                        f"or a server for both: milvus-lite server --host 127.0.0.1 --data-dir {path}") from None
    except (MilvusLiteError, ValueError) as error:
        raise UserError(f"{path}: cannot be opened ({error}), expected a database of Milvus Lite") from None
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.stop(grace=2).wait()
        database.close()


def check_alias(alias: str) -> None:
    """UserError where a name cannot be that of an alias."""
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]{0,199}", alias):
        raise UserError(f"--collection {alias}: expected up to 200 letters (a-z), digits and _, no digit first")


def describe(client: TimedClient, name: str) -> Optional[Version]:
    """The Version that an alias or the name of a collection leads to, or None. UserError where it is a foreign collection."""
    if not client.has_collection(name):
        return None
    found = client.describe_collection(name)
    fields = {field["name"]: field["params"] for field in found["fields"]}
    properties = found["properties"]
    if not FIELDS.issubset(fields) or not properties.get("rows", "").isdecimal():
        raise UserError(f"--collection {name}: is a collection of something else, expected one that `milvus_index.py insert` "
                        "made, or a new name")
    return Version(found["collection_name"], properties.get("encoder_id", ""), int(fields["vector"]["dim"]),
                   int(properties["rows"]), properties.get("index_type", ""), properties.get("query_prefix", ""))


def find_version(client: TimedClient, alias: str, encoder_id: Optional[str] = None, dimension: Optional[int] = None) -> Version:
    """The Version that an alias leads to. UserError where there is none, or where it is not of this encoder.

    encoder_id, dimension: of the queries; None or "": not known, so not compared.
    """
    version = describe(client, alias)
    if version is None:
        names = sorted({VERSION.sub("", name) for name in client.list_collections() if VERSION.search(name)})
        raise UserError(f"--collection {alias}: not in this Milvus, expected {f'one of {names}' if names else 'an index in it'} "
                        "(`milvus_index.py insert` writes one)")
    if encoder_id and version.encoder_id and encoder_id != version.encoder_id:
        raise UserError(f"--collection {alias}: its vectors are of the encoder {version.encoder_id}, the queries of "
                        f"{encoder_id}, expected one encoder for both (or `milvus_index.py insert` with the new vectors)")
    if dimension and dimension != version.dimension:
        raise UserError(f"--collection {alias}: its vectors have {version.dimension} dimensions, the queries {dimension}, "
                        "expected the same encoder for both")
    return version


def list_versions(client: TimedClient, alias: str) -> list[Version]:
    """All Versions of an alias, the oldest first, complete or not."""
    names = sorted(name for name in client.list_collections() if VERSION.search(name) and VERSION.sub("", name) == alias)
    versions = [describe(client, name) for name in names]
    return [version for version in versions if version]  # None: dropped since it was listed


def count_rows(client: TimedClient, name: str) -> int:
    """The rows that a loaded collection really has."""
    return client.query(name, filter="", output_fields=["count(*)"], consistency_level="Strong")[0]["count(*)"]


def load(client: TimedClient, name: str) -> None:
    """Make a collection ready to be searched. After a restart it may not be; a reopened one of Milvus Lite never is."""
    if client.get_load_state(name)["state"].name != "Loaded":
        client.load_collection(name, timeout=LONG_WAIT)


def write_version(client: TimedClient, alias: str, source: Source, index_type: str = "auto",
                  progress: Optional[Progress] = None) -> tuple[Version, float]:
    """Write a Source to a new collection, check it, and let the alias lead to it. Returns (Version, recall@10 of a sample).

    progress: a progress bar to advance by the rows done, or None. UserError; then the alias leads to a complete version, the one
    before or, where the switch itself failed, perhaps the new one.
    """
    from pymilvus import DataType, MilvusClient

    current = describe(client, alias)
    if current and current.name == alias:
        raise UserError(f"--collection {alias}: is the name of a collection, expected another, or `milvus_index.py switch`")
    if not source.num_rows:
        raise UserError("no vectors to insert, expected an index with rows")
    if index_type == "auto":
        index_type = "FLAT" if source.num_rows <= MOST_EXACT else "HNSW"
    now = datetime.datetime.now(datetime.timezone.utc)
    name = f"{alias}_v{now:%Y%m%d%H%M%S}{now.microsecond // 1000:03}_{secrets.token_hex(2)}"
    schema = MilvusClient.create_schema(auto_id=False)
    schema.add_field("id", DataType.INT64, is_primary=True)
    schema.add_field("label_id", DataType.INT64)
    schema.add_field("label", DataType.VARCHAR, max_length=MOST_BYTES)
    schema.add_field("text", DataType.VARCHAR, max_length=MOST_BYTES)
    schema.add_field("vector", DataType.FLOAT_VECTOR, dim=source.dimension)
    version = Version(name, source.encoder_id, source.dimension, source.num_rows, index_type, source.query_prefix)
    properties = {"encoder_id": source.encoder_id, "rows": str(source.num_rows), "index_type": index_type,
                  **({"query_prefix": source.query_prefix} if source.query_prefix else {})}
    try:
        client.create_collection(name, schema=schema, properties=properties)
        for batch in batches(source):
            client.insert(name, batch)
            if progress is not None:
                progress.update(len(batch))
        client.flush(name, timeout=LONG_WAIT)
        index = MilvusClient.prepare_index_params()
        index.add_index("vector", index_type=index_type, metric_type="COSINE", params=INDEX_TYPES[index_type])
        client.create_index(name, index, timeout=LONG_WAIT)
        client.load_collection(name, timeout=LONG_WAIT)
        recall = check_version(client, version, source)
    except BaseException:  # Ctrl-C and SIGTERM too, which are no Exception
        with contextlib.suppress(Exception):  # what went wrong is to be said, not what followed from it
            client.drop_collection(name)
        raise
    switch(client, alias, version)  # where this is interrupted nothing may be dropped: the server may have done it already
    return version, recall


def batches(source: Source) -> Iterator[list[dict]]:
    """Yield the rows of a Source as lists of dict, each list small enough for one request."""
    batch: list[dict] = []
    size = row_id = 0
    for vectors, rows in source.blocks():
        for vector, (label_id, label, text) in zip(vectors, rows):
            text = cut(text)
            row_size = vector.nbytes + len(label.encode()) + len(text.encode()) + 64  # 64: ids, lengths and keys
            if batch and size + row_size > MESSAGE_BYTES:
                yield batch
                batch, size = [], 0
            batch.append({"id": row_id, "label_id": label_id, "label": label, "text": text, "vector": vector})
            size, row_id = size + row_size, row_id + 1
    if batch:
        yield batch


def cut(text: str) -> str:
    """A text as far as Milvus can hold it; its vector is that of the whole."""
    return text if len(text) * 4 <= MOST_BYTES else text.encode()[:MOST_BYTES].decode(errors="ignore")


def check_version(client: TimedClient, version: Version, source: Source) -> float:
    """Compare a loaded collection with its Source: the share of a sample's nearest rows that Milvus finds. UserError."""
    count = count_rows(client, version.name)
    if count != version.num_rows:
        raise UserError(f"Milvus has {count} rows of {version.num_rows}, expected all, try again")
    sample = np.unique(np.linspace(0, version.num_rows - 1, CHECKED_ROWS).astype(int))
    queries = np.empty((len(sample), version.dimension), np.float32)
    start = 0
    for vectors, _ in source.blocks():
        inside = (sample >= start) & (sample < start + len(vectors))
        queries[inside] = normalized(vectors[sample[inside] - start])
        start += len(vectors)
    queries = normalized(queries)
    depth = min(CHECKED_HITS, version.num_rows)
    nearest: np.ndarray = np.full((len(sample), depth), -2, np.float32)
    for vectors, _ in source.blocks():
        both = np.concatenate([nearest, queries @ normalized(vectors).T], axis=1)
        nearest = -np.sort(-np.partition(both, -depth, axis=1)[:, -depth:], axis=1)
    hits = search_collection(client, version, queries, depth)
    found = [[hit.similarity for hit in row] for row in hits]
    # by similarities, not by rows: of equal texts any may be found
    return float(np.mean([sum(value >= nearest[row, -1] - 1e-4 for value in values) / depth for row, values in enumerate(found)]))


def normalized(vectors: np.ndarray) -> np.ndarray:
    """Rows of unit length."""
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def switch(client: TimedClient, alias: str, version: Version) -> None:
    """Let an alias lead to a Version."""
    if client.has_collection(alias):
        client.alter_alias(version.name, alias)
    else:
        client.create_alias(version.name, alias)


def drop_versions(client: TimedClient, alias: str, keep: int = 0) -> list[str]:
    """Drop the Versions that are older than the one the alias leads to, but `keep` complete ones. Returns the names dropped.

    Younger ones stay: somebody may be writing them.
    """
    current = find_version(client, alias)
    older = [version for version in list_versions(client, alias) if version.name < current.name]
    dropped = []
    for version in reversed(older):
        if keep and is_complete(client, version):
            keep -= 1
        else:
            client.drop_collection(version.name)
            dropped.append(version.name)
    return dropped


def is_complete(client: TimedClient, version: Version) -> bool:
    """Whether a Version has all of its rows; one that was left in the making has not."""
    return client.get_collection_stats(version.name)["row_count"] == version.num_rows


def search(client: TimedClient, alias: str, vectors: np.ndarray, top_k: int,
           encoder_id: Optional[str] = None) -> Iterator[list[Hit]]:
    """The nearest rows of queries by an alias. vectors: float32 [num_queries, dimension]. Yields a list of Hit per query.

    UserError as `find_version`.
    """
    step = max(1, min(MOST_QUERIES, MOST_HITS // top_k))
    for start in range(0, len(vectors), step):
        queries = vectors[start:start + step]
        version = find_version(client, alias, encoder_id, vectors.shape[1])
        try:
            hits = search_collection(client, version, queries, top_k)
        except Exception:
            if find_version(client, alias, encoder_id, vectors.shape[1]).name == version.name:
                raise
            # it was replaced and dropped since it was asked for
            hits = search_collection(client, find_version(client, alias, encoder_id, vectors.shape[1]), queries, top_k)
        yield from hits


def search_collection(client: TimedClient, version: Version, vectors: np.ndarray, top_k: int) -> list[list[Hit]]:
    """A list of at most top_k Hit per query, the nearest first. vectors: float32 [num_queries, dimension]."""
    load(client, version.name)
    params = {"params": {"ef": max(128, top_k)}} if version.index_type == "HNSW" else {}
    answers = client.search(version.name, data=list(vectors), anns_field="vector", limit=top_k, search_params=params,
                            output_fields=["label", "text"])
    return [[Hit(hit["entity"]["label"], hit["distance"], hit["entity"]["text"]) for hit in answer] for answer in answers]

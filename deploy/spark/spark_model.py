"""Ships an exported model to the executors of a Spark session, with the library that runs it; and a function of it for SQL.

    from spark_model import register_udf
    register_udf(spark, "classify", "export")
    spark.sql("SELECT id, classify(text).label FROM questions")
"""

import os
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Optional, Union

from spark_rows import EXPORT, INDEX, Settings, answer_column, answer_kinds, folder_sha256, open_predictor

import textcls
from textcls.common.errors import UserError
from textcls.common.known import KNOWN_FILE
from textcls.retrieval.search import find_threshold
from textcls.runtime.converted import converted_path
from textcls.runtime.exported import CLASS_LOGITS, EMBEDDING, read_export, saved_threshold
from textcls.runtime.predictions import check_least_known, check_threshold
from textcls.runtime.quantize import SCHEMES

if TYPE_CHECKING:
    from pyspark.sql import SparkSession
    from pyspark.sql.types import StructField

LONGEST_TEXT, WINDOW = 100_000, 10_000  # characters of a text, rows that are answered at a time
_folders: list[tempfile.TemporaryDirectory] = []  # executors fetch from them as long as the session lives


class Model(NamedTuple):
    """A model that is ready to be shipped: its files in a folder of their own, and what is asked of it."""

    folder: Path
    settings: Settings


def prepare_model(path: str, index_dir: Optional[str] = None, *, dtype: str = "fp32", batch_size: int = 32,
                  max_seq_length: Optional[int] = None, top_k: int = 1, threshold: Union[float, str] = 0.0,
                  least_known: float = 0.0, max_text_length: int = LONGEST_TEXT, window: int = WINDOW,
                  calibration_file: Optional[str] = None, allow_accuracy_drop: bool = False) -> Model:
    """Copy what is needed of an export, convert it where dtype asks for it, and open it once, before any job starts.

    path: of the Predictor, or with index_dir (of build_index.py) an exported sentence encoder. threshold: a probability, or
    "auto"; least_known: texts that are less probably of a label at all are not decided, either. max_text_length: characters;
    longer texts get an error. window: rows whose batches are formed together. The others: as of the Predictor. UserError.
    """
    folder = Path(new_folder())
    export = read_export(path, output=EMBEDDING if index_dir else CLASS_LOGITS)
    source = Path(export.tokenizer_path).parent
    (folder / EXPORT).mkdir()
    names = [name for name in ("deploy.json", "label.txt", KNOWN_FILE) if (source / name).is_file()]
    converted = [converted_path(export.onnx_path, dtype)] if SCHEMES[dtype].convert else []
    for file in [*(source / name for name in names), export.tokenizer_path, export.onnx_path, *filter(os.path.isfile, converted)]:
        shutil.copy(file, folder / EXPORT)
    if index_dir:
        shutil.copytree(index_dir, folder / INDEX)
    settings = Settings("", "", bool(index_dir), dtype, batch_size, max_seq_length, top_k, 0.0, bool(index_dir), least_known,
                        max_text_length, window)
    more = {} if index_dir else {"calibration_file": calibration_file, "allow_accuracy_drop": allow_accuracy_drop}
    predictor = open_predictor(str(folder), settings, 1, **more)
    if not 1 <= top_k <= len(predictor.labels):
        raise UserError(f"--top_k {top_k}: the model has {len(predictor.labels)} classes, expected 1 to that many")
    if index_dir:
        threshold = find_threshold(threshold, predictor.index)
    elif threshold == "auto":
        threshold = saved_threshold(export, max_seq_length)
    check_threshold(float(threshold), predictor.labels)
    tells_unknown = bool(index_dir) or predictor.tells_unknown
    check_least_known(least_known, tells_unknown, predictor.labels)
    digest = folder_sha256(folder)
    return Model(folder, settings._replace(archive=f"textcls-model-{digest[:16]}", sha256=digest, threshold=float(threshold),
                                           tells_unknown=tells_unknown))


def write_archive(model: Model, path: str) -> None:
    """Write the files of a model as a zip, the same bytes for the same files."""
    write_zip(path, {name.relative_to(model.folder).as_posix(): name for name in files_below(model.folder)})


def ship(spark: "SparkSession", model: Model, archive: Optional[str] = None) -> None:
    """Send a model and the library to all executors. archive: address of what `write_archive` wrote; None: the driver's own."""
    library = Path(new_folder())
    sources = {f"textcls/{file.relative_to(root).as_posix()}": file for root in map(Path, textcls.__path__)
               for file in files_below(root) if file.suffix == ".py"}
    sources["spark_rows.py"] = Path(__file__).with_name("spark_rows.py")
    write_zip(library / "part", sources)
    library_zip = library / f"textcls-{folder_sha256(library)[:16]}.zip"
    (library / "part").rename(library_zip)
    spark.sparkContext.addPyFile(str(library_zip))
    if archive is None:
        archive = os.path.join(new_folder(), f"{model.settings.archive}.zip")
        write_archive(model, archive)
    spark.sparkContext.addArchive(f"{archive}#{model.settings.archive}")


def register_udf(spark: "SparkSession", name: str, path: str, index_dir: Optional[str] = None, **options: Any) -> Callable:
    """Register a function of a text for SQL; it gives a struct of the columns of `answer_fields`. Returns it for DataFrames.

    options: of `prepare_model`. Batches are formed within spark.sql.execution.arrow.maxRecordsPerBatch rows. UserError.
    """
    import pandas as pd
    from pyspark.sql.functions import pandas_udf
    from pyspark.sql.types import StructType

    model = prepare_model(path, index_dir, **options)
    ship(spark, model)
    settings = model.settings

    def classify(series: Iterator[pd.Series]) -> Iterator[pd.DataFrame]:
        import pyarrow as pa

        for texts in series:
            yield pd.DataFrame({key: values.to_pandas() for key, values in
                                answer_column(pa.array(texts, pa.string(), from_pandas=True), settings).items()})

    return spark.udf.register(name, pandas_udf(classify, StructType(answer_fields(settings))))


def answer_fields(settings: Settings) -> "list[StructField]":
    """Return the columns of answers as Spark's types; `answer_kinds` has them as Arrow's."""
    from pyspark.sql.types import ArrayType, DoubleType, StringType, StructField, StructType

    top = StructType([StructField("label", StringType()), StructField("probability", DoubleType())])
    kinds = {"label": StringType(), "probability": DoubleType(), "top_k": ArrayType(top), "error": StringType(),
             "known": DoubleType()}
    return [StructField(name, kinds[name]) for name in answer_kinds(settings)]


def new_folder() -> str:
    """Make a folder that is removed when this process ends; returns its path."""
    _folders.append(tempfile.TemporaryDirectory(prefix="textcls-spark-"))
    return _folders[-1].name


def files_below(folder: Path) -> list[Path]:
    """Return the files in a folder and in those below it, sorted."""
    return sorted(path for path in folder.rglob("*") if path.is_file())


def write_zip(path: Union[str, Path], files: dict[str, Path]) -> None:
    """Write files into a zip, uncompressed and without times. files: {name in the zip: path}."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, file in files.items():
            with open(file, "rb") as source, archive.open(zipfile.ZipInfo(name), "w", force_zip64=True) as target:
                shutil.copyfileobj(source, target, 1 << 20)


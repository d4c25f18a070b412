"""Label a table of any size with an exported model on Apache Spark; no Paddle is needed.

    python deploy/spark/spark_infer.py --model_path_prefix export --input data/data.txt --format text --output answers
    spark-submit --master yarn ... deploy/spark/spark_infer.py --model_path_prefix export --input logs.questions --format table \\
        --text_column question --id_column id --output hdfs:///answers --parts 100
    python deploy/spark/spark_infer.py --model_path_prefix export --write_archive export.zip

Reads   model_path_prefix: a folder that export_model.py --onnx or prune.py wrote (or prefix of the model in it), on the driver;
        with --index_dir an exported sentence encoder and the index that retrieval_based/build_index.py made with it.
        input: a path that Spark can read, or with --format table the name of a table.
Writes  all columns of the input, label, probability, top_k and error, which says why a row has no label, and known where the
        model tells unknown texts; into output, a folder that appears when it is complete, or with --output_format table a table.
        With --parts N into N folders part=0, part=1 ... one after the other: those that are there are skipped when the same
        command is started again.
"""

import argparse
import json
import os
import re
import sys
from typing import TYPE_CHECKING, Any, NamedTuple

from textcls.common.errors import UserError, did_you_mean, needs_packages, run_script
from textcls.common.log import get_logger
from textcls.common.options import make_parser, positive_int, probability_or_auto
from textcls.runtime.predictions import add_known_option
from textcls.runtime.quantize import add_scheme_options, check_calibration

if TYPE_CHECKING:
    from pyspark.sql import Column, DataFrame, SparkSession

FILES = ("csv", "json", "parquet", "orc")  # formats that are read and written; text is only read
READ_OPTIONS = {"csv": {"header": "true", "multiLine": "true", "escape": '"'}}
WRITE_OPTIONS = {"csv": {"header": "true", "escape": '"', "ignoreLeadingWhiteSpace": "false",
                         "ignoreTrailingWhiteSpace": "false"}}
CONFIGURATION = {
    # of a file, for a task; Spark's own 128 MB would be an hour's work, all lost where an executor dies
    "spark.sql.files.maxPartitionBytes": "16m",
    "spark.sql.legacy.javaCharsets": "true"}  # else Spark 4 refuses encoding=GB18030
MODEL_OPTIONS = ("dtype", "batch_size", "max_seq_length", "top_k", "threshold", "least_known", "max_text_length", "window",
                 "calibration_file", "allow_accuracy_drop")  # of prepare_model
PART, SETTINGS = "part", "_parts.json"  # the column that --parts makes, and what the parts that are there were made with
logger = get_logger()


class Counts(NamedTuple):
    """Rows that were written."""

    rows: int
    errors: int


def parse_arguments() -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument("--model_path_prefix", required=True, help="exported folder, or prefix of the model in it")
    parser.add_argument("--index_dir", help="index of texts, made by build_index.py with the encoder in model_path_prefix")
    parser.add_argument("--archive", help="address of what --write_archive wrote, where all executors can read it (hdfs://...); "
                        "None: the driver sends the model")
    parser.add_argument("--write_archive", help="write the model as a zip for --archive, and do nothing else")
    parser.add_argument("--input", help="path or table")
    parser.add_argument("--format", default="parquet", choices=["text", *FILES, "table"], help="of the input")
    parser.add_argument("--option", action="append", default=[], metavar="NAME=VALUE", help="of Spark's reader, such as sep=;")
    parser.add_argument("--text_column", default="text", help="column of the texts; of the lines with --format text")
    parser.add_argument("--id_column", help="column that tells rows apart: with it each row is always in the same batch")
    parser.add_argument("--output", help="folder, or name of a table; neither may be there")
    parser.add_argument("--output_format", default="parquet", choices=[*FILES, "table"])
    parser.add_argument("--partition_by", nargs="+", default=[], metavar="COLUMN", help="columns that become folders")
    parser.add_argument("--column_prefix", default="", help="put before the names of the new columns")
    parser.add_argument("--partitions", type=positive_int, help="tasks of a job; None: as many as the input has")
    parser.add_argument("--parts", type=positive_int, default=1, help="jobs, each of which need not be done again")
    add_scheme_options(parser)
    parser.add_argument("--calibration_file", help="labelled texts on which --use_quantize is compared with fp32")
    parser.add_argument("--allow_accuracy_drop", action="store_true", help="take --use_quantize even where it costs accuracy")
    parser.add_argument("--batch_size", type=positive_int, default=32, help="texts per batch")
    parser.add_argument("--max_seq_length", type=int, help="longest text in tokens; None: as in training")
    parser.add_argument("--max_text_length", type=positive_int, default=100_000, help="characters; longer texts get an error")
    parser.add_argument("--window", type=positive_int, default=10_000, help="rows whose batches are formed by length together")
    parser.add_argument("--top_k", type=positive_int, default=1, help="how many classes top_k has")
    parser.add_argument("--threshold", type=probability_or_auto, default=0.0,
                        help="answers with a lower probability get the label `undecided`; auto: the one saved with the model")
    add_known_option(parser)
    parser.add_argument("--log_level", default="FATAL", choices=["INFO", "WARN", "ERROR", "FATAL"], help="of Spark's driver")
    args = parser.parse_args()
    if not args.write_archive and not (args.input and args.output):
        parser.error("expected --input and --output, or --write_archive")
    if args.parts > 1 and args.output_format == "table":
        parser.error("--parts needs folders, expected another --output_format than table")
    if any("=" not in option for option in args.option):
        parser.error("--option: expected NAME=VALUE")
    for name in ("calibration_file", "least_known"):
        if args.index_dir and getattr(args, name):
            parser.error(f"--{name} is for a classifier, expected no --index_dir with it")
    check_calibration(parser, args)
    return args


# ---------------------------------------------------------------- the input


def start_session(args: argparse.Namespace) -> "SparkSession":
    """Start Spark, or join the session of spark-submit; without a master of its own it runs on this machine's cores."""
    from pyspark.sql import SparkSession

    os.environ.setdefault("PYSPARK_PYTHON", sys.executable)  # else workers take any python3 of the path
    builder = SparkSession.builder.appName("textcls")
    if "table" in (args.format, args.output_format):
        builder = builder.enableHiveSupport()
    spark = builder.getOrCreate()
    spark.sparkContext.setLogLevel(args.log_level)
    for name, value in CONFIGURATION.items():
        if not spark.sparkContext.getConf().contains(name):
            spark.conf.set(name, value)
    return spark


def read_input(spark: "SparkSession", args: argparse.Namespace, settings: Any) -> "DataFrame":
    """Open the table, and check that its columns are those that args name. UserError."""
    if args.format == "table":
        frame = spark.table(args.input)
    else:
        options = {**READ_OPTIONS.get(args.format, {}), **dict(option.split("=", 1) for option in args.option)}
        frame = spark.read.format(args.format).options(**options).load(args.input)
    if args.format == "text":
        frame = frame.withColumnRenamed("value", args.text_column)
    check_columns(frame, args, settings)
    return frame


def check_columns(frame: "DataFrame", args: argparse.Namespace, settings: Any) -> None:
    """Raise UserError where a table lacks a column that args name, or has one that the output will have."""
    from pyspark.sql.types import StringType
    from spark_rows import answer_kinds

    columns, new = frame.columns, [args.column_prefix + name for name in answer_kinds(settings)]
    wanted = [("text_column", args.text_column), *(("partition_by", name) for name in args.partition_by if name not in new)]
    wanted += [("id_column", args.id_column)] if args.id_column else []
    for option, name in wanted:
        if name not in columns:
            raise UserError(f"{args.input}: no column {name!r}{did_you_mean(name, columns)}, expected one of {', '.join(columns)}"
                            f" for --{option}")
    kind = frame.schema[args.text_column].dataType
    if not isinstance(kind, StringType):
        raise UserError(f"{args.input}: column {args.text_column!r} holds {kind.simpleString()}, expected strings")
    taken = {name.lower() for name in columns} & {name.lower() for name in [*new, *([PART] if args.parts > 1 else [])]}
    if taken:
        raise UserError(f"{args.input}: has a column {min(taken)!r}, as the output will have, expected another name there, or "
                        "--column_prefix")


# ---------------------------------------------------------------- answers and output


def add_answers(frame: "DataFrame", args: argparse.Namespace, settings: Any) -> "DataFrame":
    """Append the columns of the answers to a table."""
    from pyspark.sql.functions import to_json
    from pyspark.sql.types import StructType
    from spark_model import answer_fields
    from spark_rows import answer_batches

    names = frame.columns
    frame = frame.toDF(*map(str, range(len(names))))  # mapInArrow would take a column a.b for the field b of a
    column, is_decoded = str(names.index(args.text_column)), args.format == "csv"
    if args.id_column:  # what a task has, and in which order, then depends on the ids alone
        count, key = args.partitions or frame.rdd.getNumPartitions(), str(names.index(args.id_column))
        frame = frame.repartition(count, key).sortWithinPartitions(key)
    elif args.partitions:
        frame = frame.repartition(args.partitions)
    new = answer_fields(settings)
    answered = frame.mapInArrow(lambda batches: answer_batches(batches, column, settings, is_decoded),
                                StructType([*frame.schema.fields, *new]))
    if args.output_format == "csv":  # which holds no lists
        answered = answered.withColumn("top_k", to_json("top_k", {"ignoreNullFields": "false"}))
    return answered.toDF(*names, *(args.column_prefix + field.name for field in new))


def column_of(name: str) -> "Column":
    """Return a column by its name, in which Spark would take a dot for the field of a column."""
    from pyspark.sql.functions import col

    return col("`" + name.replace("`", "``") + "`")


def write(frame: "DataFrame", args: argparse.Namespace, path: str) -> Counts:
    """Write answers to a folder that gets its name when it is complete, or into a new table. UserError where it is there."""
    from pyspark.sql import Observation
    from pyspark.sql.functions import count, lit

    observation = Observation("rows")
    error = column_of(args.column_prefix + "error")
    frame = frame.observe(observation, count(lit(1)).alias("rows"), count(error).alias("errors"))
    writer = frame.write.partitionBy(*args.partition_by) if args.partition_by else frame.write
    if args.output_format == "table":
        writer.saveAsTable(path)
        return Counts(**observation.get)
    files, target = file_system(frame.sparkSession, path)
    parent, name = os.path.split(path.rstrip("/"))
    unfinished = os.path.join(parent, f"_{name}.unfinished")  # readers leave out names that begin like this
    writer.format(args.output_format).options(**WRITE_OPTIONS.get(args.output_format, {})).mode("overwrite").save(unfinished)
    if files.exists(target) or not files.rename(file_system(frame.sparkSession, unfinished)[1], target):
        raise UserError(f"{path}: cannot be made of {unfinished}, expected a name that is free and a writable folder")
    return Counts(**observation.get)


def write_whole(frame: "DataFrame", args: argparse.Namespace, settings: Any) -> Counts:
    """Write the answers of all rows by one job. UserError where the output is there already."""
    spark = frame.sparkSession
    if args.output_format == "table":
        is_there = spark.catalog.tableExists(args.output)
    else:
        files, folder = file_system(spark, args.output)
        is_there = files.exists(folder)
    if is_there:
        raise UserError(f"{args.output}: is there already, expected a new name")
    return write(add_answers(frame, args, settings), args, args.output)


def write_parts(frame: "DataFrame", args: argparse.Namespace, settings: Any) -> Counts:
    """Write args.parts folders, each by a job of its own, that are not there yet; returns what this run wrote. UserError."""
    from pyspark.sql.functions import lit, pmod, xxhash64

    spark, total = frame.sparkSession, Counts(0, 0)
    check_parts(spark, args, settings)
    key = column_of(args.id_column or args.text_column)
    for number in range(args.parts):
        path = os.path.join(args.output, f"{PART}={number}")
        files, folder = file_system(spark, path)
        if files.exists(folder):
            logger.info(f"{PART}={number} of {args.parts}: is there, skipped")
            continue
        rows = frame.where(pmod(xxhash64(key), lit(args.parts)) == number)
        counts = write(add_answers(rows, args, settings), args, path)
        logger.info(f"{PART}={number} of {args.parts}: {describe(counts)}")
        total = Counts(*(first + second for first, second in zip(total, counts)))
    files, mark = file_system(spark, os.path.join(args.output, "_SUCCESS"))
    files.create(mark, True).close()
    return total


def check_parts(spark: "SparkSession", args: argparse.Namespace, settings: Any) -> None:
    """Keep what the parts are made with beside them. UserError where those that are there were made with something else."""
    names = ("input", "format", "option", "text_column", "id_column", "output_format", "partition_by", "column_prefix", "parts",
             "partitions")
    wanted = {**{name: getattr(args, name) for name in names}, **settings._asdict()}
    wanted["model"] = f"SHA-256 {wanted.pop('sha256')[:16]}"
    del wanted["archive"]  # its name comes of the SHA-256
    path = os.path.join(args.output, SETTINGS)
    files, file = file_system(spark, path)
    if files.exists(file):
        stream = files.open(file)
        found = json.loads(spark._jvm.org.apache.commons.io.IOUtils.toString(stream, "UTF-8"))  # type: ignore[union-attr]
        stream.close()
        for name, value in wanted.items():
            if found.get(name) != value:
                raise UserError(f"{path}: the parts that are there were made with {name} {found.get(name)!r}, this run has "
                                f"{value!r}, expected the same, or another --output")
        return
    part = file_system(spark, path + ".part")[1]  # under its name when it is whole
    if files.exists(file.getParent()) and any(each.getPath().getName() != part.getName()
                                              for each in files.listStatus(file.getParent())):
        raise UserError(f"{args.output}: is there already, and was not made with --parts, expected a new name")
    stream = files.create(part, True)
    stream.write(bytearray(json.dumps(wanted, ensure_ascii=False, indent=1).encode()))
    stream.close()
    files.rename(part, file)


def file_system(spark: "SparkSession", path: str) -> tuple[Any, Any]:
    """Return Hadoop's FileSystem of a path, and the path as it takes it."""
    jvm: Any = spark._jvm
    target = jvm.org.apache.hadoop.fs.Path(path)
    return target.getFileSystem(spark._jsc.hadoopConfiguration()), target


def describe(counts: Counts) -> str:
    """Say how many rows were written."""
    return f"{counts.rows} rows, {counts.errors} of them with an error"


def reason_of(error: Exception) -> str:
    """Return what a user can mend of an error of Spark: what a worker said, else what Python or Java says."""
    text = str(error)
    said = re.findall(r"^.*?\bUserError: (.+)$", text, re.MULTILINE)
    if said:
        return said[-1]
    reasons = re.findall(r"^(?:\w+\.)*(\w+Error: .+)$", text, re.MULTILINE)[-1:]  # Python's stands at the end of its traceback
    reasons += re.findall(r"(?:Exception|Error): (?!Job aborted|Task failed)(.+)$", text, re.MULTILINE)
    reason = (reasons or text.strip().splitlines())[0].rstrip(".")
    return f"{reason}, expected a job that Spark can run (--log_level WARN says more)"


def main() -> None:
    args = parse_arguments()
    with needs_packages("deploy/spark/requirements.txt"):
        from py4j.protocol import Py4JError
        from pyspark.errors import PySparkException
        from spark_model import prepare_model, ship, write_archive
    model = prepare_model(args.model_path_prefix, args.index_dir, **{name: getattr(args, name) for name in MODEL_OPTIONS})
    if args.write_archive:
        write_archive(model, args.write_archive)
        return logger.info(f"Model saved in {args.write_archive}.")
    try:
        spark = start_session(args)
        try:
            frame = read_input(spark, args, model.settings)
            ship(spark, model, args.archive)
            counts = write_parts(frame, args, model.settings) if args.parts > 1 else write_whole(frame, args, model.settings)
        finally:
            spark.stop()
    except (PySparkException, Py4JError) as error:
        raise UserError(reason_of(error)) from None
    logger.info(f"{describe(counts)}; saved in {args.output}.")


if __name__ == "__main__":
    run_script(main)

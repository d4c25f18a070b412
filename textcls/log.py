"""The log of all scripts, in the form of PaddleNLP's: `[time] [    INFO] - text` on standard error."""

import functools
import logging
import sys


@functools.cache
def get_logger():
    """The suite's logging.Logger. It needs no Paddle, so that what goes wrong before a model is loaded is said at once."""
    logger = logging.getLogger("textcls")
    handler = logging.StreamHandler()
    handler.setFormatter(make_formatter())
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    return logger


def make_formatter():
    """The form of a log line; coloured only on a terminal."""
    if sys.stderr is None or not sys.stderr.isatty():
        return logging.Formatter("[%(asctime)-15s] [%(levelname)8s] - %(message)s")
    import colorlog

    colours = {"INFO": "green", "TRAIN": "cyan", "EVAL": "blue", "WARNING": "yellow", "ERROR": "red", "CRITICAL": "bold_red"}
    return colorlog.ColoredFormatter("%(log_color)s[%(asctime)-15s] [%(levelname)8s]%(reset)s - %(message)s", log_colors=colours)

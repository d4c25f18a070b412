"""The two kinds of models that server.py serves, a classifier and a search among the texts of an index: what a request may ask
of them, what they answer, and how that is described.
"""

from collections.abc import Sequence
from typing import Annotated, Any, Callable, Literal, NamedTuple, Optional, Union

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, WrapValidator
from pydantic_core import PydanticCustomError

from textcls.common.errors import UserError
from textcls.common.probabilities import DECIMALS, UNDECIDED, is_decided, top_labels
from textcls.retrieval.predictor import SearchPredictor
from textcls.retrieval.search import Answer as SearchAnswer
from textcls.retrieval.search import find_threshold
from textcls.runtime.predictions import check_least_known
from textcls.runtime.predictions import check_threshold as check_undecided
from textcls.runtime.predictor import Predictor

MOST_LABELS, MOST_NEAREST = 50, 20  # per text that a search gives; its labels come and go, so the first is none of the index


class Strict(BaseModel):
    """Fields of exactly their types, and no others: a mistyped name is an error, not ignored."""

    model_config = ConfigDict(extra="forbid", strict=True)


# 3.0 is a whole number in JSON; true and "3" are not
WholeNumber = Annotated[int, BeforeValidator(lambda value: int(value) if type(value) is float and value.is_integer() else value)]


def check_threshold(value: Any, check: Callable[[Any], Union[float, str]]) -> Union[float, str]:
    """Return what `check` makes of a threshold, for pydantic. PydanticCustomError, one for both kinds that it may be of."""
    try:
        return check(value)
    except ValidationError:
        raise PydanticCustomError("no_threshold", "expected a number, 0 to 1, or auto") from None


Threshold = Annotated[Union[Annotated[float, Field(ge=0, le=1)], Literal["auto"]], WrapValidator(check_threshold)]


class Answer(BaseModel):
    label: str
    confidence: float


class TextAnswer(Answer):
    top_k: list[Answer]


class Predicted(BaseModel):
    result: list[TextAnswer]


class KnownAnswer(TextAnswer):
    known: float = Field(description="probability that the text is of one of the model's labels")


class KnownPredicted(BaseModel):
    result: list[KnownAnswer]


class Status(BaseModel):
    status: str


class FoundLabel(Answer):
    similarity: float = Field(description="cosine of the label's nearest text or name")


class NearText(BaseModel):
    text: str
    label: str
    similarity: float


class FoundAnswer(FoundLabel):
    known: float = Field(description="probability that the text is of one of the index's labels")
    top_k: list[FoundLabel]
    nearest: list[NearText] = Field([], description="only with num_nearest")


class Found(BaseModel):
    result: list[FoundAnswer]


class SearchStatus(Status):
    index_labels: int
    index_time: float = Field(description="Unix time of the index's last change, in seconds")


class Conflict(Exception):
    """A parameter that does not go with the index as it is now: (field, message)."""


Figure = tuple[str, Callable[[], float]]  # what a number means, and how to find it


class Kind(NamedTuple):
    """A model, and what is particular to its kind."""

    predictor: Union[Predictor, SearchPredictor]
    max_seq_length: int  # tokens
    run: Callable[[list[str], list[Any]], Sequence]  # of texts and their Parameters: an item per text; called in several threads
    answer: Callable[[list, Any], list[dict]]  # of items and Parameters: a TextAnswer or FoundAnswer each. Conflict
    Parameters: type[BaseModel]  # of a request
    example: dict[str, int]  # of these
    Predicted: type[BaseModel]  # the whole answer
    Status: type[Status]  # of /health/ready
    figures: dict[str, Figure] = {}  # for it and /metrics
    refresh: Optional[Callable[[], object]] = None  # to be called before these; may take a moment
    refusals: dict[int, str] = {}  # further ones of /predict: status code -> meaning


def classifier(predictor: Predictor, threshold: Union[float, str]) -> Kind:
    """Make the Kind of a Predictor. threshold: of `threshold_or_reason`."""
    labels = predictor.labels

    class Parameters(Strict):
        top_k: WholeNumber = Field(1, ge=1, le=len(labels))
        threshold: Threshold = Field(
            0.0, description=f"a text of less confidence is labelled {UNDECIDED!r}; auto: the threshold that the export holds")
        least_known: float = Field(0.0, ge=0, le=1, description=f"a text that is less known is labelled {UNDECIDED!r}")

    def answer(items, parameters):
        wanted = find_wanted(parameters.threshold)
        try:
            check_least_known(parameters.least_known, predictor.tells_unknown, labels)
        except UserError as error:
            raise Conflict("parameters.least_known", str(error)) from None
        return [make_text_answer(top[:parameters.top_k], known, wanted, parameters.least_known) for top, known in items]

    def find_wanted(wanted):
        """The threshold as a number. Conflict."""
        value = threshold if wanted == "auto" else wanted
        if isinstance(value, str):
            raise Conflict("parameters.threshold", value)
        try:
            check_undecided(value, labels)
        except UserError as error:
            raise Conflict("parameters.threshold", str(error)) from None
        return value

    def run(texts, wanted):
        probs, known = predictor.batch_answer(texts)
        tops = top_labels(probs, labels, max(parameters.top_k for parameters in wanted))
        return list(zip(tops, [None] * len(texts) if known is None else known.tolist()))

    return Kind(predictor, predictor.max_seq_length, run, answer, Parameters, {"top_k": min(3, len(labels))},
                KnownPredicted if predictor.tells_unknown else Predicted, Status,
                refusals={409: "the export holds nothing for this parameter"})


def make_text_answer(top: list[tuple[str, float]], known: Optional[float], threshold: float, least_known: float
                     ) -> dict[str, Any]:
    """Make a TextAnswer as a dict, or where known is told a KnownAnswer. top: (label, probability), best first."""
    labels = [{"label": label, "confidence": confidence} for label, confidence in top]
    answer = dict(labels[0])
    if known is not None:
        answer["known"] = round(known, DECIMALS)
    decided = is_decided(top[0][1], threshold, known, least_known)
    return {**answer, "label": answer["label"] if decided else UNDECIDED, "top_k": labels}


def search(predictor: SearchPredictor) -> Kind:
    """Make the Kind of a SearchPredictor. Each batch looks whether the index has changed; one opens the new index, and the
    others go on with the old one until it is there."""
    class Parameters(Strict):
        top_k: WholeNumber = Field(1, ge=1, le=MOST_LABELS, description="where the index has fewer labels: all of them")
        num_nearest: WholeNumber = Field(0, ge=0, le=MOST_NEAREST, description="how many of the nearest texts to give as reasons")
        threshold: Threshold = Field(
            0.0, description=f"a text of less confidence is labelled {UNDECIDED!r}; auto: the threshold that the index holds")

    def run(texts, wanted):
        predictor.reload(wait=False)
        return predictor.batch_answer(texts, *(max(getattr(parameters, name) for parameters in wanted)
                                               for name in ("top_k", "num_nearest")))

    def answer(items, parameters):
        try:
            threshold = find_threshold(parameters.threshold, predictor.index)
        except UserError as error:
            raise Conflict("parameters.threshold", str(error)) from None
        return [make_answer(item, parameters, threshold) for item in items]

    def index_time():
        return round(predictor.index.stamp[1] / 1e9, 3)

    figures = {"index_labels": ("Labels of the index", lambda: len(predictor.labels)),
               "index_time": ("Unix time of the index's last change, in seconds", index_time)}
    return Kind(predictor, predictor.encoder.max_seq_length, run, answer, Parameters, {"top_k": 3, "num_nearest": 2}, Found,
                SearchStatus, figures, predictor.reload, {409: "the index as it is now cannot answer this"})


def make_answer(found: SearchAnswer, parameters: Any, threshold: float) -> dict[str, Any]:
    """Make a FoundAnswer as a dict."""
    top = [{"label": label, "confidence": probability, "similarity": similarity}
           for label, probability, similarity in found.top_k[:parameters.top_k]]
    answer = {**top[0], "known": found.known, "top_k": top}
    if not is_decided(found.probability, threshold):
        answer["label"] = UNDECIDED
    if parameters.num_nearest:
        answer["nearest"] = [{"text": text, "label": label, "similarity": similarity}
                             for text, label, similarity in found.nearest[:parameters.num_nearest]]
    return answer

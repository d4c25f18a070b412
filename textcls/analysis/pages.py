"""HTML pages from the templates beside this file."""

from pathlib import Path

from textcls.analysis.texts_to_explain import Row
from textcls.analysis.words import Explanation, find_key_words, make_segments

TEMPLATES = Path(__file__).resolve().parent


def render(template: str, **content: object) -> str:
    """Fill a template in; texts are escaped."""
    import jinja2

    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True)
    return environment.get_template(template).render(**content)


def make_page(rows: list[Row], results: list[Explanation], labels: list[str], count: int, *, interpreter: str,
              params_path: str) -> str:
    """Make word_interpret.py's page, with `count` key words of each text. results: of the rows, by `interpret`."""
    cases = [{"label": row.label, "prediction": labels[result.prediction], "probability": result.probability,
              "segments": make_segments(row.text, result.words), "window": result.window, "length": len(row.text),
              "key_words": [result.words[index] for index in find_key_words(result.words, count)]}
             for row, result in zip(rows, results)]
    return render("word_interpret_template.html", cases=cases, interpreter=interpreter, params_path=params_path)

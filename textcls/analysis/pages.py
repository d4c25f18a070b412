"""HTML pages from the templates beside this file."""

from pathlib import Path

from textcls.analysis.words import find_key_words, make_segments

TEMPLATES = Path(__file__).resolve().parent


def render(template, **content):
    """A template filled in, as a str. Texts are escaped."""
    import jinja2

    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True)
    return environment.get_template(template).render(**content)


def make_page(rows, results, labels, count, **about):
    """word_interpret.py's page, as a str. rows: of `read_rows`; results: of `interpret`; about: interpreter, params_path."""
    cases = [{"label": row.label, "prediction": labels[result["prediction"]], "probability": result["probability"],
              "segments": make_segments(row.text, result["words"]),
              "key_words": [result["words"][index] for index in find_key_words(result["words"], count)]}
             for row, result in zip(rows, results)]
    return render("word_interpret_template.html", cases=cases, about=about)

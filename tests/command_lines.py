"""Runs many command lines of one script in one process of a server's own environment, where each start costs half a second."""

import json
import subprocess

from conftest import ROOT

DRIVER = """
import importlib.util, io, json, os, sys
path, lines = sys.argv[1], json.load(sys.stdin)
sys.path[0] = os.path.dirname(path)
sys.argv = [path]
spec = importlib.util.spec_from_file_location("script", path)
script = sys.modules["script"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(script)
found, streams = [], (sys.stdin, sys.stdout, sys.stderr)
for words, given in lines:
    sys.argv = [path, *words]
    sys.stdin, sys.stdout, sys.stderr = (
        io.TextIOWrapper(io.BytesIO(content), encoding="utf-8", write_through=True) for content in (given.encode(), b"", b""))
    code = 0
    try:
        script.run_script(script.main)
    except SystemExit as end:
        code = end.code or 0
    found.append([code] + [stream.buffer.getvalue().decode() for stream in (sys.stdout, sys.stderr)])
    sys.stdin, sys.stdout, sys.stderr = streams
print(json.dumps(found))
"""


def run_all(python, script, *lines, inside=(), cwd=ROOT):
    """Run a script once per command line, a list of words, or (list of words, standard input).

    python: of the environment. inside: words before it. Returns what subprocess.run would for each; an exception that a user
    would see as a traceback fails here.
    """
    lines = [line if isinstance(line, tuple) else (line, "") for line in lines]
    process = subprocess.run([*inside, str(python), "-c", DRIVER, str(script)], cwd=cwd, encoding="utf-8", errors="replace",
                             input=json.dumps([(list(map(str, words)), given) for words, given in lines]),
                             capture_output=True, timeout=300)
    assert process.returncode == 0, process.stderr
    return [subprocess.CompletedProcess(words, code, stdout, stderr)
            for (words, _), (code, stdout, stderr) in zip(lines, json.loads(process.stdout))]

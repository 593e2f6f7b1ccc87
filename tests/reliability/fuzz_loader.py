"""Fuzz one loader, led by what of sbpatch's code an input reaches: `python tests/reliability/fuzz_loader.py KIND [-runs=N] ...`

KIND is one of those of test_fuzz.py that need no model; the flags are libFuzzer's. It ends at the first input that is neither
read nor refused in one line, and names the file that it keeps it in.
"""

from __future__ import annotations

import sys
import tempfile
import warnings
from pathlib import Path

import atheris

sys.path[:0] = [str(Path(__file__).parents[1])]
with atheris.instrument_imports(include=["sbpatch"]):
    from cases import CONTROL
    from test_fuzz import KINDS, prepared

    from sbpatch.errors import SbpatchError

LIMITS = ("-timeout=20", "-rss_limit_mb=6000", "-max_len=65536", "-print_final_stats=1")


def main() -> None:
    name, *flags = sys.argv[1:]
    kind = KINDS[name]
    with tempfile.TemporaryDirectory() as folder:
        path = prepared(kind, Path(folder, "files"))
        corpus = Path(folder, "corpus")
        corpus.mkdir()
        (corpus / "original").write_bytes(kind.data())

        def one_input(data: bytes) -> None:
            path.write_bytes(data)
            try:
                kind.load(path)
            except SbpatchError as error:
                if CONTROL.search(str(error)) or "\n" in str(error):
                    raise AssertionError(repr(str(error))) from error

        warnings.simplefilter("ignore")
        atheris.Setup([sys.argv[0], *LIMITS, *flags, str(corpus)], one_input)
        atheris.Fuzz()


if __name__ == "__main__":
    main()

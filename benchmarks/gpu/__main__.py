"""`python -m coldframe.benchmarks.gpu`: `coldframe bench gpu`, where coldframe is not installed."""

from __future__ import annotations

import sys

from coldframe.benchmarks.gpu import command
from coldframe.loader.errors import ColdframeError
from coldframe.runtime.flags.parser import Parser

if __name__ == "__main__":
    parser = Parser(prog="make gpu", description=command.__doc__)
    command.add_arguments(parser)
    try:
        sys.exit(command.run(parser.parse(sys.argv[1:])))
    except ColdframeError as error:
        print(f"make gpu: {error}", file=sys.stderr)
        sys.exit(1)

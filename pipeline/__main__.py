"""Where `sail` and `python -m pipeline` begin: with our own packages, and no others of their names.

Other projects have a module `evaluate` too. Which one Python finds depends on the order of its
path, and a wrong one would end in errors that name neither.
"""

import sys
from importlib.util import find_spec
from pathlib import Path

HERE = Path(__file__).parents[1]


def main() -> None:
    """Run the command line; exit with 1 where a package of another project hides one of ours."""
    for name in ("features", "align", "evaluate"):
        spec = find_spec(name)
        found = Path(spec.origin).parent if spec and spec.origin else None
        if found != HERE / name:
            sys.exit(
                f"Error: Python finds the module {name!r} of another project, in {found}. That of "
                f"sail in {HERE / name} was expected. Install sail in an environment of its own."
            )
    from pipeline.cli import cli

    cli(prog_name="sail")


if __name__ == "__main__":
    main()

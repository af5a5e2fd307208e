"""The command line ``kotonoha-store`` (extra ``cli``): it parses, calls the library and prints."""

import sys
import warnings


def main() -> None:
    """Run the command line; the entry point of the package."""
    try:
        import rich  # noqa: F401  asked for, so that its absence is told
        import typer  # noqa: F401  as above
    except ImportError:
        sys.exit('kotonoha-store: the command line needs the extra cli: pip install "kotonoha-store[cli]"')
    if not sys.warnoptions:  # python -W
        # Those of other libraries say nothing to whoever only runs this.
        warnings.simplefilter("ignore")
    try:
        from kotonoha_store.cli.commands import app
    except KeyboardInterrupt:
        sys.exit(130)
    app()

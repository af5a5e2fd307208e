"""``python -m kotonoha_store.cli``, where the program itself is not on the PATH."""

from kotonoha_store.cli import main

if __name__ == "__main__":
    main()

"""One import path per public name, and a docstring for each."""

import inspect
from types import ModuleType

import pytest

import kotonoha_store


def test_all_is_what_is_visible() -> None:
    visible = {
        name
        for name, value in vars(kotonoha_store).items()
        if not name.startswith("_") and not isinstance(value, ModuleType)
    }
    assert set(kotonoha_store.__all__) == visible


def test_all_is_sorted() -> None:
    """As ruff sorts it: constants, then classes, then the rest."""
    assert kotonoha_store.__all__ == sorted(
        kotonoha_store.__all__, key=lambda name: (not name.isupper(), not name[0].isupper(), name)
    )
    assert len(set(kotonoha_store.__all__)) == len(kotonoha_store.__all__)


@pytest.mark.parametrize("name", kotonoha_store.__all__)
def test_every_name_can_be_imported_and_is_described(name: str) -> None:
    value = getattr(kotonoha_store, name)
    if not inspect.isclass(value) and not inspect.isfunction(value):
        return
    # Not by inspect.getdoc(), which takes the docstring of a parent class for its own.
    assert (value.__doc__ or "").strip(), name
    # A dataclass without a docstring is given its signature.
    assert not value.__doc__.startswith(f"{name}("), name
